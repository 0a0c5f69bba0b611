"""What a run was made with: settings, the code's commit, package versions and the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator

GIB = 2**30
PACKAGES = ("anygpt", "torch", "transformers", "diffusers", "peft", "accelerate", "safetensors", "datasets", "numpy")


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Commit, versions and hardware, for `environment.json` and the tracker."""
    return {
        "git": git_state(Path(__file__).resolve().parent),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()},
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "distributed": str(accelerator.distributed_type.value),
        "processes": accelerator.num_processes,
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and branch of the code, and the files that differ from the commit; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD").strip(),
            "changed": [line[3:] for line in git("status", "--porcelain").splitlines()],
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory_in_use(device: torch.device) -> float:
    """GiB: the accelerator's peak, or what the process has in memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return psutil.Process().memory_info().rss / GIB
