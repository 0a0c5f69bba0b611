"""Command line of the stages: parses settings, sets the exit code, and prints user errors as one line."""

import errno
import gc
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import diffusers.utils.logging
import psutil
import transformers.utils.logging

from anygpt.errors import MISTAKE, InputError
from anygpt.training.check import FLAG, check, report
from anygpt.training.config import Config, parse_config
from anygpt.training.loading import BadSampleError
from anygpt.training.processes import Aborted, Interrupted, NonFiniteLoss
from anygpt.training.stages import Stage
from anygpt.training.tiny import with_tiny_config
from anygpt.training.trainer import train

NON_FINITE, ABORTED = 3, 4
PATIENCE = 60  # seconds in which the first process comes to an error that another process had, if it does
# Disk errors: no space, quota or file size exceeded, read-only.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def run_stage(
    stage: Stage,
    description: str,
    arguments: Sequence[str] | None = None,
    afterwards: Callable[[Path, Config], None] | None = None,
) -> None:
    """Run a stage and exit: 0 done, 2 user error, 3 non-finite loss, 4 metric above its bound, 128 + n after signal n.

    The first process calls `afterwards` with the `final/` folder and the settings. A user error is printed as one line,
    by the first process unless it concerns a sample of another one; other errors keep their traceback. Under a
    launcher, the line follows the launcher's own failure report.
    """
    quiet_libraries(starting=arguments is None)
    rank, launcher = int(os.environ.get("RANK", "0")), find_launcher()
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        settings = with_tiny_config(stage, [a for a in given if a != FLAG], main=rank == 0)
        config = parse_config(settings, f"{description}\n{FLAG}: {check.__doc__}")
        if FLAG in given:
            found = check(config, stage)
            print(report(found, config))
            for fault in found.faults:
                print("error:", fault, file=sys.stderr)
            sys.exit(MISTAKE if found.faults else 0)
        final = train(config, stage)
        if afterwards is not None and rank == 0:
            afterwards(final, config)
    except Interrupted as end:
        if rank == 0 and launcher is not None:
            say_last(end.line, launcher)
        raise
    except Exception as error:
        line = " ".join(str(error).split())
        codes: dict[type, int] = {NonFiniteLoss: NON_FINITE, Aborted: ABORTED}
        if not isinstance(error, InputError | NonFiniteLoss | Aborted) and getattr(error, "errno", None) not in DISK:
            if launcher is not None:
                line = f"{type(error).__name__}: {line} (a bug in the program; its traceback is above)"
                say_last(f"error: {line}", launcher)
            raise
        if rank == 0 or isinstance(error, BadSampleError):
            say_last(f"error: {line}", launcher)
        elif launcher is not None:
            time.sleep(PATIENCE)  # the launcher ends all once one has ended, the first perhaps before it has said it
            say_last(f"error: {line}", launcher)  # still here, so the first has not come to it
        sys.exit(codes.get(type(error), MISTAKE))


def find_launcher() -> int | None:
    """Id of the parent process that runs `accelerate launch` or `torchrun`, or None."""
    try:
        parent = psutil.Process(os.getppid())
        words = [Path(word).name for word in parent.cmdline()[:3]]
    except psutil.Error:
        return None
    return parent.pid if {"accelerate", "accelerate-launch", "torchrun", "torch.distributed.run"} & set(words) else None


# A launcher reports a failed process after its end. A separate process therefore prints the line once the launcher has
# ended or is a zombie (its parent may read this output to the end before it reaps the launcher).
_LAST = """
import psutil, sys, time
try:
    launcher = psutil.Process(int(sys.argv[1]))
    while launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)
except psutil.Error:
    pass
print(sys.argv[2], file=sys.stderr)
"""


def say_last(line: str, launcher: int | None) -> None:
    """Print a line to stderr; under a launcher, after the launcher's own output."""
    if launcher is None:
        print(line, file=sys.stderr)
    else:
        subprocess.Popen([sys.executable, "-c", _LAST, str(launcher), line], start_new_session=True)


def quiet_libraries(starting: bool = False) -> None:
    """Show this package's messages; of the libraries' only warnings, without deprecations and progress bars."""
    if starting:  # of a program: no collection, nor the one at exit, looks at the libraries' million objects again
        gc.freeze()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("anygpt").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns about each repository read from the cache
    for category in (FutureWarning, DeprecationWarning):  # raised by one library about another
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    datasets.disable_progress_bars()
