"""Memory estimate of a run, computed from shapes.

Parameters are counted in the dtypes in which they are loaded and trained. Activations, including recomputed ones, are
tracked while one update, forward and backward, runs on torch's fake tensors.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from anygpt.decoders.base import Condition
from anygpt.encoders.module import base_model
from anygpt.media.types import media_type
from anygpt.model.multimodal import MultimodalModel
from anygpt.parts.manifest import stored_tensors
from anygpt.sequence.signal_tokens import CHUNK
from anygpt.training.config import Config

ADAM_BYTES = 8  # two fp32 moments


@dataclass(frozen=True)
class PartMemory:
    """A part's parameters, those of them that train, bytes of all tensors by dtype, bytes that training adds, and bytes
    of tensors that wait on the CPU (`offload`)."""

    part: str
    parameters: int
    trainable: int
    bytes_by_dtype: dict[str, int]
    gradients: int
    moments: int
    waiting: int = 0

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
        held = sum(part.weights - part.waiting + part.gradients + part.moments for part in self.parts)
        return held + max(self.activations.values(), default=0)


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of live tensors created within the context (`peak` is their maximum), and operations (`flops`).

    torch's `FlopCounterMode` would keep the tensors that gradient checkpointing recomputes alive to the end.

    Args:
        held: existing tensors, whose views are not counted.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.flops += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=made)
        for storage in (tensor.untyped_storage() for tensor in tree_leaves(made) if isinstance(tensor, Tensor)):
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return made

    def _forget(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.now -= size


def plan_memory(model: MultimodalModel, processor: Any, config: Config, kinds: Mapping[Rows, tuple[int, int]]) -> Plan:
    """Estimate the memory of a run.

    Args:
        model: on the meta device, prepared for the stage; its tensors are replaced by fake ones.
        kinds: for each kind of rows, the tokens of a row and how many of them carry a loss.
    """
    known = set[int]()  # a denoiser's adapter is also part of its decoder
    parts = [measure_part(model, name, known) for name in reversed(model.parts)][::-1]
    activations, flops, left_out = {}, {}, []
    networks = [network for decoder in model.decoders.values() for network in decoder.module.children()]
    sizes = [_bytes([network]) for network in networks]
    offloaded = sum(part.weights for part in parts) - sum(sizes) + max(sizes, default=0)
    gradients = sum(part.gradients for part in parts)
    batch = BlankBatch(model, processor, config.train.batch_size)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    make_fake(model, mode)
    model.train()
    for kind, (tokens, labels) in kinds.items():
        with ExitStack() as stack:
            stack.enter_context(mode)
            live = stack.enter_context(LiveBytes(_tensors([model])))
            if config.train.mixed_precision == "bf16":
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            try:
                losses = batch.losses(kind, tokens, labels)
                if any(loss.requires_grad for loss in losses):
                    torch.stack(losses).sum().backward()
            except Exception as error:  # such as control flow that depends on values
                left_out.append(f"{kind}: {type(error).__name__}: {str(error).splitlines()[0]}")
            losses = []
            activations[kind], flops[kind] = max(0, live.peak - gradients), live.flops
        model.zero_grad(set_to_none=True)
    return Plan(parts, activations, flops, offloaded, left_out)


def measure_part(model: MultimodalModel, name: str, known: set[int] | None = None) -> PartMemory:
    """Measure a part, except for tensors whose ids are in `known`; the ids of the others are added there."""
    known = set() if known is None else known
    found, sizes = [x for x in _tensors(model.parts[name]) if id(x) not in known], Counter[str]()
    known.update(map(id, found))
    for tensor in (stored for one in found for stored in stored_tensors(one)):
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    trained = [tensor for tensor in found if tensor.requires_grad]
    count = sum(tensor.numel() for tensor in trained)
    parameters = sum(tensor.numel() for tensor in found if isinstance(tensor, nn.Parameter))
    gradients = sum(tensor.nbytes for tensor in trained)
    waiting = 0
    if kind := getattr(model.parts[name][0], "offload", None):
        pieces = [*model.parts[name][0].children()]
        if kind == "group":  # the largest layer is on the device, not the largest network
            pieces = [module for piece in pieces for module in piece.modules() if not [*module.children()]]
        waiting = sizes.total() - max(_bytes([piece]) for piece in pieces)
    return PartMemory(name, parameters, count, sizes, gradients, ADAM_BYTES * count, waiting)


def _bytes(pieces: Iterable[nn.Module | nn.Parameter]) -> int:
    return sum(stored.nbytes for tensor in _tensors(pieces) for stored in stored_tensors(tensor))


def _tensors(pieces: Iterable[nn.Module | nn.Parameter]) -> list[Tensor]:
    held = ([x] if isinstance(x, nn.Parameter) else [*x.parameters(), *x.buffers()] for x in pieces)
    return [tensor for tensors in held for tensor in tensors]


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace a module's tensors by fake ones, which hold no data."""

    def fake(tensor: Tensor) -> Tensor:
        if len(stored_tensors(tensor)) > 1:  # quantised, and computed with in its own dtype
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))

    module._apply(fake)


class BlankBatch:
    """A micro-batch of rows with one blank medium per encoder and one target per decoder of their kind.

    Args:
        model: not fake yet, because real media are processed here.
        rows: rows of the micro-batch.
    """

    def __init__(self, model: MultimodalModel, processor: Any, rows: int):
        self.model, self.rows = model, rows
        self.inputs: dict[str, dict[str, Any]] = {}
        for key in model.encoder_keys:
            modality = processor.modalities[key]
            medium = media_type(modality).blank(getattr(processor.encoder_processors[key], "num_frames", None))
            data, _, _ = processor.process_media(processor.arrange_media([(modality, medium)] * rows))
            self.inputs[key] = {name.removeprefix(f"{key}."): value for name, value in data.items()}
        self.targets: dict[str, tuple[int, ...]] = {}
        for key, decoder in model.decoders.items():
            kind = media_type(decoder.modality)
            blank = kind.to_target(kind.blank(getattr(decoder.module, "num_frames", None)))
            self.targets[key] = (rows, *decoder.module.targets([blank]).shape[1:])

    def losses(self, kind: Rows, tokens: int, labels: int) -> list[Tensor]:
        """Losses of rows of `tokens` tokens, `labels` of which carry a loss; the model must be fake by now."""
        model, losses = self.model, []
        language_model = base_model(model.language_model)
        embedding = language_model.get_input_embeddings().weight
        states = torch.zeros(self.rows, tokens, embedding.shape[1], dtype=embedding.dtype)
        for key in kind.encoders:
            features = model.encoders[key](tree_map_only(Tensor, torch.zeros_like, self.inputs[key]))
            features = features if isinstance(features, Tensor) else torch.stack(list(features))
            states = states + features.mean().to(states.dtype)  # only connects the graph
        if any(row.requires_grad for row in model.signal_tokens.input_rows.values()):
            states = states + sum(row.mean() for row in model.signal_tokens.input_rows.values()).to(states.dtype)
        if model.loss_weights.wants_language_model:
            mask = torch.ones(self.rows, tokens, dtype=torch.long)
            states = language_model.base_model(inputs_embeds=states, attention_mask=mask, use_cache=False)[0]
            said = states[:, : max(1, min(labels, tokens))].flatten(0, 1)[:CHUNK]
            logits = language_model.get_output_embeddings()(said).float()
            output_rows = model.signal_tokens.output_rows
            signals = [output_rows] if isinstance(output_rows, Tensor) else list(output_rows.parameters())
            logits = logits + sum((row.mean().float() for row in signals), torch.zeros(()))
            losses.append(F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)))
        for key in kind.decoders:
            losses += self._decoder_losses(key, states)
        return losses

    def _decoder_losses(self, key: str, states: Tensor) -> list[Tensor]:
        module, weights = self.model.decoders[key], self.model.loss_weights
        signals = module.projector.config.num_signal_tokens
        condition = Condition.of(module.condition(states[:, :1].expand(-1, signals, -1)))
        given = (condition.embeds, condition.pooled, condition.mask)
        losses = [(one.float() ** 2).mean() for one in given if one is not None]
        if weights.wants("denoising", key) or weights.decoder:
            latents = module.module.encode_media(torch.zeros(self.targets[key], dtype=module.module.vae.dtype))
            losses.append(module.module.denoising_loss(condition, latents).mean())
        return losses
