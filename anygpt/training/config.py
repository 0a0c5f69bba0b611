"""Settings of a run: typed sections, one YAML file per run, dotted overrides on the command line.

jsonargparse parses them; unknown keys are reported together first, each with the closest known key.
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
from anygpt.parts.source import DecoderSettings, EncoderSettings, PartSettings, TokenizerSettings, Tokens
from anygpt.settings import find_misfits, flatten, parse_settings

# Bounds far beyond practical values, so that a few zeros too many give an error message, not exhausted memory.
Steps = Annotated[int, Field(ge=1, le=10**9)]
Every = Annotated[int, Field(ge=0, le=10**9)]
Rows = Annotated[int, Field(ge=1, le=2**20)]
# AdamW moves a parameter by up to the rate in each update; larger rates only overflow.
Rate = Annotated[float, Field(gt=0, le=1e3)]
WORKERS = max(64, 4 * (os.cpu_count() or 1))


@dataclass
class RunConfig:
    """Output, tracking and device of a run.

    Attributes:
        output_dir: folder of the run: `checkpoint-<step>/`, `final/`, `config.yaml`, `log.txt`.
        name: name of the run in the tracker; the folder's name by default.
        project: project in the tracker.
        seed: seed of new tensors, data order and noise.
        tracker: tracker of metrics. `WANDB_MODE=offline` keeps wandb off the network.
        resume: `auto` continues from the newest checkpoint in output_dir if there is one; `never` starts over and
            removes the output of an earlier run; anything else is the path of a checkpoint to continue from.
        device: `auto`, or `cpu` to ignore accelerators.
    """

    output_dir: str = "runs/run"
    name: str | None = None
    project: str = "anygpt"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    resume: str = "auto"
    device: Literal["auto", "cpu"] = "auto"


@dataclass
class EncoderConfig(EncoderSettings):
    """An encoder and its input projector.

    Attributes:
        modality: media type in the data; the key by default.
        fit: how to fit media into its window: `crop` (the default), `pad`, `stretch` or `tile` for images; `split`
            (the default) or `refuse` for long sounds.
        projector: arguments of `MultimodalProjectorConfig`: `projection_type` (linear, mlp, pooled, …) and its options.
    """

    modality: str | None = None
    fit: str | None = None
    projector: dict[str, Any] = field(default_factory=dict)


@dataclass
class DecoderConfig(DecoderSettings):
    """A diffusion decoder and its output projector.

    Attributes:
        modality: media type in the data; the decoder's own by default.
        num_signal_tokens: tokens per span; the media type's by default (the paper's: image 4, video 24, audio 8).
        hidden_layer: index of the hidden states to read, -1 for the last, or `mix`.
        signal: `tokens`; `queries`: learned queries after a single trigger token; or `codes`: those of the media
            tokenizer of the same key.
        projector: arguments of `OutputProjectorConfig`: `projection_type` (linear, mlp, transformer, qformer),
            `d_model`, ….
        defaults: default generation options, such as `{guidance_scale: 2, num_inference_steps: 20}`; saved with the
            final model.
    """

    modality: str | None = None
    num_signal_tokens: Tokens | None = None
    hidden_layer: int | str = -1
    signal: Literal["tokens", "queries", "codes"] = "tokens"
    projector: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)


@dataclass
class TokenizerConfig(TokenizerSettings):
    """A media tokenizer, whose codes the language model reads and writes.

    Attributes:
        modality: media type in the data; the key by default.
        row_ends: end each row of codes with a token.
        defaults: default generation options, such as `{guidance_scale: 2, temperature: 0.7, top_k: 50}`; saved with the
            final model.
    """

    modality: str | None = None
    row_ends: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelConfig:
    """The composition.

    Attributes:
        init_from: a `final/` folder to start from. Parts it has must be as named here; those that it lacks are added.
        encoders: by key, in the order in which features are prepended.
        language_model: a causal language model.
        decoders: by key.
        tokenizers: media tokenizers by key, each in place of an encoder and a decoder.
    """

    init_from: str | None = None
    encoders: dict[str, EncoderConfig] = field(default_factory=dict)
    language_model: PartSettings | None = None
    decoders: dict[str, DecoderConfig] = field(default_factory=dict)
    tokenizers: dict[str, TokenizerConfig] = field(default_factory=dict)


@dataclass
class DataConfig:
    """The data.

    Attributes:
        train: training files.
        eval: files for the evaluation loss, computed every `train.eval_steps`.
        cache_dir: folder of the feature cache, written by `scripts/cache_features.py` with the same settings (damage to
            its numbers is not noticed); null for none.
        num_workers: processes that decode media; 0 decodes in the main process.
        in_memory: keep decoded media in each decoding process; for small datasets.
        on_bad_sample: `error` stops at the first unreadable sample; `skip` drops and counts it.
        max_length: maximum tokens per row, including those of its media; null for no limit.
        on_long_sample: for longer rows: `error` stops, `skip` drops the row, `cut` drops its last turns (or the row, if
            its first turn is too long); the last two are counted.
        group_by_modality: form batches of rows with the same kind of answer: text only, images, ….
        group_by_length: form batches of rows of similar length, to reduce padding.
        pack_to: tokens of a sequence into which the language model packs several rows (or the longest row's, if it has
            more); null for one row per sequence.
        max_batch_tokens: approximate tokens per micro-batch and process, including padding, in place of
            train.batch_size; null to use train.batch_size.
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
    """Optimization.

    Attributes:
        max_steps: number of updates. Raising it continues a finished run.
        num_epochs: passes over data.train; determines `max_steps` if given.
        batch_size: rows per micro-batch and process.
        gradient_accumulation_steps: micro-batches per update and process.
        learning_rate: peak learning rate of AdamW.
        learning_rates: other peak rates by part: `{signal_tokens: 1e-4, language_model: 2e-4}`. A key is a part
            (`image_projector`) or a kind of parts: encoder, projector, language_model (its LoRA), signal_tokens,
            output_projector, decoder, denoiser.
        scheduler: decay of the rates after warm-up.
        warmup_steps: updates of linear warm-up.
        weight_decay: weight decay of AdamW.
        max_grad_norm: norm to which the gradient is clipped.
        mixed_precision: `bf16` computes in bfloat16 and loads frozen parts in it; trained tensors stay float32.
        save_steps: updates between checkpoints; 0 writes one only where the run is interrupted.
        keep_checkpoints: number of checkpoints to keep; older ones are removed.
        keep_best: a metric, such as `eval/loss`, whose lowest checkpoint is kept as well; with `max:`, as in
            `max:captions/cider`, the highest.
        abort_above: bounds by metric, such as `{eval/loss: 20}`; the run stops when one is exceeded.
        eval_steps: updates between evaluations of the loss; 0 for none.
        eval_suite: suite file of `anygpt evaluate` to run every `eval_steps`; adds the metrics `{suite}/{metric}`.
        log_steps: updates between logged metrics.
        sample_steps: updates between sample answers, media included, to the first rows of data.eval; 0 for none.
        sample_rows: number of those rows.
        signal_rows: rows of the signal tokens that train: `both`, `output` (input rows stay frozen, except those of
            learned queries), or `none`.
        projector_init: initialization of new output projectors: `random`, or `ridge`, the closed-form solution of
            caption alignment on the training captions (linear projectors; a transformer gets a parallel linear path).
        ridge_captions: maximum number of captions for ridge.
        ridge_gain: factor on the deviations of ridge's conditions from their mean. Ridge shrinks what it cannot predict
            towards the mean: 1 has the least squared error, more restores the strength that the decoder is used to.
        parts: parts to train in place of the stage's own, such as `image_projector` or `audio_decoder`; used by the
            joint configuration. `image_denoiser` is LoRA on the image decoder's denoiser, set by `denoiser_lora`.
        ema_decay: decay of the exponential moving averages of what trains (see `Averages`), as 0.999; None for none.
        ema_for: where the averages replace the weights: in `evaluation` (and samples), in `final`.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        compile: apply torch.compile to the layers of encoders, language model and denoisers.
        profile: updates to trace with torch's profiler into `profile/`, after two others; 0 for none.
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
    ridge_gain: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    parts: list[str] | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    ema_for: list[Literal["evaluation", "final"]] = field(default_factory=lambda: ["evaluation", "final"])
    gradient_checkpointing: bool = False
    compile: bool = False
    profile: Annotated[int, Field(ge=0, le=1000)] = 0


@dataclass
class LoraSettings:
    """LoRA (arXiv 2106.09685) through PEFT: `lora` on the language model, by stage 3 and all at once; `denoiser_lora`
    on denoisers.

    Attributes:
        r: rank; 0 trains the language model whole.
        alpha: numerator of the scale alpha / r.
        dropout: dropout on the adapters' input.
        target_modules: names of the layers to adapt; `all-linear` for all except the head.
    """

    r: Annotated[int, Field(ge=0, le=2**12)] = 8
    alpha: PositiveInt = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | str = "all-linear"


NEEDS = {
    "train.ridge_gain": "train.projector_init ridge",
    "train.eval_suite": "train.eval_steps",
    "train.keep_best": "train.save_steps",
    "train.sample_rows": "train.sample_steps",
    "train.ema_for": "train.ema_decay",
    "loss.binding": "loss.encoder",
    "loss.temperature": "loss.encoder",
    "loss.reference_dropout": "loss.decoder",
}
"""Settings that have no effect while another has its default."""


@dataclass
class Config:
    """All sections of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    lora: LoraSettings = field(default_factory=LoraSettings)
    denoiser_lora: LoraSettings = field(default_factory=LoraSettings)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_config(arguments: Sequence[str], description: str = "") -> Config:
    """Parse and check settings from `--config FILE` and dotted overrides (`--train.learning_rate 1e-3`); an
    `InputError` names all unknown keys, or all values out of range with their bounds."""
    config = parse_settings(arguments, Config, description)
    train, faults = config.train, find_misfits(config)
    if not config.run.output_dir.strip():
        faults.append(f"run.output_dir is {config.run.output_dir!r}, expected a folder")
    if config.model.language_model is None and config.model.init_from is None:
        faults.append("model has neither language_model nor init_from, expected at least one of them")
    if train.num_epochs is not None and config.data.max_batch_tokens is not None:
        faults.append("train.num_epochs counts batches of train.batch_size rows, which data.max_batch_tokens replaces")
    if train.num_epochs is None and train.warmup_steps > train.max_steps:
        faults.append(
            f"train.warmup_steps is {train.warmup_steps}, expected at most train.max_steps ({train.max_steps})"
        )
    now, usual = flatten(config.to_dict()), flatten(Config().to_dict())
    for name, needed in NEEDS.items():
        setting = needed.partition(" ")[0]
        if now[name] != usual[name] and now[setting] == usual[setting]:
            faults.append(f"{name} is {now[name]}, and has no effect without {needed}")
    for name in ("parts", "ema_for"):
        if getattr(train, name) == []:
            faults.append(f"train.{name} is empty, expected at least one name, or no such setting")
    for number, source in enumerate(config.data.eval):
        if source.weight != 1:
            faults.append(f"data.eval[{number}].weight is {source.weight}, expected 1: each row is evaluated once")
    for name, steps in (("eval_steps", train.eval_steps), ("sample_steps", train.sample_steps)):
        if steps and not config.data.eval:
            faults.append(f"train.{name} is {steps}, but data.eval is empty, expected at least one file there")
    if not config.data.train:
        faults.append("data.train is empty, expected at least one file, as in [{path: data.jsonl}]")
    if faults:
        raise InputError("; ".join(faults))
    return config
