"""The command line of the stages: settings in, exit code out, mistakes as one sentence."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

import diffusers.utils.logging
import transformers.utils.logging

from anygpt.errors import InputError
from anygpt.training.config import parse_config
from anygpt.training.loading import BadSampleError
from anygpt.training.loop import NonFiniteLoss, train
from anygpt.training.stages import Stage

MISTAKE, NON_FINITE = 2, 3


def run_stage(stage: Stage, description: str, arguments: Sequence[str] | None = None) -> None:
    """Run a stage and exit: 0 done, 2 a mistake of the user's, 3 a loss that is not finite, 128 + n after signal n.

    A mistake is printed as one line, by the first process alone unless it is about a sample that only another one has;
    anything else keeps its traceback.
    """
    quiet_libraries()
    try:
        train(parse_config(sys.argv[1:] if arguments is None else arguments, description), stage)
    except (InputError, NonFiniteLoss) as error:
        if int(os.environ.get("RANK", "0")) == 0 or isinstance(error, BadSampleError):
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(MISTAKE if isinstance(error, InputError) else NON_FINITE)


def quiet_libraries() -> None:
    """Our own messages at info level; the libraries' progress bars and notes of loading tiny files left out."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of one library about another
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
