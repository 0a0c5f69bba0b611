"""Convert ImageBind's published checkpoint to a `from_pretrained` folder.

    python scripts/convert_imagebind.py imagebind_huge.pth --output checkpoints/imagebind_huge

The checkpoint is the original `.pth` (read with `weights_only=True`, which refuses code) or `.safetensors`. The folder
loads with `ImageBindModel.from_pretrained` and as the `path` of an encoder in a YAML. The weights are licensed under
CC BY-NC-SA 4.0, for non-commercial use only.
"""

from __future__ import annotations

import argparse
import pickle
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from anygpt.encoders.imagebind import ImageBindConfig, ImageBindModel
from anygpt.encoders.imagebind.modeling import CARD
from anygpt.errors import InputError
from anygpt.training.cli import MISTAKE, quiet_libraries


def convert(file: Path, output: Path, config: ImageBindConfig) -> None:
    """Write the folder, completely or not at all.

    Raises:
        InputError: the file is no state dict of this ImageBind, or the output exists.
    """
    if output.exists():
        raise InputError(f"--output {output} is there already; choose another folder")
    try:
        if file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{file} cannot be read: {reason}; give the file as it was published") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise InputError(f"{file} holds no tensors by name; expected imagebind_huge.pth as it was published")
    with torch.device("meta"):
        model = ImageBindModel(config)
    model.load_original_state_dict(tensors)
    temporary = output.parent / f".{output.name}.incomplete"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        (temporary / "README.md").write_text(CARD)
        temporary.rename(output)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", type=Path, help="imagebind_huge.pth, or its tensors as .safetensors")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--config", type=Path, help="JSON of an ImageBindConfig, of a model that is not the huge one")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        config = ImageBindConfig.from_json_file(options.config) if options.config else ImageBindConfig()
        convert(options.file, options.output, config)
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return MISTAKE
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
