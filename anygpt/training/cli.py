"""The command line of the stages: settings in, exit code out, mistakes as one sentence."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import diffusers.utils.logging
import psutil
import transformers.utils.logging

from anygpt.errors import InputError
from anygpt.training.check import FLAG, Findings, check, report
from anygpt.training.config import Config, parse_config
from anygpt.training.loading import BadSampleError
from anygpt.training.processes import Aborted, Interrupted, NonFiniteLoss
from anygpt.training.stages import Stage
from anygpt.training.tiny import with_tiny_config
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
    anything else keeps its traceback. Under a launcher the line comes after what that prints of the failure.
    """
    quiet_libraries()
    rank, launcher = int(os.environ.get("RANK", "0")), find_launcher()
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        settings = with_tiny_config(stage, [a for a in given if a != FLAG], main=rank == 0)
        config = parse_config(settings, f"{description}\n{FLAG}: {check.__doc__}")
        if FLAG in given:
            sys.exit(say(check(config, stage), config))
        final = train(config, stage)
        if afterwards is not None and rank == 0:
            afterwards(final, config)
    except Interrupted as end:
        if rank == 0 and launcher is not None:
            say_last(end.line, launcher)
        raise
    except Exception as error:
        line = " ".join(str(error).split())
        mistake = isinstance(error, InputError | NonFiniteLoss | Aborted) or getattr(error, "errno", None) in DISK
        if not mistake:
            if launcher is not None:
                line = f"{type(error).__name__}: {line} (a fault of the program's; its traceback is above)"
                say_last(f"error: {line}", launcher)
            raise
        if rank == 0 or isinstance(error, BadSampleError):
            say_last(f"error: {line}", launcher)
        codes: dict[type, int] = {NonFiniteLoss: NON_FINITE, Aborted: ABORTED}
        sys.exit(codes.get(type(error), MISTAKE))


def find_launcher() -> int | None:
    """The process that runs `accelerate launch` or `torchrun` over this one, if one does."""
    try:
        parent = psutil.Process(os.getppid())
        words = [Path(word).name for word in parent.cmdline()[:3]]
    except psutil.Error:
        return None
    return parent.pid if {"accelerate", "accelerate-launch", "torchrun", "torch.distributed.run"} & set(words) else None


# What a launcher prints of a process that failed comes when that process is gone. So the line is left to another one,
# which waits for the end of the launcher, a zombie included: whoever started it may first read this output to its end.
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
    """Print a line to stderr, under a launcher as the last thing that the command prints."""
    if launcher is None:
        print(line, file=sys.stderr)
    else:
        subprocess.Popen([sys.executable, "-c", _LAST, str(launcher), line], start_new_session=True)


def say(found: Findings, config: Config) -> int:
    """Print what a check found; the exit code."""
    print(report(found, config))
    for fault in found.faults:
        print("error:", fault, file=sys.stderr)
    return MISTAKE if found.faults else 0


def quiet_libraries() -> None:
    """Our own messages at info level; the libraries' progress bars and notes of loading tiny files left out."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for library in ("httpx", "huggingface_hub"):  # it tells of each file that it writes
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of one library about another
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    datasets.disable_progress_bars()
