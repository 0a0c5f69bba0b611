"""Shared by benchmarks: parts with random weights (SmolLM2-135M, ViT-B/16, Stable Diffusion 1.5), data, a loop."""

import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anygpt import load_tokenizer
from anygpt.commands.cache_features import STAGES
from anygpt.sequence.merging import IGNORE
from anygpt.toyworld import part_path
from anygpt.training import trainer
from anygpt.training.config import parse_config

import numpy as np
import torch
import transformers
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP = 2  # steps
LINE = re.compile(r"update (\d+)  (.*)")
PREAMBLE = "A person asks for a picture, and the answer is one that shows what was said: its shape and its colour."
LOGGED = ("data_share", "forward_share", "backward_share", "optimizer_share", "MFU", "memory_gib")
timer = time.perf_counter  # `--cpu-seconds` makes it `time.process_time`


def clock() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return timer()


def seconds(work: Callable[[], Any], repeats: int, warm_up: int = 1) -> float:
    """Median seconds of `work`, after warm-up calls."""
    times = []
    for _ in range(warm_up + repeats):
        begin = clock()
        work()
        times.append(clock() - begin)
    return statistics.median(times[warm_up:])


def smollm2(vocabulary: int = 49152) -> transformers.LlamaConfig:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    return transformers.LlamaConfig(vocab_size=vocabulary, **sizes, **heads, tie_word_embeddings=True)


def vit() -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(**BASE, image_size=224, patch_size=16)


def make_pipeline(latents: int, width: int = 1) -> StableDiffusionPipeline:
    """The pipeline, for latents of that height and in quarters of the width (Stable Diffusion 1.5 has 64 and 4)."""
    source = part_path("image_decoder") / "tokenizer"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(source, model_max_length=77)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = transformers.CLIPTextConfig(vocab_size=len(tokenizer), **BASE, max_position_embeddings=77, **special)
    unet = UNet2DConditionModel(
        sample_size=latents,
        block_out_channels=tuple(width * channels for channels in (80, 160, 320, 320)),
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        block_out_channels=tuple(width * channels for channels in (32, 64, 128, 128)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False, steps_offset=1)
    parts = {"vae": vae, "text_encoder": transformers.CLIPTextModel(text), "tokenizer": tokenizer, "unet": unet}
    no_checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, scheduler=scheduler, **no_checker)


def write_parts(
    folder: Path, *names: str, llm: Any = None, vision: Any = None, latents: int = 16, width: int = 1
) -> Path:
    """Write parts among `language_model`, `encoders` and `decoders`, and a configuration of them; returns its path."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("zoo:language_model")
    makers = {
        "language_model": lambda: (transformers.LlamaForCausalLM(llm or smollm2()), tokenizer),
        "encoders": lambda: (transformers.CLIPVisionModel(vision or vit()), transformers.CLIPImageProcessor()),
        "decoders": lambda: (make_pipeline(latents, width),),
    }
    sections: dict[str, Any] = {}
    for name in names:
        for part in makers[name]():
            part.save_pretrained(folder / name)
        entry = {"path": str(folder / name)}
        sections[name] = entry if name == "language_model" else {"image": entry}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"model": sections}))
    return path


def write_photographs(path: Path, count: int, asked_for: bool) -> Path:
    """Write rows with a JPEG of 512 × 384: the target, asked for in about 60 tokens as with Vicuna, or the input."""
    draw, rows = np.random.default_rng(0), []
    for i in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), np.uint8))
        coarse.resize((512, 384), Image.Resampling.BICUBIC).save(path.parent / f"{i}.jpg", quality=90)
        picture = {"type": "image", "path": f"{i}.jpg"}
        caption = f"a {'red' if i % 2 else 'blue'} thing of the kind {i}"
        asked, said = [picture, {"type": "text", "text": "What is it?"}], [{"type": "text", "text": caption}]
        if asked_for:
            asked, said = [{"type": "text", "text": f"{PREAMBLE} Make {caption}"}], [picture | {"caption": caption}]
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_log(folder: Path) -> dict[int, dict[str, float]]:
    """Logged values of a run by update."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "log.txt").read_text().splitlines():
        if match := LINE.fullmatch(line):
            pairs = (pair.rsplit(" ", 1) for pair in match[2].split("  "))
            found.setdefault(int(match[1]), {}).update({name: float(value) for name, value in pairs})
    return found


def run_stage(number: int, folder: Path, settings: Sequence[str], steps: int) -> dict[str, float]:
    """Run a stage as users do, after writing the feature cache if `data.cache_dir` is among the settings.

    Returns medians of what is logged and of an update's time, label tokens per second, and the first loss.
    """
    starts, labels = [], []

    class Watched(trainer.Trainer):
        def step(self, micro_batches: list[Any]) -> Any:
            starts.append(clock())
            labels.append(sum(int((batch["labels"] != IGNORE).sum()) for batch, _ in micro_batches))
            return super().step(micro_batches)

    settings = [*settings, f"--run.output_dir={folder / 'run'}", f"--train.max_steps={WARM_UP + steps + 1}"]
    settings += ["--train.warmup_steps=0", "--train.log_steps=1"]
    if any(setting.startswith("--data.cache_dir=") for setting in settings):
        command = [sys.executable, "-m", "anygpt", "cache-features", f"--stage={number}", *settings]
        subprocess.run(command, check=True, stdout=sys.stderr)
    trainer.Trainer = Watched  # type: ignore[misc]
    trainer.train(parse_config(settings), STAGES[str(number)])
    log = list(read_log(folder / "run").values())
    logged = {name: statistics.median(update[name] for update in log[WARM_UP:]) for name in LOGGED}
    return {
        "step_s": statistics.median(b - a for a, b in itertools.pairwise(starts[WARM_UP:])),
        **logged,
        "loop_share": 1 - sum(value for name, value in logged.items() if name.endswith("_share")),
        "labels/s": sum(labels[WARM_UP:-1]) / (starts[-1] - starts[WARM_UP]),
        "first loss": log[0]["loss"],
    }
