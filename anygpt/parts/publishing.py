"""Publishing of folders: permissions, and uploads to the Hub."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from anygpt.errors import InputError, refusing


def let_umask_decide(place: Path) -> None:
    """Give a file, or those of a folder, the permissions that `open` would: safetensors makes them their owner's."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (place, *place.rglob("*")):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def halve(folder: Path) -> None:
    """Store the float32 tensors of a folder in half precision, and take local paths out of its JSON files.

    The configs keep float32, in which the parts then load, and in which a CPU is faster.
    """
    for file in folder.rglob("*.safetensors"):
        tensors = {name: x.half() if x.dtype == torch.float32 else x for name, x in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    let_umask_decide(folder)


PUSH_ARGUMENTS = ("private", "token", "revision", "commit_message", "commit_description", "create_pr")


def check_push(options: Mapping[str, Any]) -> None:
    if unknown := sorted(set(options) - set(PUSH_ARGUMENTS)):
        raise InputError(f"push_to_hub has no argument {unknown[0]!r}; it takes {', '.join(PUSH_ARGUMENTS)}")


def push(folder: str | Path, repo_id: str, *, private: bool | None = None, token: Any = None, **commit: Any) -> str:
    """Upload a folder to a model repository, created if necessary; returns the URL of the commit.

    `commit` has further arguments of `HfApi.upload_folder` (`PUSH_ARGUMENTS`). An `InputError` is raised for others, or
    if the Hub rejects the upload.
    """
    check_push(commit)
    api, commit = HfApi(token=token), {"commit_message": "Upload composition"} | commit
    advice = "; run `hf auth login`, or give token="
    with refusing(f"{repo_id!r} cannot be written at the hub", (HfHubHTTPError, OSError), advice):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if commit.get("revision") is not None and not commit.get("create_pr"):
            api.create_branch(repo_id, branch=commit["revision"], exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **commit).commit_url)
