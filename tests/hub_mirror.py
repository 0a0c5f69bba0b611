"""A mirror of the hub for tests: an HF cache with every repository that a shipped YAML names.

Each repository has its real layout: names of files, shards, weights that exist as `.bin` only, variants, whole models
around the part that we want, the tensor names of the time when it was uploaded, tokenizer files without a chat template
for Vicuna. Sizes are `tiny`, or `real` as in the repositories' own configs; the weights random, or `hollow`: files of
the real length whose headers are right and whose numbers are holes, which take no room on the disk.

    python tests/hub_mirror.py FOLDER [ID …] [--real] [--hollow]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

from anygpt.encoders.imagebind import ImageBindConfig, ImageBindModel
from anygpt.encoders.imagebind.modeling import MASK

COMMIT = hashlib.sha1(b"mirror").hexdigest()
CHARACTERS = [chr(code) for code in range(33, 127)]
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
_VARIANTS = {".fp16": torch.float16, ".bf16": torch.bfloat16}


class Repository:
    """A repository's snapshot in a cache."""

    def __init__(self, cache: Path, name: str, real: bool, hollow: bool):
        place = cache / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text(COMMIT)
        self.folder, self.real, self.hollow = place / "snapshots" / COMMIT, real, hollow
        self.folder.mkdir(parents=True)

    def size(self, real: Mapping[str, Any], **tiny: Any) -> dict[str, Any]:
        """Settings of a config: the real ones, or those with what is tiny in their place."""
        return dict(real) if self.real else dict(real) | tiny

    def path(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def text(self, name: str, content: str) -> None:
        self.path(name).write_text(content)

    def json(self, name: str, content: Any) -> None:
        self.text(name, json.dumps(content, indent=2))

    def build(self, cls: type, config: Any) -> nn.Module:
        """A network, in float16 and where it needs no numbers without them."""
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16 if self.real else torch.float32)
        try:
            with torch.device("meta") if self.hollow else contextlib.nullcontext():
                if isinstance(config, Mapping):  # diffusers
                    return cls.from_config(config)
                return cls(config)
        finally:
            torch.set_default_dtype(dtype)

    def network(
        self,
        subfolder: str,
        network: nn.Module,
        files: Iterable[str],
        rename: Callable[[str], str] = str,
        extra: Mapping[str, Tensor] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """A network's config and its weights as each of `files`; one with a `*` is two shards and their index."""
        at = f"{subfolder}/" if subfolder else ""
        state = network.state_dict()
        if isinstance(network, transformers.PreTrainedModel):
            tied = getattr(network, "all_tied_weights_keys", None) or {}
            state = revert_weight_conversion(network, {k: v for k, v in state.items() if k not in tied})
            settings = network.config.to_dict()
            settings["architectures"] = [type(network).__name__]
            settings.pop("dtype", None)
        elif hasattr(network, "config"):
            settings = {k: v for k, v in network.config.items() if not k.startswith("_")}
            settings = {"_class_name": type(network).__name__, "_diffusers_version": "0.15.0"} | settings
        else:
            settings = {}
        self.json(f"{at}config.json", settings if config is None else config)
        state = {rename(name): tensor for name, tensor in state.items()} | dict(extra or {})
        for file in files:
            narrow = next((dtype for mark, dtype in _VARIANTS.items() if mark in file), None)
            found = {k: v.to(narrow) if narrow and v.is_floating_point() else v for k, v in state.items()}
            if "*" in file:
                self.shards(f"{at}{file}", found)
            else:
                self.tensors(f"{at}{file}", found)

    def shards(self, pattern: str, state: dict[str, Tensor]) -> None:
        names = list(state)
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": {}}
        for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
            file = pattern.replace("*", f"{number:05d}-of-00002")
            self.tensors(file, {name: state[name] for name in part})
            index["weight_map"] |= dict.fromkeys(part, Path(file).name)
        stem, suffix = pattern.split("-*")
        stem, mark, variant = stem.partition(".")
        self.json(f"{stem}{suffix}.index{mark}{variant}.json", index)

    def tensors(self, name: str, state: dict[str, Tensor]) -> None:
        path = self.path(name)
        if path.suffix == ".bin":
            # with no numbers to write, torch leaves room for them
            skip = torch.serialization.skip_data() if self.hollow else contextlib.nullcontext()
            with skip:
                state = {k: torch.empty_like(v, device="cpu") if self.hollow else v for k, v in state.items()}
                torch.save(state, path)
        elif not self.hollow:
            save_file({k: v.contiguous().clone() for k, v in state.items()}, path, metadata={"format": "pt"})
        else:
            _write_hollow(path, state)


def _write_hollow(path: Path, state: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in state.items():
        end = at + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + at)


# --------------------------------------------------------------------------------------------------- tokenizers


def clip_tokenizer(repository: Repository, folder: str, length: int) -> None:
    """The files of a time before `tokenizer.json`."""
    words = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    repository.json(f"{folder}vocab.json", {word: i for i, word in enumerate(words)})
    repository.text(f"{folder}merges.txt", "#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    repository.json(f"{folder}special_tokens_map.json", special | {"pad_token": "<|endoftext|>"})
    repository.json(
        f"{folder}tokenizer_config.json",
        special | {"pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer", "model_max_length": length},
    )


CLIP_WORDS = 2 * len(CHARACTERS) + 2


def roberta_tokenizer(repository: Repository, folder: str, length: int) -> None:
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *CHARACTERS]
    repository.json(f"{folder}vocab.json", {word: i for i, word in enumerate(words)})
    repository.text(f"{folder}merges.txt", "#version: 0.2\n")
    names = ("bos", "pad", "eos", "unk", "mask")
    special = {f"{name}_token": word for name, word in zip(names, words, strict=False)}
    repository.json(f"{folder}special_tokens_map.json", special)
    settings = {"tokenizer_class": "RobertaTokenizer", "model_max_length": length, "add_prefix_space": False}
    repository.json(f"{folder}tokenizer_config.json", special | settings)


ROBERTA_WORDS = len(CHARACTERS) + 6


def llama_tokenizer(repository: Repository) -> int:
    """`tokenizer.model` of sentencepiece alone, and no chat template; returns how many pieces it has."""
    import io

    import sentencepiece

    words = " ".join("".join(c) for c in zip(CHARACTERS, reversed(CHARACTERS), strict=True))
    lines = [
        words,
        "the quick brown fox jumps over the lazy dog",
        "USER: what is this? ASSISTANT: a picture of it",
    ] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    repository.path("tokenizer.model").write_bytes(model.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    repository.json("special_tokens_map.json", special)
    settings = {"add_bos_token": True, "add_eos_token": False, "legacy": False, "model_max_length": 4096}
    settings |= {"tokenizer_class": "LlamaTokenizer", "clean_up_tokenization_spaces": False, "sp_model_kwargs": {}}
    repository.json("tokenizer_config.json", settings | special)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def smollm_tokenizer(repository: Repository) -> int:
    from anygpt.parts.source import Source  # the zoo's tokenizer under other special tokens

    tokenizer = AutoTokenizer.from_pretrained(Source("zoo:language_model").folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(repository.folder)
    for file in repository.folder.glob("chat_template*"):
        file.unlink()
    settings = json.loads((repository.folder / "tokenizer_config.json").read_text())
    repository.json("tokenizer_config.json", settings | {"chat_template": CHATML})
    return len(tokenizer)


# ------------------------------------------------------------------------------------------------- repositories

_TINY_LLM = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_TINY_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


def vicuna(repository: Repository) -> None:
    words = llama_tokenizer(repository)
    config = transformers.LlamaConfig(
        **repository.size(
            {
                "vocab_size": 32000,
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "pad_token_id": 0,
            },
            vocab_size=words,
            **_TINY_LLM,
        )
    )
    network = repository.build(transformers.LlamaForCausalLM, config)
    head = config.hidden_size // config.num_attention_heads
    frequencies = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(head // 2)
        for i in range(config.num_hidden_layers)
    }
    repository.network("", network, ["pytorch_model-*.bin"], extra=frequencies)
    repository.json("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})


def smollm2(repository: Repository) -> None:
    words = smollm_tokenizer(repository)
    config = transformers.LlamaConfig(
        **repository.size(
            {
                "vocab_size": 49152,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "max_position_embeddings": 8192,
                "tie_word_embeddings": True,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 2,
            },
            vocab_size=words,
            **_TINY_LLM,
        )
    )
    repository.network("", repository.build(transformers.LlamaForCausalLM, config), ["model.safetensors"])
    repository.json("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})


def clip_large_336(repository: Repository) -> None:
    config = transformers.CLIPConfig(
        vision_config=repository.size(
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            },
            **_TINY_TOWER,
            patch_size=112,
        ),
        text_config=repository.size(
            {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
            **_TINY_TOWER,
            vocab_size=CLIP_WORDS,
        ),
        projection_dim=768 if repository.real else 8,
    )
    positions = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.position_ids": torch.arange(577 if repository.real else 10)[None],
    }
    network = repository.build(transformers.CLIPModel, config)
    repository.network("", network, ["pytorch_model.bin"], extra=positions)
    repository.json("preprocessor_config.json", _clip_preprocessing(336))
    clip_tokenizer(repository, "", 77)


def _clip_preprocessing(size: int) -> dict[str, Any]:
    return {
        "crop_size": size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": size,
    }


def siglip_base(repository: Repository) -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = transformers.SiglipConfig(
        vision_config=repository.size(sizes | {"image_size": 224, "patch_size": 16}, **_TINY_TOWER, patch_size=112),
        text_config=repository.size(sizes | {"vocab_size": 32000}, **_TINY_TOWER, vocab_size=64),
    )
    repository.network("", repository.build(transformers.SiglipModel, config), ["model.safetensors"])
    repository.json(
        "preprocessor_config.json",
        {
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "SiglipProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": 224, "width": 224},
        },
    )


def whisper_tiny(repository: Repository) -> None:
    config = transformers.WhisperConfig(
        **repository.size(
            {
                "vocab_size": 51865,
                "d_model": 384,
                "encoder_layers": 4,
                "encoder_attention_heads": 6,
                "decoder_layers": 4,
                "decoder_attention_heads": 6,
                "encoder_ffn_dim": 1536,
                "decoder_ffn_dim": 1536,
            },
            vocab_size=64,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_source_positions=50,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        )
    )
    network = repository.build(transformers.WhisperForConditionalGeneration, config)
    repository.network("", network, ["model.safetensors", "pytorch_model.bin"])
    repository.json(
        "preprocessor_config.json",
        {
            "chunk_length": 30 if repository.real else 1,
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": 80,
            "hop_length": 160,
            "n_fft": 400,
            "n_samples": 480000 if repository.real else 16000,
            "nb_max_frames": 3000 if repository.real else 100,
            "padding_side": "right",
            "padding_value": 0.0,
            "processor_class": "WhisperProcessor",
            "return_attention_mask": False,
            "sampling_rate": 16000,
        },
    )


def imagebind_huge(repository: Repository) -> None:
    """The original class behind the hub's mixin: its constructor's arguments as config, its own tensor names."""
    towers = ("vision", "text", "audio", "depth", "thermal", "imu")
    tiny = {f"{tower}_{name}": size for tower in towers for name, size in _IMAGEBIND_TOWER.items()}
    tiny |= {"kernel_size": [2, 56, 56], "audio_kernel_size": 32, "audio_stride": 32, "out_embed_dim": 24}
    config = ImageBindConfig(**repository.size({}, **tiny))
    names = [n for n in vars(config) if n.split("_")[0] in (*towers, "kernel", "out") or n == "video_frames"]
    arguments = {name: getattr(config, name) for name in names} | {"audio_drop_path": 0.1, "imu_drop_path": 0.7}
    mask = {MASK: torch.full((77, 77), float("-inf")).triu(1)}
    network = repository.build(ImageBindModel, config)
    repository.network("", network, ["model.safetensors"], extra=mask, config=arguments)


_IMAGEBIND_TOWER = {"embed_dim": 16, "num_blocks": 2, "num_heads": 2}


# ---------------------------------------------------------------------------------------------------- pipelines

_CLIP_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_BETAS = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000}
_BETAS |= {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}


def _old_attention(name: str) -> str:
    """How diffusers called a VAE's attention before 0.17."""
    if "mid_block.attentions" not in name:
        return name
    for new, old in (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")):
        name = name.replace(new, old)
    return name


def _vae(repository: Repository, channels: int, latents: int, widths: list[int], **settings: Any) -> nn.Module:
    widths = widths if repository.real else [8, 16]
    config = {
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": 2,
        "latent_channels": latents,
        "norm_num_groups": 32 if repository.real else 4,
    }
    return repository.build(diffusers.AutoencoderKL, config | settings)


def _clip_text(repository: Repository, real: Mapping[str, Any], files: list[str], width: int) -> None:
    config = transformers.CLIPTextConfig(
        **repository.size(
            {**real, "vocab_size": 49408, "pad_token_id": 1},
            vocab_size=CLIP_WORDS,
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=CLIP_WORDS - 2,
            eos_token_id=CLIP_WORDS - 1,
        )
    )
    network = repository.build(transformers.CLIPTextModel, config)
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    repository.network("text_encoder", network, files, _under_text_model, positions)
    clip_tokenizer(repository, "tokenizer/", 77)


def _under_text_model(name: str) -> str:
    return name if name.startswith("text_model.") else f"text_model.{name}"


def _unet(repository: Repository, cls: type, real: Mapping[str, Any], **tiny: Any) -> nn.Module:
    small = {"sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    return repository.build(cls, repository.size(real, **small, **tiny))


def stable_diffusion(repository: Repository) -> None:
    def both(stem: str) -> list[str]:
        old = stem.replace("model", "pytorch_model") if stem == "model" else stem
        return [f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{old}.bin", f"{old}.fp16.bin"][: 2 * small or 1]

    small = not repository.real  # of the real size, one file each is enough
    transformer, diffuser = both("model"), both("diffusion_pytorch_model")
    if repository.real:
        transformer, diffuser = ["model.fp16.safetensors"], ["diffusion_pytorch_model.fp16.safetensors"]
    unet = _unet(
        repository,
        diffusers.UNet2DConditionModel,
        {
            "sample_size": 64,
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    )
    repository.network("unet", unet, diffuser)
    repository.network("vae", _vae(repository, 3, 4, [128, 256, 512, 512]), diffuser, _old_attention)
    _clip_text(repository, _CLIP_TEXT, transformer, 32)
    checker = diffusers.pipelines.stable_diffusion.StableDiffusionSafetyChecker
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = transformers.CLIPConfig(
        vision_config=repository.size(vision | {"patch_size": 14}, **_TINY_TOWER, patch_size=112),
        text_config=repository.size({}, **_TINY_TOWER),
        projection_dim=768 if repository.real else 8,
    )
    positions = {"vision_model.vision_model.embeddings.position_ids": torch.arange(257 if repository.real else 5)[None]}

    def inner(name: str) -> str:
        nested = name.startswith("vision_model.") and not name.startswith("vision_model.vision_model.")
        return f"vision_model.{name}" if nested else name

    repository.network("safety_checker", repository.build(checker, config), transformer, inner, positions)
    repository.json("feature_extractor/preprocessor_config.json", _clip_preprocessing(224))
    scheduler = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **_BETAS, "trained_betas": None}
    repository.json("scheduler/scheduler_config.json", scheduler)
    repository.json(
        "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.6.0",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def zeroscope(repository: Repository) -> None:
    """U-Net and VAE as `.bin` alone."""
    unet = _unet(
        repository,
        diffusers.UNet3DConditionModel,
        {
            "sample_size": 32,
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 1024,
            "attention_head_dim": 64,
        },
        cross_attention_dim=24,
        attention_head_dim=4,
        down_block_types=["CrossAttnDownBlock3D", "DownBlock3D"],
        up_block_types=["UpBlock3D", "CrossAttnUpBlock3D"],
    )
    repository.network("unet", unet, ["diffusion_pytorch_model.bin"])
    repository.network("vae", _vae(repository, 3, 4, [128, 256, 512, 512]), ["diffusion_pytorch_model.bin"])
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    _clip_text(repository, text | {"hidden_act": "gelu", "projection_dim": 512}, ["pytorch_model.bin"], 24)
    scheduler = {"_class_name": "DDIMScheduler", "_diffusers_version": "0.17.0.dev0", **_BETAS}
    repository.json("scheduler/scheduler_config.json", scheduler | {"prediction_type": "epsilon"})
    repository.json(
        "model_index.json",
        {
            "_class_name": "TextToVideoSDPipeline",
            "_diffusers_version": "0.17.0.dev0",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet3DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def audioldm(repository: Repository) -> None:
    text = transformers.ClapTextConfig(
        **repository.size(
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 512},
            vocab_size=ROBERTA_WORDS,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=20,
        )
    )
    network = repository.build(transformers.ClapTextModelWithProjection, text)
    positions = {"text_model.embeddings.position_ids": torch.arange(514)[None]}
    weights = ["model.safetensors"] if repository.real else ["model.safetensors", "pytorch_model.bin"]
    repository.network("text_encoder", network, weights, extra=positions)
    roberta_tokenizer(repository, "tokenizer/", 512)
    widths = [128, 256, 384, 640]
    unet = _unet(
        repository,
        diffusers.UNet2DConditionModel,
        {
            "sample_size": 128,
            "in_channels": 8,
            "out_channels": 8,
            "block_out_channels": widths,
            "cross_attention_dim": widths,
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
            "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
            "attention_head_dim": 32,
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 512,
            "class_embeddings_concat": True,
        },
        cross_attention_dim=[8, 16],
        attention_head_dim=4,
        projection_class_embeddings_input_dim=20,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    )
    stem = "diffusion_pytorch_model"
    files = [f"{stem}.safetensors"] if repository.real else [f"{stem}.safetensors", f"{stem}.bin"]
    repository.network("unet", unet, files)
    vae = _vae(repository, 1, 8, [128, 256, 512], scaling_factor=0.9227914214134216)
    repository.network("vae", vae, files, _old_attention)
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=64,
        sampling_rate=16000,
        upsample_initial_channel=1024 if repository.real else 32,
        upsample_rates=[5, 4, 2, 2, 2],
        upsample_kernel_sizes=[16, 16, 8, 4, 4],
        normalize_before=False,
    )
    repository.network("vocoder", repository.build(transformers.SpeechT5HifiGan, vocoder), weights)
    scheduler = {"_class_name": "DDIMScheduler", "_diffusers_version": "0.15.0.dev0", **_BETAS}
    scheduler |= {"beta_start": 0.0015, "beta_end": 0.0195, "prediction_type": "epsilon"}
    repository.json("scheduler/scheduler_config.json", scheduler)
    repository.json(
        "model_index.json",
        {
            "_class_name": "AudioLDMPipeline",
            "_diffusers_version": "0.15.0.dev0",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "ClapTextModelWithProjection"],
            "tokenizer": ["transformers", "RobertaTokenizerFast"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "vocoder": ["transformers", "SpeechT5HifiGan"],
        },
    )


def amused(repository: Repository) -> None:
    """Only the network that is named; the pipeline's others are not read."""
    sizes = repository.size(
        {
            "block_out_channels": [128, 256, 256, 512, 768],
            "layers_per_block": 2,
            "latent_channels": 64,
            "num_vq_embeddings": 8192,
            "norm_num_groups": 32,
        },
        block_out_channels=[4] * 5,
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=2,
    )
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 5, "up_block_types": ["UpDecoderBlock2D"] * 5}
    fixed = {"sample_size": 256, "lookup_from_codebook": True, "force_upcast": True, "mid_block_add_attention": False}
    network = repository.build(diffusers.VQModel, sizes | blocks | fixed)
    repository.network("vqvae", network, ["diffusion_pytorch_model.safetensors"])


def mimi(repository: Repository) -> None:
    config = transformers.MimiConfig(
        **repository.size(
            {},
            hidden_size=16,
            num_filters=2,
            codebook_dim=4,
            codebook_size=16,
            vector_quantization_hidden_dimension=4,
            num_quantizers=8,
            upsample_groups=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=16,
        )
    )
    repository.network("", repository.build(transformers.MimiModel, config), ["model.safetensors"])
    settings = {"feature_extractor_type": "EncodecFeatureExtractor", "sampling_rate": 24000, "feature_size": 1}
    repository.json("preprocessor_config.json", settings)


def emu3(repository: Repository) -> None:
    text = repository.size(
        {"vocab_size": 184622, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **_TINY_LLM,
    )
    vq = repository.size(
        {}, base_channels=32, channel_multiplier=[1, 1, 1, 1], num_res_blocks=1, hidden_size=32, codebook_size=16
    )
    codes = 16 if not repository.real else 32768
    words = {f"<|visual token {i:06d}|>": text["vocab_size"] - codes + i for i in range(codes)}
    words |= {"<image>": 3, "<|extra_200|>": 4}
    config = transformers.Emu3Config(text_config=text, vq_config=vq, vocabulary_map=words)
    network = repository.build(transformers.Emu3ForConditionalGeneration, config)
    repository.network("", network, ["model-*.safetensors"])
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    repository.json("preprocessor_config.json", pixels | {"image_processor_type": "Emu3ImageProcessor"})


REPOSITORIES: dict[str, Callable[[Repository], None]] = {
    "lmsys/vicuna-7b-v1.5": vicuna,
    "HuggingFaceTB/SmolLM2-135M-Instruct": smollm2,
    "nielsr/imagebind-huge": imagebind_huge,
    "openai/clip-vit-large-patch14-336": clip_large_336,
    "google/siglip-base-patch16-224": siglip_base,
    "openai/whisper-tiny": whisper_tiny,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
    "cerspense/zeroscope_v2_576w": zeroscope,
    "cvssp/audioldm-s-full-v2": audioldm,
    "amused/amused-256": amused,
    "kyutai/mimi": mimi,
    "BAAI/Emu3-Gen-hf": emu3,
}


def make_mirror(cache: Path, ids: Iterable[str] = REPOSITORIES, real: bool = False, hollow: bool = False) -> None:
    """Write a cache as `HF_HUB_CACHE` names one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in ids:
            REPOSITORIES[name](Repository(cache, name, real, hollow))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("ids", nargs="*", help="repositories (default: all)")
    parser.add_argument("--real", action="store_true", help="real sizes")
    parser.add_argument("--hollow", action="store_true", help="no numbers")
    options = parser.parse_args()
    make_mirror(options.folder, options.ids or REPOSITORIES, options.real, options.hollow)
    sys.exit(0)
