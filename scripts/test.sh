#!/usr/bin/env bash
# Install the tests' dependencies and run the tests; arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev

# One thread per worker, since two workers with two threads each compete for two cores. Offline, as no test may need a hub.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE WANDB_MODE=offline
exec .venv/bin/python -m pytest -n 2 --dist worksteal -m "not slow" "$@"
