"""Serve a trained model over HTTP with OpenAI's chat completions API.

    anygpt serve
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "anygpt", "messages": [{"role": "user", "content": "Draw a red ring."}]}'

Images, videos and sounds are data URLs in content parts (`image_url`, `video_url`, `input_audio`), in answers in the
message's `parts`; `stream` sends server-sent events. Beyond OpenAI's fields: `require` and `forbid` (lists of
decoders), and `decoders` (`{"image": {"num_inference_steps": 25}}`). `--api-key` (or ANYGPT_API_KEY in the environment)
requires a key; pages of other sites need `--cors-origin`. `GET /metrics` has Prometheus' format. The connection is not
encrypted: put a proxy with TLS in front before listening on anything but this machine.
"""

import argparse
import importlib.util
import os
import socket
from typing import Any

from anygpt.chat.chat_model import ChatModel
from anygpt.commands import add_model_arguments, check_range, new_parser
from anygpt.errors import InputError, refusing


def main(arguments: list[str]) -> None:
    parser = server_parser("serve", __doc__, port=8000)
    add, key = parser.add_argument, os.environ.get("ANYGPT_API_KEY")
    add("--model-name", default="anygpt", help="the model's name in requests (default: %(default)s)")
    add("--api-key", default=key, help="what clients must send (default: ANYGPT_API_KEY of the environment, or none)")
    sites = "sites whose pages may send requests, as https://example.com; * for any (default: none)"
    add("--cors-origin", nargs="*", default=[], metavar="ORIGIN", help=sites)
    options = parser.parse_args(arguments)
    engine = load_engine(options)
    from anygpt.serving.http import Interface  # after the check for missing packages

    interface = Interface(engine, options.model_name, key=options.api_key or None)
    print(f"Listening on http://{options.host}:{options.port}/v1 as {options.model_name!r}", flush=True)
    listen(interface.app(options.host, options.allow_host, options.cors_origin), options)


def server_parser(name: str, description: str | None, port: int) -> argparse.ArgumentParser:
    parser = new_parser(name, description)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=port, help="0 chooses a free one (default: %(default)s)")
    add("--max-waiting", type=int, default=64, help="maximum number of waiting requests (default: %(default)s)")
    add("--max-batch", type=int, default=8, help="maximum number answered together (default: %(default)s)")
    add("--allow-host", nargs="*", default=[], metavar="NAME", help="further names of this server; * for any")
    return parser


def load_engine(options: argparse.Namespace) -> Any:
    """The `Engine`: check the options, choose a free port if none was given, and load the model."""
    missing = [name for name in ("gradio", "prometheus_client", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} is not installed; pip install -e '.[demo]' installs it")
    check_range(options, 1, float("inf"), "max_waiting", "max_batch")
    what, kinds = f"cannot listen on {options.host}:{options.port}", (OSError, OverflowError)
    with refusing(what, kinds, "; name another --port"), socket.create_server((options.host, options.port)) as probe:
        options.port = probe.getsockname()[1]
    from anygpt.serving.engine import Engine

    chat_model = ChatModel(options.checkpoint, options.device, options.offload)
    return Engine(chat_model, options.max_waiting, options.max_batch)


def listen(app: Any, options: argparse.Namespace) -> None:
    import uvicorn  # after the check for missing packages

    from anygpt.serving.gate import server_config

    uvicorn.Server(server_config(app, host=options.host, port=options.port)).run()
