"""Serve a page to chat with a trained model in a browser, with text, images, videos and sounds as input and output.

    anygpt demo    # then open http://127.0.0.1:7860

Text and the decoders' progress are streamed. The page loads nothing from other sites and sends no telemetry. There is
no authentication: put a proxy that has it in front before listening on anything but this machine.
"""

import signal
import sys
import tempfile
from pathlib import Path

from anygpt.commands.serve import listen, load_engine, server_parser


def main(arguments: list[str]) -> None:
    options = server_parser("demo", __doc__, port=7860).parse_args(arguments)
    # raises instead of killing the process, so that uploads are removed
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    engine = load_engine(options)
    from anygpt.serving.page import make_app  # after the check for missing packages

    with tempfile.TemporaryDirectory(prefix="anygpt-demo-") as folder:
        app = make_app(engine, Path(folder), options.host, options.allow_host)
        print(f"Open http://{options.host}:{options.port}", flush=True)
        listen(app, options)
