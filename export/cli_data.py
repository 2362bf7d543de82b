"""`dgm4 data`: the sample set."""

from __future__ import annotations

import argparse
import json
import sys

from tqdm import tqdm


def make(options: argparse.Namespace) -> int:
    """Write the sample set; stdout tells how many pairs of each class there are."""
    from dgm4.data.make import make_sample_set

    with tqdm(total=options.pairs, unit="pair", file=sys.stderr, disable=None) as bar:
        counts = make_sample_set(options.out, options.pairs, options.seed, bar.update)
    sys.stdout.write(json.dumps({"out": str(options.out), "counts": counts}) + "\n")
    return 0
