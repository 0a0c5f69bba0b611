"""`anygpt demo` from a checkout (`--help` says what it does)."""

from functools import partial

from anygpt.commands import run

main = partial(run, "demo")

if __name__ == "__main__":
    raise SystemExit(main())
