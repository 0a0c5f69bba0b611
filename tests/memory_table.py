"""What fits where: the memory of compositions in generation, from the shapes of their parts. Nothing is downloaded.

    python tests/memory_table.py

The parts of `configs/full/architectures.yaml` are built on torch's meta device, which holds shapes and no numbers.
Counted are the weights (16 bits each; where it says so, the language model's linear layers in 4 bits and their scales),
the projectors, and the cache of a conversation; `--working-gib` stands for what the networks compute with. With
offloading (`--offload` of chat.py, demo.py and serve.py) one network of the decoders is on the card at a time. Printed
is a table for the README.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from anygpt.decoders.projector import OutputProjector, OutputProjectorConfig
from anygpt.encoders.projector import MultimodalProjector, MultimodalProjectorConfig
from anygpt.media.types import media_type
from anygpt.model.parts import import_class

ARCHITECTURES = Path(__file__).resolve().parent.parent / "configs/full/architectures.yaml"
GIB = 2**30
CARDS = (8, 12, 16, 24, 40, 80)
"""GB as they are sold, which are GiB."""
ENCODERS = ("clip-vit-l-14", "whisper-large-v3-encoder")
DECODERS = {"image": "stable-diffusion-1.5", "video": "zeroscope-v2", "audio": "audioldm-s-full-v2"}
LANGUAGE_MODELS = ("llama-7b", "smollm2-135m")
BYTES = 2
FOUR_BITS = 0.5 + 2 / 64 + 4 / 64 / 256  # NF4 by blocks of 64 with 8-bit scales, as bitsandbytes has it, rounded up


def build(entry: dict[str, Any]) -> nn.Module:
    """One network on the meta device."""
    kind = import_class(entry["class"])
    with torch.device("meta"):
        if hasattr(kind, "from_config"):  # diffusers
            return kind.from_config(entry["config"])
        return kind(kind.config_class(**entry["config"]))


def weight_bytes(module: nn.Module, four_bits: bool = False) -> float:
    """Bytes of a network's parameters, tied ones once; `four_bits` packs linear layers other than the head."""
    head = module.get_output_embeddings() if four_bits else None
    packed = {id(m.weight) for m in module.modules() if four_bits and isinstance(m, nn.Linear) and m is not head}
    return sum(p.numel() * (FOUR_BITS if id(p) in packed else BYTES) for p in module.parameters())


def cache_bytes(config: Any, tokens: int) -> float:
    """Keys and values of all layers."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * BYTES * config.num_hidden_layers * config.num_key_value_heads * head_dim * tokens


def condition_shape(networks: dict[str, nn.Module]) -> list[int]:
    """`[T, D]` of a decoder, as its text encoder has it."""
    config = networks["text_encoder"].config
    if "vocoder" in networks:
        return [1, config.projection_dim]
    return [config.max_position_embeddings, config.hidden_size]


def projector_bytes(hidden_size: int, encoders: list[nn.Module], decoders: dict[str, dict[str, nn.Module]]) -> float:
    """Linear input projectors and the paper's output projectors; trained in 32 bits, and kept so."""
    with torch.device("meta"):
        projectors: list[nn.Module] = [
            MultimodalProjector(
                MultimodalProjectorConfig(in_features=encoder.config.hidden_size, out_features=hidden_size)
            )
            for encoder in encoders
        ]
        projectors += [
            OutputProjector(
                OutputProjectorConfig(
                    projection_type="transformer",
                    in_features=hidden_size,
                    num_signal_tokens=media_type(modality).signal_tokens,
                    condition_shape=condition_shape(networks),
                )
            )
            for modality, networks in decoders.items()
        ]
    return 4 * sum(p.numel() for projector in projectors for p in projector.parameters())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=Path, default=ARCHITECTURES, help="shapes (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the conversation (default: %(default)s)")
    parser.add_argument("--working-gib", type=float, default=3.0, help="to compute with (default: %(default)s)")
    options = parser.parse_args(arguments)
    print(table(yaml.safe_load(options.architectures.read_text()), options.tokens, options.working_gib))


def table(architectures: dict[str, Any], tokens: int, working_gib: float) -> str:
    """Two Markdown tables: the parts, and what fits where."""
    networks = {name: {part: build(entry) for part, entry in held.items()} for name, held in architectures.items()}
    lines = ["| part | parameters | GiB in 16 bits |", "|---|---|---|"]
    for name, held in networks.items():
        count = sum(p.numel() for network in held.values() for p in network.parameters())
        size = sum(map(weight_bytes, held.values())) / GIB
        lines.append(f"| {name} ({', '.join(held)}) | {count / 1e6:,.0f} M | {size:.2f} |")

    encoders = [networks[name]["encoder"] for name in ENCODERS]
    decoders = {modality: networks[name] for modality, name in DECODERS.items()}
    encoder_bytes = sum(map(weight_bytes, encoders))
    each = [weight_bytes(network) for held in decoders.values() for network in held.values()]
    lines += ["", "| language model | decoders | GiB on the card | fits |", "|---|---|---|---|"]
    for name in LANGUAGE_MODELS:
        model = networks[name]["language_model"]
        fixed = encoder_bytes + cache_bytes(model.config, tokens) + working_gib * GIB
        fixed += projector_bytes(model.config.hidden_size, encoders, decoders)
        for four_bits in (False, True):
            for offload, size in ((False, sum(each)), (True, max(each))):
                total = (fixed + weight_bytes(model, four_bits) + size) / GIB
                card = next((f"{card} GB" for card in CARDS if total <= card), f"more than {CARDS[-1]} GB")
                bits = "4 bits" if four_bits else "16 bits"
                how = "offloaded" if offload else "on the card"
                lines.append(f"| {name}, {bits} | {how} | {total:.1f} | {card} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
