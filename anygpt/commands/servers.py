"""Shared parts of the servers' command lines."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from anygpt.chat.chat_model import ChatModel, check_device
from anygpt.commands import CHECKPOINT
from anygpt.errors import InputError
from anygpt.serving.engine import Engine


def add_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=CHECKPOINT,
        help="a run's final/ folder (default: the quickstart's last)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=port, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--max-waiting", type=int, default=64, help="requests that may wait (default: %(default)s)")
    parser.add_argument("--max-batch", type=int, default=8, help="answered together, at most (default: %(default)s)")
    parser.add_argument(
        "--allow-host",
        nargs="*",
        default=[],
        metavar="NAME",
        help="further names that the server may be asked under, * for any (default: this machine's local ones)",
    )
    parser.add_argument("--device", default="cpu", help="where to run, for example cuda (default: %(default)s)")
    parser.add_argument("--offload", action="store_true", help="decoders are on the device only while they are used")


def check(options: argparse.Namespace) -> None:
    """Validate options before anything is loaded, and choose a free port if none was given.

    Raises:
        InputError: an invalid option, or the extra `demo` is not installed.
    """
    missing = [name for name in ("gradio", "prometheus_client", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} is not installed; pip install -e '.[demo]' brings it")
    for name in ("waiting", "batch"):
        if (value := getattr(options, f"max_{name}")) < 1:
            raise InputError(f"--max-{name} is {value}, expected at least 1")
    check_device(options.device, options.offload)
    try:
        with socket.create_server((options.host, options.port)) as probe:
            options.port = probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {options.host}:{options.port}: {error}; name another --port") from error


def end_on_sigterm() -> None:
    """Make SIGTERM raise instead of killing the process, so that temporary files are removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def load_engine(options: argparse.Namespace) -> Engine:
    return Engine(
        ChatModel(options.checkpoint, options.device, options.offload), options.max_waiting, options.max_batch
    )


def listen(app: Any, options: argparse.Namespace) -> None:
    """Serve until interrupted or terminated."""
    import uvicorn  # not at the top: `check` reports it if missing

    from anygpt.serving.connections import allow_open_files, server_config

    allow_open_files()
    uvicorn.Server(server_config(app, host=options.host, port=options.port)).run()
