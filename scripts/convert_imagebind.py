"""Convert ImageBind's published checkpoint to a `from_pretrained` folder.

    python scripts/convert_imagebind.py imagebind_huge.pth --output checkpoints/imagebind_huge

The checkpoint is the original `.pth` (read with `weights_only=True`, which refuses code) or `.safetensors`. The folder
loads with `ImageBindModel.from_pretrained` and as the `path` of an encoder in a YAML. The weights are licensed under
CC BY-NC-SA 4.0, for non-commercial use only.
"""

from pathlib import Path

from anygpt.commands import execute, new_parser
from anygpt.encoders.imagebind import ImageBindConfig, ImageBindModel
from anygpt.encoders.imagebind.modeling import CARD
from anygpt.errors import InputError, reading, refusing
from anygpt.media.writing import replacing
from anygpt.parts.files import read_pickle

import torch
from safetensors.torch import load_file


def convert(arguments: list[str]) -> None:
    parser = new_parser(None, __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("file", type=Path, nargs="?", help="imagebind_huge.pth, or its tensors as .safetensors")
    source.add_argument("--untrained", action="store_true", help="random weights, for stage 0 to train")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--config", type=Path, help="JSON of an ImageBindConfig, for a model other than the huge one")
    options = parser.parse_args(arguments)
    file, output = options.file, options.output
    if output.exists():
        raise InputError(f"--output {output} already exists; choose another folder")
    config = ImageBindConfig.from_json_file(options.config) if options.config else ImageBindConfig()
    if options.untrained:
        ImageBindModel(config).save_pretrained(output)
        return
    with reading(file):
        tensors = load_file(file) if file.suffix == ".safetensors" else read_pickle(file)
    with torch.device("meta"):
        model = ImageBindModel(config)
    model.load_original_state_dict(tensors)
    with refusing(f"--output {output} cannot be written", (OSError,)), replacing(output) as temporary:
        model.save_pretrained(temporary)
        (temporary / "README.md").write_text(CARD)
    print(output)


if __name__ == "__main__":
    raise SystemExit(execute(convert))
