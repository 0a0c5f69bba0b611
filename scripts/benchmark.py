"""`anygpt benchmark` from a checkout (`--help` says what it does)."""

from functools import partial

from anygpt.commands import run

main = partial(run, "benchmark")

if __name__ == "__main__":
    raise SystemExit(main())
