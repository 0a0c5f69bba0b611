"""Publishing of folders: permissions, and uploads to the Hub."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from anygpt.errors import InputError, refusing


def let_umask_decide(place: Path) -> None:
    """Give a file, or those of a folder, the permissions that `open` would: safetensors makes them their owner's."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (place, *place.rglob("*")):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


PUSH_ARGUMENTS = ("private", "token", "revision", "commit_message", "commit_description", "create_pr")


def push(folder: str | Path, repo_id: str, *, private: bool | None = None, token: Any = None, **commit: Any) -> str:
    """Upload a folder to a model repository, created if necessary; returns the URL of the commit.

    `commit` has further arguments of `HfApi.upload_folder` (`PUSH_ARGUMENTS`). An `InputError` is raised for others, or
    if the Hub rejects the upload.
    """
    if unknown := sorted(set(commit) - set(PUSH_ARGUMENTS)):
        raise InputError(f"push_to_hub has no argument {unknown[0]!r}; it takes {', '.join(PUSH_ARGUMENTS)}")
    api, commit = HfApi(token=token), {"commit_message": "Upload composition"} | commit
    advice = "; run `hf auth login`, or give token="
    with refusing(f"{repo_id!r} cannot be written at the hub", (HfHubHTTPError, OSError), advice):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if commit.get("revision") is not None and not commit.get("create_pr"):
            api.create_branch(repo_id, branch=commit["revision"], exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **commit).commit_url)
