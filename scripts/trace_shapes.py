"""`anygpt trace-shapes` from a checkout (`--help` says what it does)."""

from functools import partial

from anygpt.commands import run

main = partial(run, "trace-shapes")

if __name__ == "__main__":
    raise SystemExit(main())
