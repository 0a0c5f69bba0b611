#!/usr/bin/env bash
# The tests on a fresh machine: install what they need, and run them. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev

# One thread a worker: two workers with two threads each fight over two cores. Offline: no test may need a hub.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE WANDB_MODE=offline
exec .venv/bin/python -m pytest -n 2 -m "not slow" "$@"
