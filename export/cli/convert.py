"""`dgm4 convert`: the tensors of a checkpoint alone, as safetensors."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dgm4.places import check_checkpoint
from engine.errors import quoted
from export.cli.arguments import Verbs
from export.output import check_output
from export.writing import writing


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "convert",
        help="take the tensors alone out of a checkpoint",
        description="Write a checkpoint's tensors, under the network's own names, as safetensors. Objects of "
        "other kinds in the file are left out and named; none of its code runs.",
        epilog="examples:\n  dgm4 convert best.pth best.safetensors\n"
        "  dgm4 convert run.ckpt best.safetensors --state model_ema\n"
        "  dgm4 convert locate.pth pmmd.safetensors --join refine.pth",
    )
    parser.add_argument("checkpoint", type=Path, help=".pth or any other file of torch.save")
    parser.add_argument("out", type=Path, metavar="OUT", help="a .safetensors file; one there is replaced")
    parser.add_argument("--state", metavar="NAME", help="which of several, as model_ema")
    parser.add_argument(
        "--join", type=Path, metavar="FILE", help="the other file of a network that is published in two"
    )
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Convert, and say in a line what was taken."""
    if options.out.suffix != ".safetensors":
        options.parser.error(
            f"OUT: expected a name that ends in .safetensors, got {quoted(str(options.out))}"
        )
    check_checkpoint(options.checkpoint)
    check_output(options.out, "OUT")
    from dgm4.checkpoint import join_states
    from dgm4.saving import save_safetensors
    from dgm4.state import find_state
    from engine.files import replacing

    found = find_state(options.checkpoint, options.state, tensors_only=True)
    state = found.state
    if options.join is not None:
        other = find_state(options.join, tensors_only=True)
        state = join_states({options.checkpoint: state, options.join: other.state})
    # A copy of each: safetensors holds no two tensors that share memory.
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    with writing(options.out, "OUT"), replacing(options.out) as partial:
        save_safetensors(state, partial)
    size = options.out.stat().st_size / 1e6
    taken = f"the state {found.place}" if found.place else "the whole file"
    if options.join is not None:
        taken += f" and of {options.join}"
    sys.stdout.write(f"{options.out}: {len(state)} tensors of {taken}, {size:.1f} MB\n")
    return 0
