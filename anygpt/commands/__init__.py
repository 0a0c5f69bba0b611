"""The command line, `anygpt COMMAND …`: a command is a module with `main(arguments)`, whose docstring is its help."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from anygpt.errors import InputError, exit_code
from anygpt.training.cli import quiet_libraries

COMMANDS = {
    "chat": "chat with a trained model in the terminal",
    "serve": "serve a trained model over HTTP with OpenAI's chat completions API",
    "demo": "serve a page to chat with a trained model in a browser",
    "evaluate": "evaluate a trained model",
    "validate-data": "validate a data file ahead of a run",
    "cache-features": "compute the outputs of a run's frozen parts once, for all its data",
    "merge-lora": "merge adapters and signal tokens into the weights",
    "trace-shapes": "list the tensors between all parts, from input to decoder",
    "benchmark": "compare time and memory of alternative ways to do one thing",
}
REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = REPOSITORY / "runs/quickstart/stage3/final"


def main(arguments: Sequence[str] | None = None) -> int:
    """`anygpt`: the first argument names the command."""
    quiet_libraries(starting=arguments is None)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="anygpt",
        description="commands:\n" + "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()),
        epilog="anygpt COMMAND --help describes one of them. Training: accelerate launch stages/….py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the above")
    return run(parser.parse_args(arguments[:1]).command, arguments[1:])


def run(name: str, arguments: Sequence[str] | None = None) -> int:
    return execute(importlib.import_module(f"anygpt.commands.{name.replace('-', '_')}").main, arguments)


def execute(main: Callable[[list[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Run the `main` of a command or script as `exit_code` does, with the libraries quiet."""
    quiet_libraries(starting=arguments is None)
    return exit_code(main, arguments)


def new_parser(name: str | None, description: str | None) -> argparse.ArgumentParser:
    """A parser for a command, or without a name for a script."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    return argparse.ArgumentParser(prog=name and f"anygpt {name}", description=description, **options)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", type=Path, default=CHECKPOINT, help="a run's final/ folder (default: the quickstart's last)")
    add("--device", default="cpu", help="where to run, for example cuda (default: %(default)s)")
    add("--offload", action="store_true", help="keep decoders on the device only while they are used")


def check_range(options: argparse.Namespace, least: float, most: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            bounds = f"from {least} to {most}" if most < float("inf") else f"of at least {least}"
            raise InputError(f"--{name.replace('_', '-')} is {value}, expected a number {bounds}")
