"""`anygpt trace-shapes` from a checkout (`--help` says what it does)."""

from anygpt.commands import run

if __name__ == "__main__":
    raise SystemExit(run("trace-shapes"))
