"""Front door: `python export/to_trt.py` exports a detector, builds its engine and tries the bundle.

The same as `dgm4 export`; see `python export/to_trt.py --help`.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, Python puts this folder first on its path; the packages lie one above. No pathlib:
    # before `main` an interrupt would show a traceback.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # noqa: PTH120
    from export.cli import main

    sys.argv[1:1] = ["export"]
    sys.exit(main())
