"""A page to talk to a trained model in a browser: text, pictures, clips and sounds, in and out.

    python scripts/demo.py    # then open http://127.0.0.1:7860

Text and the decoders' progress are shown as they come. Nothing is loaded from elsewhere and nobody is told. There is
no authentication: put it behind something that has, before it listens on anything but this machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from anygpt.errors import InputError
from anygpt.serving.command_line import add_arguments, check, listen, load_engine
from anygpt.training.cli import MISTAKE, quiet_libraries


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser, port=7860)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    quiet_libraries()
    try:
        check(options)
        from anygpt.serving.page import make_app  # after the check, which says in a sentence what is not installed

        engine = load_engine(options)
        with tempfile.TemporaryDirectory(prefix="anygpt-demo-") as folder:
            app = make_app(engine, Path(folder))
            print(f"Open http://{options.host}:{options.port}", flush=True)
            listen(app, options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
