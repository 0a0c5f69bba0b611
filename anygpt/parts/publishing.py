"""Publishing of folders: permissions, and uploads to the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from anygpt.errors import InputError


def let_umask_decide(folder: Path) -> None:
    """Give files the permissions that `open` would: safetensors makes them readable by their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a folder to a model repository, created if necessary; returns the URL of the commit.

    Raises:
        InputError: the Hub rejects the upload.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload composition",
            commit_description=commit_description,
            create_pr=create_pr,
        )
    except (HfHubHTTPError, OSError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"{repo_id!r} cannot be written at the hub: {reason}; run `hf auth login`, or give token="
        ) from error
    return str(commit.commit_url)
