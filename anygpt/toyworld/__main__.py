"""`python -m anygpt.toyworld --output DIR`: write ToyWorld's datasets for the stages, joint training and evaluation."""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from anygpt.errors import exit_code
from anygpt.toyworld.datasets import COMPONENT_KINDS, KINDS, KINDS_OF, WHOLE_KINDS, write_dataset
from anygpt.toyworld.world import HELD_OUT, SEEN, THINGS

SAMPLES = dict.fromkeys(KINDS, 1600) | {"stage3": 3200}  # conversations are more varied
DESCRIPTION = f"""Write ToyWorld's datasets: pictures, clips, sounds and words about coloured shapes. The stages see
{len(SEEN)} things; the evaluation is about the other {len(HELD_OUT)}. A dataset that is there already is kept."""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m anygpt.toyworld", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write to, for example runs/toyworld")
    add("--samples", type=int, help="rows for each stage (default: 1600, for stage 3 twice as many)")
    add("--eval-samples", type=int, default=160, help="rows to judge, for 16 cells (default: %(default)s)")
    add("--world", type=int, choices=KINDS_OF, default=1, help="2: pictures of several things (default: %(default)s)")
    stages = [kind for kind in KINDS if kind not in WHOLE_KINDS]
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--kinds", nargs="+", choices=KINDS, help=f"only these (default: {', '.join(stages)})")
    which.add_argument("--components", action="store_true", help=f"the data of stage 0, about all {len(THINGS)} things")
    add("--seed", type=int, default=0, help="seed of everything drawn (default: %(default)s)")
    options = parser.parse_args(arguments)
    samples = SAMPLES if options.samples is None else dict.fromkeys(KINDS, options.samples)
    samples = samples | {"eval": options.eval_samples}
    kinds = COMPONENT_KINDS if options.components else options.kinds or stages
    if options.kinds is None:
        kinds = [kind for kind in kinds if kind in KINDS_OF[options.world]]
    with ProcessPoolExecutor(min(len(kinds), os.cpu_count() or 1)) as pool:
        written = {}
        for kind in sorted(kinds, key=lambda kind: -samples[kind]):  # the longest first
            whole = options.components or kind in WHOLE_KINDS
            things = THINGS if whole else HELD_OUT if kind == "eval" else SEEN
            given = (options.output, kind, samples[kind], options.seed, things, False, options.world)
            written[kind] = pool.submit(write_dataset, *given)
        for kind in kinds:
            print(written[kind].result(), flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
