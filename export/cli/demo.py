"""`dgm4 demo`: answer the pair that ships with the bundle that ships, and draw the card."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine import Predictor
from engine.cards.render import check_plot_path
from export.cli.arguments import Verbs
from export.cli.plot import save_plot
from export.cli.summary import summary
from export.output import check_output, open_output

BUNDLE = "demo:asap"


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "demo",
        help="a first answer: a pair that ships, judged by a bundle that ships",
        description="Judge an image with a swapped face and a changed caption, and draw the card. "
        "The network was trained on made images: it shows what an answer looks like, and says nothing about "
        "real images. Needs no torch.",
        epilog="examples:\n  dgm4 demo\n  dgm4 demo --out card.png",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("dgm4-demo.png"),
        metavar="FILE",
        help="where the card is drawn (%(default)s)",
    )
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Predict the pair; the summary goes to stdout."""
    from dgm4.shipped import demo_sample

    check_plot_path(options.out)
    check_output(options.out, "--out", [])
    image, caption = demo_sample()
    with Predictor(BUNDLE) as predictor:
        prediction = predictor.predict(image, caption)
    save_plot(prediction, options.out, "--out")
    with open_output(None) as out:
        out.write(summary(image.name, prediction.to_dict(heatmap=False)))
        out.write(f"{'  card':<15}{options.out}\n")
    return 0
