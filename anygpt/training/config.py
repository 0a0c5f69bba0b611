"""A run's settings: typed sections, one YAML a run, dotted overrides on the command line.

jsonargparse reads them; unknown keys are collected first, all at once, each with the nearest known one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from anygpt.data.dataset import DataSource
from anygpt.errors import InputError
from anygpt.losses.formulas import LossWeights
from anygpt.settings import find_misfits, parse_settings

# Bounds far beyond what anybody trains with: a slip of a few zeros is to be told at once, not by a full memory.
Steps = Annotated[int, Field(ge=1, le=10**9)]
Every = Annotated[int, Field(ge=0, le=10**9)]
Rows = Annotated[int, Field(ge=1, le=2**20)]
Tokens = Annotated[int, Field(ge=1, le=2**12)]
# AdamW moves a parameter by up to the rate in each update; beyond this nothing but overflow is left.
Rate = Annotated[float, Field(gt=0, le=1e3)]
WORKERS = max(64, 4 * (os.cpu_count() or 1))


@dataclass
class RunConfig:
    """Where a run writes, and how it is followed.

    Attributes:
        output_dir: folder of the run: `checkpoint-<step>/`, `final/`, `config.yaml`, `log.txt`.
        name: name of the run in the tracker; the folder's own name by default.
        project: project in the tracker.
        seed: of everything that is drawn: new tensors, data order, noise.
        tracker: where metrics go. `WANDB_MODE=offline` keeps wandb off the network.
        resume: `auto` continues from the newest checkpoint in output_dir if there is one; `never` starts over and
            removes what an earlier run left there; anything else is the path of a checkpoint to continue from.
        device: `auto`, or `cpu` to leave an accelerator alone.
    """

    output_dir: str = "runs/run"
    name: str | None = None
    project: str = "anygpt"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    resume: str = "auto"
    device: Literal["auto", "cpu"] = "auto"


@dataclass
class PartConfig:
    """A pretrained part.

    Attributes:
        path: hub id, folder, or `zoo:<name>` for a tiny part of `anygpt.toyworld`.
        revision: branch, tag or commit of a hub id.
        subfolder: folder in there that holds the part.
        variant: of the weight files (`fp16`); those without one where there are none.
        weights: `safetensors`, or `any` to read `.bin` and `.pth` files where there are none; code never runs.
        gguf_file: file of a language model in that format, to read in the place of safetensors.
        dtype: dtype to load it in (`float32`, `bfloat16`); the checkpoint's own by default, float32 for decoders.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`, …
        quantization_config: arguments of transformers' `BitsAndBytesConfig`.
    """

    path: str
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    weights: str | None = None
    gguf_file: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    quantization_config: dict[str, Any] | None = None


@dataclass
class EncoderConfig(PartConfig):
    """An encoder and its input projector.

    Attributes:
        modality: media type in the data; the key by default.
        num_frames: frames of a clip, for an image encoder under `video`.
        pool_frames: whether it gives one feature a frame, as by default, or all (see `VideoEncoder`).
        feature: what an encoder with a choice gives: `embedding` or `tokens`, of ImageBind.
        feature_layer: hidden states to read (-2 as LLaVA does); the encoder's output by default.
        drop_cls: leave the class token out.
        processor: arguments of its image processor or feature extractor (`do_center_crop: false`, `size: …`), and
            `pad_to_square: true`, as LLaVA 1.5 does.
        fit: what is done with media that do not fit into its window: `crop` (the default), `pad`, `stretch` or `tile`
            pictures; `split` (the default) or `refuse` long sounds.
        projector: arguments of `MultimodalProjectorConfig`: `projection_type` (linear, mlp, pooled, …) and its options.
    """

    modality: str | None = None
    num_frames: Tokens | None = None
    pool_frames: bool | None = None
    feature: str | None = None
    feature_layer: int | None = None
    drop_cls: bool | None = None
    processor: dict[str, Any] | None = None
    fit: str | None = None
    projector: dict[str, Any] = field(default_factory=dict)


@dataclass
class DecoderConfig(PartConfig):
    """A diffusion decoder and its output projector.

    Attributes:
        modality: media type in the data; the decoder's own by default.
        num_frames: frames of a clip, for video decoders.
        num_signal_tokens: tokens of a span; the media type's by default (the paper's: image 4, video 24, audio 8).
        hidden_layer: states that are read: -1 the last, any other index, or `mix`.
        signal: `tokens`, or `queries`: learned ones after a single trigger token.
        projector: arguments of `OutputProjectorConfig`: `projection_type` (linear, mlp, transformer, qformer),
            `d_model`, ….
        defaults: options of generation where a request names none, such as `{guidance_scale: 2,
            num_inference_steps: 20}`; the final model keeps them.
    """

    modality: str | None = None
    num_frames: Tokens | None = None
    num_signal_tokens: Tokens | None = None
    hidden_layer: int | str = -1
    signal: Literal["tokens", "queries"] = "tokens"
    projector: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelConfig:
    """The composition.

    Attributes:
        init_from: a `final/` folder to start from. Parts that are named here as well must be the same ones; parts
            that it lacks are added.
        encoders: by key, in the order in which features are prepended.
        language_model: a causal language model.
        decoders: by key.
    """

    init_from: str | None = None
    encoders: dict[str, EncoderConfig] = field(default_factory=dict)
    language_model: PartConfig | None = None
    decoders: dict[str, DecoderConfig] = field(default_factory=dict)


@dataclass
class DataConfig:
    """The data.

    Attributes:
        train: files to train on.
        eval: files to take the evaluation loss on, every `train.eval_steps`.
        cache_dir: folder of the feature cache, written by `scripts/cache_features.py` with the same settings; null for
            none.
        num_workers: processes that decode media; 0 decodes in the main one.
        in_memory: keep decoded media, in each process that decodes; for small data sets.
        on_bad_sample: `error` stops at the first sample that cannot be read; `skip` leaves it out and counts it.
        max_length: tokens of a row, those of its media included; null for any number.
        on_long_sample: of a row with more: `error` stops, `skip` leaves it out, `cut` leaves out its last turns (or all
            of it, where the first is too long); the last two are counted.
        group_by_modality: batches hold answers of one kind: text alone, images, ….
        group_by_length: batches hold rows of about one length, so that little is padded.
        pack_to: the language model reads several rows as one sequence of so many tokens; null for a row a sequence.
        max_batch_tokens: a micro-batch of a process has as many rows as make about so many tokens, padding included, in
            place of train.batch_size; null for that.
    """

    train: list[DataSource] = field(default_factory=list)
    eval: list[DataSource] = field(default_factory=list)
    cache_dir: str | None = None
    num_workers: Annotated[int, Field(ge=0, le=WORKERS)] = 0
    in_memory: bool = False
    on_bad_sample: Literal["error", "skip"] = "error"
    max_length: PositiveInt | None = None
    on_long_sample: Literal["error", "skip", "cut"] = "error"
    group_by_modality: bool = False
    group_by_length: bool = False
    pack_to: PositiveInt | None = None
    max_batch_tokens: PositiveInt | None = None


@dataclass
class TrainConfig:
    """The optimisation.

    Attributes:
        max_steps: updates. A run that is stopped or finished goes on where it was given more.
        num_epochs: passes over data.train; where it is given, `max_steps` follows from it.
        batch_size: rows of a micro-batch on one process.
        gradient_accumulation_steps: micro-batches of an update on one process.
        learning_rate: peak learning rate of AdamW.
        learning_rates: other peak rates by part: `{signal_tokens: 1e-4, language_model: 2e-4}`. A key is a part
            (`image_projector`) or a kind of them: encoder, projector, language_model (its LoRA), signal_tokens,
            output_projector, decoder.
        scheduler: how the rates fall after the warm-up.
        warmup_steps: updates of linear warm-up.
        weight_decay: of AdamW.
        max_grad_norm: the gradient is clipped to this norm.
        mixed_precision: `bf16` computes in bfloat16 and loads frozen parts in it; trained tensors stay float32.
        save_steps: a checkpoint every so many updates; 0 writes none before the end.
        keep_checkpoints: older ones are removed beyond this number.
        keep_best: a metric, such as `eval/loss`; the checkpoint at which it was lowest is kept as well. As
            `max:captions/cider` it is the one at which it was highest.
        abort_above: bounds by metric, such as `{eval/loss: 20}`; the run stops where one is above its bound.
        eval_steps: the evaluation loss every so many updates; 0 never.
        eval_suite: a suite file of `anygpt evaluate`, run every `eval_steps`: `{suite}/{metric}` are metrics too.
        log_steps: metrics every so many updates.
        sample_steps: answers to the first rows of data.eval, media included, every so many updates; 0 never.
        sample_rows: how many of those rows.
        signal_rows: which rows of the signal tokens train: `both`, `output` (the input rows stay, those of
            learned queries apart), or `none`.
        projector_init: how new output projectors start: `random`, or `ridge`, the closed-form solution of caption
            alignment on the training captions (linear projectors; a transformer gets a linear path beside it).
        ridge_captions: captions that ridge looks at, at most.
        parts: parts to train in place of the stage's own, such as `image_projector` or `audio_decoder`; the joint
            configuration uses it.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        compile: torch.compile of the layers of encoders, language model and denoisers.
        profile: write a trace of torch's profiler of so many updates to `profile/`, after two others; 0 none.
    """

    max_steps: Steps = 1000
    num_epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    batch_size: Rows = 8
    gradient_accumulation_steps: Rows = 1
    learning_rate: Rate = 1e-3
    learning_rates: dict[str, Rate] = field(default_factory=dict)
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Every = 0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    mixed_precision: Literal["no", "bf16"] = "no"
    save_steps: Every = 0
    keep_checkpoints: PositiveInt = 2
    keep_best: str | None = None
    abort_above: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = field(default_factory=dict)
    eval_steps: Every = 0
    eval_suite: str | None = None
    log_steps: Steps = 10
    sample_steps: Every = 0
    sample_rows: PositiveInt = 4
    signal_rows: Literal["both", "output", "none"] = "both"
    projector_init: Literal["random", "ridge"] = "random"
    ridge_captions: PositiveInt = 10_000
    parts: list[str] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    profile: Annotated[int, Field(ge=0, le=1000)] = 0


@dataclass
class LoraSettings:
    """LoRA on the language model (arXiv 2106.09685), through PEFT; used by stage 3.

    Attributes:
        r: rank.
        alpha: scale, as in alpha / r.
        dropout: on the adapters' input.
        target_modules: names of the layers to adapt; `all-linear` for all but the head.
    """

    r: Tokens = 8
    alpha: PositiveInt = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | str = "all-linear"


@dataclass
class Config:
    """All sections of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    lora: LoraSettings = field(default_factory=LoraSettings)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_config(arguments: Sequence[str], description: str = "") -> Config:
    """Settings from `--config FILE` and dotted overrides (`--train.learning_rate 1e-3`), checked.

    Raises:
        InputError: unknown keys (all of them), values of a wrong type, values out of range (all of them).
    """
    config = parse_settings(arguments, Config, description)
    check_values(config)
    return config


def check_values(config: Config) -> None:
    """Raise one `InputError` that names every value out of range, what it is and what it should be."""
    train = config.train
    faults = find_misfits(config)
    if not config.run.output_dir.strip():
        faults.append(f"run.output_dir is {config.run.output_dir!r}, expected a folder")
    if config.model.language_model is None and config.model.init_from is None:
        faults.append("model has neither language_model nor init_from, expected at least one of them")
    if train.warmup_steps > train.max_steps:
        faults.append(
            f"train.warmup_steps is {train.warmup_steps}, expected at most train.max_steps ({train.max_steps})"
        )
    if train.eval_suite and not train.eval_steps:
        faults.append(f"train.eval_suite is {train.eval_suite}, but it is never run, expected train.eval_steps")
    for name, steps in (("eval_steps", train.eval_steps), ("sample_steps", train.sample_steps)):
        if steps and not config.data.eval:
            faults.append(f"train.{name} is {steps}, but data.eval is empty, expected at least one file there")
    if not config.data.train:
        faults.append("data.train is empty, expected at least one file, as in [{path: data.jsonl}]")
    if faults:
        raise InputError("; ".join(faults))
