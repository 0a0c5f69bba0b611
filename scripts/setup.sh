#!/usr/bin/env bash
# Create .venv if needed, and install this checkout into it: bash scripts/setup.sh [extra]
# Installs again only if the dependencies changed; quickstart.sh and test.sh call it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
[ -x .venv/bin/python ] || python3 -m venv .venv
stamp=".venv/.installed-${extra:-base}-$(cat pyproject.toml scripts/constraints.txt | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    echo "Installing into .venv (once; minutes on a slow network) …"
    # torch first, since its exact version determines which build pip takes
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt torch
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".${extra:+[$extra]}"
    touch "$stamp"
fi
