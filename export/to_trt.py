"""Front door: `python export/to_trt.py` exports a detector, builds its engine and tries the bundle.

The same as `dgm4 export`; see `python export/to_trt.py --help`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, Python puts this folder first on its path; the packages lie one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from export.cli import main

    sys.exit(main(["export", *sys.argv[1:]]))
