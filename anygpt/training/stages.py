"""Trained parts and losses of each stage."""

import re
from dataclasses import dataclass, replace

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from anygpt.errors import InputError, refusing
from anygpt.losses.formulas import TERMS
from anygpt.losses.labels import check_retention
from anygpt.model.multimodal import MultimodalModel
from anygpt.model.parts import adapter_of, is_peft
from anygpt.training.config import Config, LoraSettings


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe (NExT-GPT, arXiv 2309.05519, §4).

    Attributes:
        name: name in messages and the tracker.
        trains: suffixes of the parts that train: `projector`, `output_projector`, `signal_tokens`, `language_model`.
        terms: loss terms of the stage; rows of other kinds are an error.
        lora: train LoRA adapters on the language model instead of its weights, unless their rank is 0.
    """

    name: str
    trains: tuple[str, ...]
    terms: tuple[str, ...]
    lora: bool = False

    def parts(self, model: MultimodalModel) -> list[str]:
        """Parts of a model that this stage trains."""
        idle = () if model.signal_tokens.names else ("signal_tokens",)
        return [part for part, kind in part_kinds(model).items() if kind in self.trains and part not in idle]


PEFT_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
ENCODER_LLM = Stage("stage 1, encoder-LLM", ("projector",), ("encoder_llm",))
LLM_DECODER = Stage("stage 2, LLM-decoder", ("output_projector", "signal_tokens"), ("llm_decoder",))
COMPONENTS = Stage("stage 0, components", (), TERMS)
INSTRUCTION_TUNING = Stage(
    "stage 3, instruction tuning",
    ("projector", "output_projector", "signal_tokens", "language_model"),
    TERMS,
    lora=True,
)
ALL_AT_ONCE = replace(INSTRUCTION_TUNING, name="all at once")


def prepare_stage(model: MultimodalModel, stage: Stage, config: Config) -> list[str]:
    """Freeze and unfreeze parts for a stage, add adapters, and verify that exactly the intended parameters train.

    Freezing comes before the adapters, which it would otherwise freeze too. Returns the trainable parameters' names.
    """
    model.train_only([])
    if stage.lora and (config.lora.r or is_peft(model.language_model)):
        model.language_model = adapted(model.language_model, model.language_model, "lora", config, "CAUSAL_LM")
    if config.loss.retention:
        check_retention(model)
    for key, decoder in model.decoders.items():
        if f"{key}_denoiser" in (config.train.parts or ()):
            decoder.module.set_adapter(adapted(decoder.module, decoder.module.denoiser, "denoiser_lora", config))
    parts = stage.parts(model) if config.train.parts is None else choose_networks(model, config.train.parts)
    denoisers = any(part.endswith("_denoiser") for part in parts)
    for section, used in (("lora", stage.lora), ("denoiser_lora", denoisers)):
        if not used and getattr(config, section) != LoraSettings():
            raise InputError(f"{section} has settings, but {stage.name} makes no such adapters; leave them out")
    model.train_only(parts)
    rows = config.train.signal_rows
    if "signal_tokens" in parts:
        for key, parameter in model.signal_tokens.input_rows.items():
            parameter.requires_grad_(key in trained_inputs(model, rows))
        model.signal_tokens.output_rows.requires_grad_(rows in ("both", "output"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # small updates would be lost in half precision
    trainable, expected = model.trainable_names(), expected_names(model, parts, rows)
    if wrong := set(trainable) ^ expected:
        raise RuntimeError(f"{stage.name} would train other tensors than it should: {', '.join(sorted(wrong))}")
    if not trainable:
        raise InputError(f"{stage.name} has nothing to train: the model has no parts among {', '.join(stage.trains)}")
    return trainable


def adapted(part: nn.Module, network: nn.Module, section: str, config: Config, task: str | None = None) -> PeftModel:
    """A part's adapter: the one that it has, or a new one on its network by the config's section."""
    lora, there = getattr(config, section), adapter_of(part)
    if there is not None:
        check_adapter(there, lora, section)
        return there
    options = {PEFT_NAMES.get(name, name): value for name, value in vars(lora).items()}
    adapter = LoraConfig(**options, task_type=task)
    where = f"{section}.target_modules={lora.target_modules!r} does not fit"
    with refusing(where, (ValueError, re.error)):
        wrapper = get_peft_model(network, adapter)
    names = [f".{name}" for name in wrapper.base_model.targeted_module_names]
    for layer in lora.target_modules if isinstance(lora.target_modules, list) else ():
        if not any(name.endswith(f".{layer}") for name in names):
            raise InputError(f"{where}: no layer is called {layer!r}; name them by their last part, as q_proj")
    return wrapper


def part_kinds(model: MultimodalModel) -> dict[str, str]:
    """Kind of each part, which `train.learning_rates` also accepts as a key."""
    kinds = {"language_model": "language_model", "signal_tokens": "signal_tokens"}
    for key in model.encoder_keys:
        kinds |= {f"{key}_encoder": "encoder", f"{key}_projector": "projector"}
    for key in model.decoder_keys:
        kinds |= {f"{key}_{kind}": kind for kind in ("decoder", "denoiser", "output_projector")}
    kinds |= {f"{key}_tokenizer": "tokenizer" for key in model.tokenizer_keys}
    return {part: kind for part, kind in kinds.items() if part in model.parts}  # denoisers only if they have an adapter


def choose_networks(model: MultimodalModel, parts: list[str]) -> list[str]:
    """Select networks of decoders named in `train.parts` (`image_decoder.vae`); returns parts, decoders once."""
    networks: dict[str, list[str]] = {}
    for part in parts:
        name, _, network = part.partition(".")
        networks.setdefault(name, []).extend([network] if network else [])
    for key in model.decoder_keys:
        decoder, chosen = model.decoders[key].module, networks.get(f"{key}_decoder")
        names = () if chosen is None or decoder.denoiser_adapter is None else chosen or decoder.trains
        if any(getattr(decoder, name, None) is decoder.denoiser for name in names):
            raise InputError(
                f"train.parts names {key}_decoder, whose denoiser has an adapter: name {key}_denoiser alone, which "
                "trains the adapter, or start from a model with it merged (anygpt merge-lora)"
            )
    for name, chosen in networks.items():
        key = name.removesuffix("_decoder")
        if chosen and (key not in model.decoder_keys or name in parts):
            raise InputError(
                f"train.parts names {name}.{chosen[0]}, which must be a network of a decoder that is not named itself "
                f"too; the decoders are {', '.join(f'{key}_decoder' for key in model.decoder_keys) or 'none'}"
            )
        if chosen:
            model.decoders[key].module.train_networks(chosen)
    return list(networks)


def check_adapter(wrapper: PeftModel, lora: LoraSettings, section: str) -> None:
    """Reject LoRA settings that differ from those of an adapter from `model.init_from`, which stays as it is."""
    adapter, default = wrapper.peft_config[wrapper.active_adapter], LoraSettings()
    for name, value in vars(lora).items():
        saved = getattr(adapter, PEFT_NAMES.get(name, name))
        saved = sorted(saved) if isinstance(saved, set) else saved
        if value != getattr(default, name) and (sorted(value) if isinstance(value, list) else value) != saved:
            raise InputError(
                f"{section}.{name} is {value}, but the adapter in model.init_from was made with {saved}; leave it "
                "out, or start from a model without an adapter"
            )


def trained_inputs(model: MultimodalModel, signal_rows: str) -> list[str]:
    """Decoders whose input rows train; learned queries, which only have input rows, train unless `none`."""
    signals = model.signal_tokens.signals
    return [key for key in signals if signal_rows == "both" or (signal_rows == "output" and signals[key] == "queries")]


def expected_names(model: MultimodalModel, parts: list[str], signal_rows: str) -> set[str]:
    """Names of the parameters that should train, whatever their `requires_grad`."""
    inputs = {f"signal_tokens.input_rows.{key}" for key in trained_inputs(model, signal_rows)}
    networks = tuple(
        f"{key}_decoder.module.{network}." for key, one in model.decoders.items() for network in one.module.trains
    )
    adapted = {part for part, pieces in model.parts.items() if is_peft(pieces[0])}
    own = {id(parameter): part for part in parts for parameter in model.part_parameters(part)}

    def trains(name: str, part: str) -> bool:
        if part in adapted or part.endswith("_denoiser"):
            return ".lora_" in name
        if part == "signal_tokens":
            return name in inputs or (signal_rows != "none" and ".output_rows." in name)
        return not part.endswith("_decoder") or name.startswith(networks)

    return {name for name, p in model.named_parameters() if id(p) in own and trains(name, own[id(p)])}
