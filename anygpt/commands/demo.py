"""A page to talk to a trained model in a browser: text, pictures, clips and sounds, in and out.

    anygpt demo    # then open http://127.0.0.1:7860

Text and the decoders' progress are shown as they come. Nothing is loaded from elsewhere and nobody is told. There is
no authentication: put it behind something that has, before it listens on anything but this machine.
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
    from anygpt.serving.page import make_app  # after the check, which says in a sentence what is not installed

    end_on_sigterm()
    engine = load_engine(options)
    with tempfile.TemporaryDirectory(prefix="anygpt-demo-") as folder:
        app = make_app(engine, Path(folder), options.host, options.allow_host)
        print(f"Open http://{options.host}:{options.port}", flush=True)
        listen(app, options)
