"""`python -m anygpt.toyworld --output DIR`: write ToyWorld's datasets for the stages, joint training and evaluation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from anygpt.errors import InputError
from anygpt.toyworld.datasets import COMPONENT_KINDS, KINDS, write_dataset
from anygpt.toyworld.world import HELD_OUT, SEEN, THINGS

SAMPLES, STAGE3_SAMPLES, EVAL_SAMPLES = 1600, 3200, 160
"""Rows. Stage 3 has more, since conversations are more varied; the evaluation has 10 rows for each of 16 cells."""


def main(arguments: list[str] | None = None) -> int:
    """Write the datasets and print their paths; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m anygpt.toyworld",
        description="Write ToyWorld's datasets: pictures, clips, sounds and words about coloured shapes. "
        f"The stages see {len(SEEN)} things; the evaluation is about the other {len(HELD_OUT)}. "
        "A dataset that is there already, made with the same arguments, is kept.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to, for example runs/toyworld")
    said = f"rows for each stage (default: {SAMPLES}, for stage 3 {STAGE3_SAMPLES})"
    parser.add_argument("--samples", type=int, help=said)
    parser.add_argument("--eval-samples", type=int, default=EVAL_SAMPLES, help="rows to judge (default: %(default)s)")
    stages = [kind for kind in KINDS if kind not in COMPONENT_KINDS]
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--kinds", nargs="+", choices=stages, default=stages, help="of these (default: all of them)")
    which.add_argument(
        "--components", action="store_true", help=f"the data of stage 0 instead, about all {len(THINGS)} things"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        for kind in COMPONENT_KINDS if options.components else options.kinds:
            samples = options.samples if options.samples is not None else {"stage3": STAGE3_SAMPLES}.get(kind, SAMPLES)
            samples, things = (options.eval_samples, HELD_OUT) if kind == "eval" else (samples, SEEN)
            things = THINGS if options.components else things
            print(write_dataset(options.output, kind, samples, options.seed, things, progress=True))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
