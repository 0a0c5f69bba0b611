"""The one exception for mistakes that the user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class InputError(ValueError):
    """Something that was given to us is wrong: a setting, a file, a shape, a count.

    The message is one sentence for a person: what was wrong, where (file, line, row, key), what was
    expected, and how to mend it. The command-line tools print it alone, without a traceback; everything
    else that goes wrong is a fault of the program and keeps its traceback.
    """


@contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Say of whatever the libraries raise over a saved folder that it is damaged, and where."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError, SafetensorError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise InputError(
            f"{folder} is damaged or incomplete ({type(error).__name__}: {reason}); copy it again, or train it again"
        ) from error
