"""The command line of the stages: settings in, exit code out, mistakes as one sentence."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import diffusers.utils.logging
import transformers.utils.logging

from anygpt.errors import InputError
from anygpt.training.config import Config, parse_config
from anygpt.training.loading import BadSampleError
from anygpt.training.processes import Aborted, NonFiniteLoss
from anygpt.training.stages import Stage
from anygpt.training.trainer import train

MISTAKE, NON_FINITE, ABORTED = 2, 3, 4
# What the system says of a disk: no space, over the quota or the largest file, read-only.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def run_stage(
    stage: Stage,
    description: str,
    arguments: Sequence[str] | None = None,
    afterwards: Callable[[Path, Config], None] | None = None,
) -> None:
    """Run a stage and exit: 0 done, 2 a mistake of the user's, 3 a loss that is not finite, 4 a metric
    above its bound, 128 + n after signal n.

    `afterwards` is called by the first process with the `final/` folder and the settings.
    A mistake is printed as one line, by the first process alone unless it is about a sample that only another one has;
    anything else keeps its traceback.
    """
    quiet_libraries()
    try:
        config = parse_config(sys.argv[1:] if arguments is None else arguments, description)
        final = train(config, stage)
        if afterwards is not None and int(os.environ.get("RANK", "0")) == 0:
            afterwards(final, config)
    except (InputError, NonFiniteLoss, Aborted, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK:
            raise
        if int(os.environ.get("RANK", "0")) == 0 or isinstance(error, BadSampleError):
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit({NonFiniteLoss: NON_FINITE, Aborted: ABORTED}.get(type(error), MISTAKE))


def quiet_libraries() -> None:
    """Our own messages at info level; the libraries' progress bars and notes of loading tiny files left out."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of one library about another
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    datasets.disable_progress_bars()
