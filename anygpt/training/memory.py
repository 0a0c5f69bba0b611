"""Memory estimate of a run, computed from shapes.

Parameters are counted in the dtypes in which they are loaded and trained. Activations, including recomputed ones, are
tracked while one update, forward and backward, runs on torch's fake tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from anygpt.decoders.base import Condition
from anygpt.encoders.module import base_model
from anygpt.media.types import media_type
from anygpt.model.multimodal import MultimodalModel
from anygpt.sequence.head import CHUNK
from anygpt.training.config import Config

ADAM_BYTES = 8  # two fp32 moments


@dataclass(frozen=True)
class PartMemory:
    """Parameters and buffers of a part: how many train, bytes by dtype, and the bytes that training adds."""

    part: str
    parameters: int
    trainable: int
    bytes_by_dtype: dict[str, int]
    gradients: int
    moments: int

    @property
    def weights(self) -> int:
        return sum(self.bytes_by_dtype.values())


@dataclass(frozen=True)
class Rows:
    """A kind of rows: keys of the encoders of their inputs and of the decoders of their targets."""

    encoders: tuple[str, ...] = ()
    decoders: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{' + '.join(('text', *self.encoders))} to {' + '.join(self.decoders) or 'text'}"


@dataclass(frozen=True)
class Plan:
    """Memory of a run on one device, in bytes.

    Attributes:
        parts: the parts.
        activations: peak activations of an update, by the kind of its rows.
        flops: floating-point operations of a micro-batch, by the kind of its rows.
        offloaded: weights on the device during generation with offloaded decoder networks.
        left_out: messages about anything that could not be counted.
    """

    parts: list[PartMemory]
    activations: dict[Rows, int]
    flops: dict[Rows, int]
    offloaded: int
    left_out: list[str]

    @property
    def weights(self) -> int:
        return sum(part.weights for part in self.parts)

    @property
    def total(self) -> int:
        held = sum(part.weights + part.gradients + part.moments for part in self.parts)
        return held + max(self.activations.values(), default=0)


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of live tensors created within the context; `peak` is their maximum.

    Args:
        held: existing tensors, whose views are not counted.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in held}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def plan_memory(model: MultimodalModel, processor: Any, config: Config, kinds: Mapping[Rows, tuple[int, int]]) -> Plan:
    """Estimate the memory of a run.

    Args:
        model: on the meta device, prepared for the stage; its tensors are replaced by fake ones.
        processor: its processor.
        config: the run's settings.
        kinds: for each kind of rows, tokens of a row, and how many of them carry a loss.
    """
    parts = [measure_part(model, name) for name in model.parts]
    activations, flops, left_out = {}, {}, []
    networks = [list(decoder.module.children()) for decoder in model.decoders.values()]
    sizes = [sum(tensor.nbytes for tensor in _tensors([network])) for found in networks for network in found]
    offloaded = sum(part.weights for part in parts) - sum(sizes) + max(sizes, default=0)
    rows = config.train.batch_size
    inputs = {key: blank_inputs(processor, key, rows) for key in model.encoder_keys}
    targets = {key: target_shape(decoder.module, rows) for key, decoder in model.decoders.items()}
    gradients = sum(part.gradients for part in parts)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    make_fake(model, mode)
    model.train()
    for kind, (tokens, labels) in kinds.items():
        with ExitStack() as stack:
            stack.enter_context(mode)
            live = stack.enter_context(LiveBytes(_tensors([model])))
            counter = stack.enter_context(FlopCounterMode(display=False))
            if config.train.mixed_precision == "bf16":
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            try:
                run_update(model, kind, inputs, targets, (rows, tokens, labels))
            except Exception as error:  # such as control flow that depends on values
                left_out.append(f"{kind}: {type(error).__name__}: {str(error).splitlines()[0]}")
            activations[kind] = max(0, live.peak - gradients)
            flops[kind] = counter.get_total_flops()
        model.zero_grad(set_to_none=True)
    return Plan(parts, activations, flops, offloaded, left_out)


def measure_part(model: MultimodalModel, name: str) -> PartMemory:
    found = list(_tensors(model.parts[name]))
    sizes: dict[str, int] = {}
    for tensor in found:
        dtype = str(tensor.dtype).removeprefix("torch.")
        sizes[dtype] = sizes.get(dtype, 0) + tensor.nbytes
    trained = [tensor for tensor in found if tensor.requires_grad]
    count = sum(tensor.numel() for tensor in trained)
    parameters = sum(tensor.numel() for tensor in found if isinstance(tensor, nn.Parameter))
    gradients = sum(tensor.nbytes for tensor in trained)
    return PartMemory(name, parameters, count, sizes, gradients, ADAM_BYTES * count)


def _tensors(pieces: list[nn.Module | nn.Parameter]) -> Iterator[Tensor]:
    """Yield each parameter and buffer once."""
    known: set[int] = set()
    for piece in pieces:
        found = [piece] if isinstance(piece, nn.Parameter) else [*piece.parameters(), *piece.buffers()]
        for tensor in found:
            if id(tensor) not in known:
                known.add(id(tensor))
                yield tensor


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace a module's tensors by fake ones, which hold no data; tied tensors stay tied."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                store[name] = made[id(tensor)]


def run_update(
    model: MultimodalModel,
    kind: Rows,
    inputs: Mapping[str, Mapping[str, Any]],
    targets: Mapping[str, tuple[int, ...]],
    sizes: tuple[int, int, int],
) -> None:
    """Run forward and backward on a micro-batch of one kind of rows.

    Args:
        model: with fake tensors.
        kind: each row has one medium per encoder and one target per decoder of the kind.
        inputs, targets: encoder inputs and shapes of decoder targets of a micro-batch.
        sizes: rows, tokens per row, and tokens per row that carry a loss.
    """
    rows, tokens, labels = sizes
    language_model = base_model(model.language_model)
    embedding = language_model.get_input_embeddings().weight
    embeds = torch.zeros(rows, tokens, embedding.shape[1], dtype=embedding.dtype)
    for key in kind.encoders:
        features = model.encoders[key](tree_map_only(Tensor, torch.zeros_like, dict(inputs[key])))
        features = features if isinstance(features, Tensor) else torch.stack(list(features))
        embeds = embeds + features.mean().to(embeds.dtype)  # only connects the graph
    if any(rows_.requires_grad for rows_ in model.signal_tokens.input_rows.values()):
        embeds = embeds + sum(row.mean() for row in model.signal_tokens.input_rows.values()).to(embeds.dtype)
    losses = []
    if model.loss_weights.wants_language_model:
        mask = torch.ones(rows, tokens, dtype=torch.long)
        states = language_model.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)[0]
        said = states[:, : max(1, min(labels, tokens))].flatten(0, 1)[:CHUNK]
        logits = language_model.get_output_embeddings()(said).float()
        signals = [model.signal_tokens.output_rows] if isinstance(model.signal_tokens.output_rows, Tensor) else []
        signals += list(model.signal_tokens.output_rows.parameters()) if not signals else []
        logits = logits + sum((row.mean().float() for row in signals), torch.zeros(()))
        losses.append(F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)))
    else:
        states = embeds
    for key in kind.decoders:
        losses += decoder_losses(model, key, states, targets[key])
    loss = sum(losses)
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()


def decoder_losses(model: MultimodalModel, key: str, states: Tensor, target: tuple[int, ...]) -> list[Tensor]:
    """Losses of a decoder's rows, from the language model's states `(B, S, H)`."""
    module, weights = model.decoders[key], model.loss_weights
    decoder, losses = module.module, []
    signals = module.projector.config.num_signal_tokens
    condition = Condition.of(module.condition(states[:, :1].expand(-1, signals, -1)))
    losses.append((condition.embeds.float() ** 2).mean())
    losses += [(part.float() ** 2).mean() for part in (condition.pooled, condition.mask) if part is not None]
    if weights.wants("denoising", key) or weights.decoder:
        latents = decoder.encode_media(torch.zeros(target, dtype=decoder.vae.dtype))
        losses.append(decoder.denoising_loss(condition, latents).mean())
    return losses


def target_shape(decoder: Any, rows: int) -> tuple[int, ...]:
    """Shape of a batch of targets of a decoder."""
    kind = media_type(decoder.modality)
    blank = decoder.targets([kind.to_target(kind.blank(getattr(decoder, "num_frames", None)))])
    return (rows, *blank.shape[1:])


def blank_inputs(processor: Any, key: str, rows: int) -> dict[str, Any]:
    """Processed encoder inputs with one blank medium per row."""
    modality = processor.modalities[key]
    medium = media_type(modality).blank(getattr(processor.encoder_processors[key], "num_frames", None))
    data, _, _ = processor.process_media(processor.arrange_media([(modality, medium)] * rows))
    return {name.removeprefix(f"{key}."): value for name, value in data.items()}
