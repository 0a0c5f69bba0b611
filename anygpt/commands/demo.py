"""Serve a page to chat with a trained model in a browser, with text, images, videos and sounds as input and output.

    anygpt demo    # then open http://127.0.0.1:7860

Text and the decoders' progress are streamed. The page loads nothing from other sites and sends no telemetry. There is
no authentication: put a proxy that has it in front before listening on anything but this machine.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from anygpt.commands import new_parser
from anygpt.commands.servers import add_arguments, check, end_on_sigterm, listen, load_engine


def main(arguments: list[str]) -> None:
    parser = new_parser("demo", __doc__)
    add_arguments(parser, port=7860)
    options = parser.parse_args(arguments)
    check(options)
    from anygpt.serving.page import make_app  # after the check, which reports missing packages

    end_on_sigterm()
    engine = load_engine(options)
    with tempfile.TemporaryDirectory(prefix="anygpt-demo-") as folder:
        app = make_app(engine, Path(folder), options.host, options.allow_host)
        print(f"Open http://{options.host}:{options.port}", flush=True)
        listen(app, options)
