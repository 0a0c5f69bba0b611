"""The command line, `anygpt COMMAND …`: a command is a module with `main(arguments)`, whose docstring is its help."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from anygpt.errors import InputError
from anygpt.training.cli import MISTAKE, quiet_libraries

COMMANDS = {
    "chat": "talk to a trained model in the terminal",
    "serve": "serve a trained model over HTTP, in the form of OpenAI's chat completions",
    "demo": "a page to talk to a trained model in a browser",
    "evaluate": "measure a trained model",
    "validate-data": "check a data file before a run does",
    "cache-features": "compute once what the frozen parts of a run make of its data",
    "merge-lora": "merge adapters and signal tokens into the weights",
    "trace-shapes": "the tensors of every hop from input to decoder",
    "benchmark": "time and memory of one thing done in several ways",
}
REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = REPOSITORY / "runs/quickstart/stage3/final"
INTERRUPTED = 128 + 2  # exit code after Ctrl-C, as in shells


def main(arguments: Sequence[str] | None = None) -> int:
    """`anygpt`: the first argument names the command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="anygpt",
        description="commands:\n" + "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()),
        epilog="anygpt COMMAND --help says more of one. Training: accelerate launch stages/….py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those above")
    name = parser.parse_args(arguments[:1]).command
    return run(name, arguments[1:])


def run(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see `execute`)."""
    return execute(importlib.import_module(f"anygpt.commands.{name.replace('-', '_')}").main, arguments)


def execute(main: Callable[[list[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Run a command's or a script's `main`; returns the exit code: 2 after a user error, which is printed as one line.

    Args:
        arguments: those of the command line if None.
    """
    quiet_libraries()
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


def new_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Parser of a command: keeps the description's layout and allows no abbreviated flags."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    return argparse.ArgumentParser(prog=f"anygpt {name}", description=description, **options)
