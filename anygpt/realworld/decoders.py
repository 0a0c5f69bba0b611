"""Decoders of pictures, clips and sounds, whose text encoder is MiniLM: untrained ones for stage 0, and trained ones.

    python -m anygpt.realworld.decoders grow runs/real/image_denoiser/parts/image_decoder runs/real/untrained_video
    python -m anygpt.realworld.decoders keep runs/real/*_denoiser/parts/*_decoder

The first writes a denoiser of clips that starts from the trained one of pictures. The second stores what stage 0 has
trained in `weights/`, in half precision and without MiniLM, from which `python -m anygpt.realworld` makes decoders.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from transformers import (
    AutoTokenizer,
    BertModel,
    ClapTextConfig,
    ClapTextModelWithProjection,
    PreTrainedTokenizerBase,
)

from anygpt.commands import execute
from anygpt.decoders.base import load_decoder
from anygpt.decoders.pipelines import find_pipeline
from anygpt.errors import InputError
from anygpt.media.writing import replacing
from anygpt.parts.publishing import halve, let_umask_decide

TRAINED = Path(__file__).parent / "weights"
"""What stage 0 has trained, a folder for each decoder; part of a checkout, not of the wheel."""
CONDITION_TOKENS = 12
"""Length of a decoder's text encoding, start and end tokens included; only one of the emoji's names is longer."""
HEAD_WIDTH = 16
"""Width of an attention head, the same in all blocks, since a denoiser of clips cannot be configured otherwise."""
_SCALE = 256.0


def load_tokenizer(sentence_encoder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(sentence_encoder)
    tokenizer.model_max_length = CONDITION_TOKENS
    return tokenizer


def bert_text_encoder(sentence_encoder: Path) -> BertModel:
    """MiniLM as Stable Diffusion's and Zeroscope's text encoder."""
    bert = BertModel.from_pretrained(sentence_encoder)
    bert.config.use_attention_mask = True  # read by diffusers, which otherwise lets words attend to padding
    return bert.eval()


@torch.no_grad()
def clap_text_encoder(sentence_encoder: Path) -> ClapTextModelWithProjection:
    """MiniLM as AudioLDM's text encoder: `text_embeds` `(B, 384)` are BERT's last states of the first token, `[CLS]`.

    CLAP's network is RoBERTa, so BERT's position p is its position p + 1, after that of padding. Its pooler's tanh
    hardly changes small values, and so is taken of x / 256.
    """
    bert = BertModel.from_pretrained(sentence_encoder)
    config, width = bert.config, bert.config.hidden_size
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    names += ("type_vocab_size", "layer_norm_eps", "pad_token_id")
    clap = ClapTextModelWithProjection(
        ClapTextConfig(
            **{name: getattr(config, name) for name in names},
            max_position_embeddings=config.max_position_embeddings + 1,
            projection_dim=width,
            projection_hidden_act="linear",
        )
    )
    state = {f"text_model.{name}": tensor for name, tensor in bert.state_dict().items()}
    positions = state["text_model.embeddings.position_embeddings.weight"]
    state["text_model.embeddings.position_embeddings.weight"] = torch.cat([torch.zeros_like(positions[:1]), positions])
    identity, zero = torch.eye(width), torch.zeros(width)
    state |= {
        "text_model.pooler.dense.weight": identity / _SCALE,
        "text_model.pooler.dense.bias": zero,
        "text_projection.linear1.weight": identity * _SCALE,
        "text_projection.linear1.bias": zero,
        "text_projection.linear2.weight": identity,
        "text_projection.linear2.bias": zero,
    }
    clap.load_state_dict(clap.state_dict() | state)  # which adds the buffers of CLAP's embeddings
    return clap.eval()


TEXT_ENCODERS = {"image": bert_text_encoder, "video": bert_text_encoder, "audio": clap_text_encoder}


def write_untrained_decoder(kind: str, sentence_encoder: Path, target: Path, seed: int = 0) -> None:
    """Write the zoo's decoder with MiniLM as its text encoder and a larger denoiser of random weights.

    The Stable Diffusion pipeline (`image`) makes 64 × 64 pictures from MiniLM's states, the AudioLDM pipeline (`audio`)
    2.56 s at 16 kHz from its state of the first token. VAE and vocoder have learned ToyWorld's shapes and tones.
    """
    start, text_encoder = load_decoder(f"zoo:{kind}_decoder").pipeline, TEXT_ENCODERS[kind](sentence_encoder)
    width, options = text_encoder.config.hidden_size, {}
    if kind == "image":
        heads = (64 // HEAD_WIDTH, 128 // HEAD_WIDTH)  # called attention_head_dim by diffusers
        sizes = {"block_out_channels": (64, 128), "attention_head_dim": heads, "cross_attention_dim": width}
        sizes |= {"sample_size": 8}
        options = {"requires_safety_checker": False}
    else:
        sizes = {"block_out_channels": (48, 96), "cross_attention_dim": (48, 96), "sample_size": 32}  # latents of 80 ms
        sizes |= {"projection_class_embeddings_input_dim": width}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config(dict(start.unet.config) | sizes)
    parts = {"unet": unet, "tokenizer": load_tokenizer(sentence_encoder), "text_encoder": text_encoder}
    type(start)(**start.components | parts, **options).save_pretrained(target)


@torch.no_grad()
def write_video_decoder(image_decoder: Path, target: Path, seed: int = 0) -> None:
    """A Zeroscope pipeline whose denoiser is that of pictures, frame by frame, with new layers over time.

    The last of the new layers is zero, so they change nothing before they are trained (as in arXiv 2307.04725). VAE,
    text encoder and schedule are those of pictures.
    """
    start = load_decoder(str(image_decoder)).pipeline
    config, down, up = start.unet.config, "CrossAttnDownBlock3D", "CrossAttnUpBlock3D"
    names = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")
    names += ("sample_size", "norm_num_groups", "act_fn", "norm_eps")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet3DConditionModel(
            **{name: config[name] for name in names},
            attention_head_dim=HEAD_WIDTH,
            down_block_types=(down,) * len(config.block_out_channels),
            up_block_types=(up,) * len(config.block_out_channels),
        )
    for module in unet.modules():
        if isinstance(module, TransformerTemporalModel):
            module.proj_out.weight.zero_()
            module.proj_out.bias.zero_()
    own, learned = unet.state_dict(), start.unet.state_dict()
    if lost := sorted(learned.keys() - own.keys()):
        raise InputError(f"{image_decoder}: a denoiser of clips has no {lost[0]}, and {len(lost) - 1} more are left")
    unet.load_state_dict({name: learned[name].view_as(x) if name in learned else x for name, x in own.items()})
    parts = {name: start.components[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    find_pipeline("TextToVideoSDPipeline")(unet=unet, **parts).save_pretrained(target)


def keep(decoder: Path, target: Path) -> None:
    """Store a trained decoder in half precision, without its text encoder and tokenizer."""
    if not (decoder / "model_index.json").is_file():
        raise InputError(f"{decoder} is no decoder: it has no model_index.json")
    shutil.copytree(decoder, target, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    halve(target)


def write_trained_decoder(kept: Path, sentence_encoder: Path, target: Path) -> None:
    """The decoder that `keep` stored, with its text encoder."""
    shutil.copytree(kept, target, dirs_exist_ok=True)
    TEXT_ENCODERS[kept.name.removesuffix("_decoder")](sentence_encoder).save_pretrained(target / "text_encoder")
    load_tokenizer(sentence_encoder).save_pretrained(target / "tokenizer")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m anygpt.realworld.decoders", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    grow = commands.add_parser("grow", help="write a decoder of clips that starts from one of pictures")
    grow.add_argument("image_decoder", type=Path)
    grow.add_argument("target", type=Path)
    commands.add_parser("keep", help="store trained decoders").add_argument("decoders", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    if options.command == "grow":
        if options.target.exists():
            raise InputError(f"{options.target} exists; give a new folder")
        with replacing(options.target) as folder:
            write_video_decoder(options.image_decoder, folder)
            let_umask_decide(folder)
        return
    for decoder in options.decoders:
        if decoder.name not in {f"{name}_decoder" for name in TEXT_ENCODERS}:
            raise InputError(f"{decoder}: expected a folder called {'_decoder, '.join(TEXT_ENCODERS)}_decoder")
        with replacing(TRAINED / decoder.name) as folder:
            keep(decoder, folder)
            shutil.rmtree(TRAINED / decoder.name, ignore_errors=True)
        print(TRAINED / decoder.name, flush=True)


if __name__ == "__main__":
    sys.exit(execute(main))
