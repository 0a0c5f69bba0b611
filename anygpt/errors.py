"""The one exception for mistakes that the user can mend, and what a command prints of it."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

from safetensors import SafetensorError

logger = logging.getLogger(__name__)

MISTAKE, INTERRUPTED = 2, 128 + 2  # exit codes: of a user error, and after Ctrl-C, as in shells


class InputError(ValueError):
    """Something that was given to us is wrong: a setting, a file, a shape, a count.

    The message is one sentence for a person: what was wrong, where (file, line, row, key), what was
    expected, and how to mend it. The command-line tools print it alone, without a traceback; everything
    else that goes wrong is a fault of the program and keeps its traceback.
    """


@contextmanager
def refusing(what: str, kinds: tuple[type[Exception], ...] = (Exception,), advice: str = "") -> Iterator[None]:
    """Turn errors of these kinds that a library raises into an `InputError`: `what`, why, `advice`."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise InputError(f"{what} ({reason}){advice}") from error


def reading(folder: str | Path) -> AbstractContextManager[None]:
    """Context in which a saved folder is read; what libraries raise becomes an `InputError` that names the folder."""
    kinds = (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError, SafetensorError)
    return refusing(f"{folder} is damaged or incomplete", kinds, "; copy it again, or train it again")


@cache
def warn_once(message: str) -> None:
    logger.warning(message)


def exit_code(main: Callable[[list[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Run a command's or a script's `main`; returns the exit code: 2 after a user error, printed as one line."""
    try:
        return main(list(sys.argv[1:] if arguments is None else arguments)) or 0
    except InputError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # such as from `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
