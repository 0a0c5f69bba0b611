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

from __future__ import annotations

import argparse
import os

from anygpt.commands import new_parser
from anygpt.commands.servers import add_arguments, check, listen, load_engine


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = new_parser("serve", __doc__)
    add_arguments(parser, port=8000)
    parser.add_argument("--model-name", default="anygpt", help="what requests call the model (default: %(default)s)")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("ANYGPT_API_KEY"),
        help="what clients must send as their key (default: ANYGPT_API_KEY of the environment, or none)",
    )
    parser.add_argument(
        "--cors-origin",
        nargs="*",
        default=[],
        metavar="ORIGIN",
        help="sites whose pages may ask, as https://example.com; * for any (default: none)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    check(options)
    from anygpt.serving.http import Interface  # after the check, which reports missing packages

    interface = Interface(load_engine(options), options.model_name, key=options.api_key or None)
    print(f"Listening on http://{options.host}:{options.port}/v1 as {options.model_name!r}", flush=True)
    listen(interface.app(options.host, options.allow_host, options.cors_origin), options)
