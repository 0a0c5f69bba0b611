"""Signal tokens (`[IMG0]…[IMG3]`): their embedding and output rows, their spans, and their use with any language model.

A span of `N` contiguous signal tokens calls for a decoder. They are special tokens of the tokenizer, but the language
model's own matrices are not resized: `SignalTokens` owns the input and output rows. Inside a `with attached(…)` block
the model's embedding accepts the new ids and its head returns logits for them, whether its embeddings are tied,
whether PEFT wraps it, and whatever it does after its head (soft-capping, scaling).

With `queries` in place of `tokens` a span is one trigger, `[IMG]`, followed by `N` learned queries (MetaQuery,
arXiv 2504.06256): only the trigger is generated, so only it has an output row and an NLL; the states are read at the
queries. Shape legend: `anygpt.outputs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from anygpt.errors import InputError
from anygpt.media.types import MEDIA

SIGNALS = ("tokens", "queries")
CHUNK = 512
"""Positions whose logits are computed at once where labels need more: logits of all would take the most memory."""


def token_names(key: str, count: int, signal: str = "tokens") -> list[str]:
    """`["[IMG0]", …, "[IMG3]"]` for `("image", 4)`; with queries, preceded by the trigger `"[IMG]"`.

    A key that is no media type gives `[KEY0]`, `[KEY1]`, …
    """
    prefix = MEDIA[key].prefix if key in MEDIA else key.upper()
    return [f"[{prefix}]"] * (signal == "queries") + [f"[{prefix}{i}]" for i in range(count)]


@dataclass(frozen=True)
class Spans:
    """The signal spans of one decoder in a batch, in row-major order.

    Attributes:
        rows: `(K,)` int64, the row of each span.
        positions: `(K, N)` int64, the positions of its tokens.
    """

    rows: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return self.rows.shape[0]

    def gather(self, states: Tensor) -> Tensor:
        """Select the states at the spans: `(B, S, H)` -> `(K, N, H)`."""
        return states[self.rows[:, None], self.positions]


@dataclass
class Tap:
    """What a language model's head reads inside `SignalTokens.attached`.

    Attributes:
        hidden: `(B, S, H)`, its input in the last forward pass.
        select: rows and positions `(M,)` to compute logits at; None for all.
        most: with more positions than this, logits are computed nowhere; None for any number.
        given: input of the head in place of the layers' states.
    """

    hidden: Tensor | None = None
    select: tuple[Tensor, Tensor] | None = None
    most: int | None = None
    given: Tensor | None = None


class SignalTokens(nn.Module):
    """Input and output rows of all signal tokens, by decoder key.

    Args:
        counts: `{decoder key: N}`.
        embedding, head: the language model's own; new rows are drawn with the statistics of theirs.
        signals: `{decoder key: "tokens" | "queries"}`; by default tokens.

    Attributes:
        input_rows: `{key: (span length, H)}` float32 parameters; a span has `N` tokens, or a trigger and `N` queries.
        output_rows: `{key: (N, H)}`, or `(1, H)` for the trigger of queries.
        ids: `{key: [id, …]}`, the tokenizer's ids of a span; empty until `set_ids`. A padded vocabulary puts some of
            them inside the model's own matrices and others beyond them, so rows are looked up by id, never by offset.
    """

    def __init__(
        self, counts: Mapping[str, int], embedding: nn.Module, head: nn.Module, signals: Mapping[str, str] | None = None
    ):
        super().__init__()
        self.counts = dict(counts)
        self.signals = {key: (signals or {}).get(key, "tokens") for key in counts}
        self.input_rows, self.output_rows = nn.ParameterDict(), nn.ParameterDict()
        self.ids: dict[str, list[int]] = {}
        for key, count in counts.items():
            if count < 1:
                raise InputError(f"decoder {key!r} has num_signal_tokens={count}; expected at least 1")
            queries = self.signals[key] == "queries"
            self.input_rows[key] = nn.Parameter(_rows_like(embedding.weight, count + queries))
            self.output_rows[key] = nn.Parameter(_rows_like(head.weight, 1 if queries else count))
        self._row_of_id: Tensor
        self.register_buffer("_row_of_id", torch.empty(0, dtype=torch.long), persistent=False)

    @property
    def names(self) -> dict[str, list[str]]:
        """The tokens of each decoder's span."""
        return {key: token_names(key, count, self.signals[key]) for key, count in self.counts.items()}

    @property
    def query_ids(self) -> list[int]:
        """Ids of learned queries; they are never generated, so they have no NLL."""
        return [i for key, span in self.ids.items() if self.signals[key] == "queries" for i in span[1:]]

    def set_ids(self, ids: Mapping[str, list[int]]) -> None:
        """Set the token ids of the rows: `{decoder key: ids of its span}`, for every decoder.

        Raises:
            InputError: a decoder without ids, the wrong number of them, or an id used twice.
        """
        if set(ids) != set(self.counts):
            raise InputError(f"signal token ids are given for {sorted(ids)}; expected {sorted(self.counts)}")
        for key, names in self.names.items():
            if len(ids[key]) != len(names):
                raise InputError(f"decoder {key!r} has {len(names)} signal tokens, but {len(ids[key])} ids were given")
        flat = [i for key in self.counts for i in ids[key]]
        if len(set(flat)) != len(flat):
            raise InputError(f"signal token ids must all differ, got {dict(ids)}")
        self.ids = {key: list(ids[key]) for key in self.counts}
        row_of_id = torch.full((max(flat, default=-1) + 1,), -1, dtype=torch.long, device=self._row_of_id.device)
        row_of_id[flat] = torch.arange(len(flat), device=row_of_id.device)
        self._row_of_id = row_of_id

    def row_of(self, input_ids: Tensor) -> Tensor:
        """Row of each id in the concatenation of all keys' rows, -1 if it is no signal token; same shape."""
        if not len(self._row_of_id):
            return torch.full_like(input_ids, -1)
        inside = (input_ids >= 0) & (input_ids < len(self._row_of_id))
        return torch.where(inside, self._row_of_id[input_ids.clamp(0, len(self._row_of_id) - 1)], -1)

    def find_spans(self, input_ids: Tensor, key: str) -> Spans:
        """The spans of one decoder in `(B, S)` ids, with the `N` positions whose states are read.

        Raises:
            InputError: a span is incomplete or out of order; the message names the row.
        """
        ids = torch.tensor(self.ids.get(key, [-1]), device=input_ids.device)
        count = len(ids)
        rows, starts = (input_ids == ids[0]).nonzero(as_tuple=True)
        positions = starts[:, None] + torch.arange(count, device=input_ids.device)
        inside = positions[:, -1] < input_ids.shape[1] if len(rows) else rows.bool()
        found = input_ids[rows[:, None], positions.clamp(max=input_ids.shape[1] - 1)]
        whole = inside & (found == ids).all(dim=1)
        stray = torch.isin(input_ids, ids).sum(dim=1) - torch.bincount(rows, minlength=input_ids.shape[0]) * count
        if not bool(whole.all()) or bool(stray.any()):
            bad = int(rows[~whole][0]) if not bool(whole.all()) else int(stray.nonzero()[0])
            raise InputError(
                f"row {bad} holds a broken {key!r} signal span; expected the {count} tokens "
                f"{' '.join(self.names[key])} one after the other"
            )
        return Spans(rows, positions[:, -self.counts[key] :])

    def fill_embeddings(self, embeds: Tensor, input_ids: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Replace the embeddings `(…, H)` of signal tokens among the ids `(…,)` by the input rows.

        `scale` is the factor that the embedding applies to its own rows, as Gemma's does.
        """
        row = self.row_of(input_ids)
        held = row >= 0
        if not bool(held.any()):
            return embeds
        rows = (torch.cat(list(self.input_rows.values())) * scale).to(embeds.dtype)
        return embeds.masked_scatter(held[..., None], rows[row[held]])

    def extend_logits(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Add the logits of signal tokens: `(…, V)` logits and `(…, H)` states -> `(…, V')` logits.

        Ids beyond the model's vocabulary that are no signal tokens (the encoders' placeholders), and learned queries,
        are never generated: their logit is the lowest finite number.
        """
        if not self.ids:
            return logits
        said = [i for key, rows in self.output_rows.items() for i in self.ids[key][: len(rows)]]
        rows, least = torch.cat(list(self.output_rows.values())), torch.finfo(logits.dtype).min
        extra = max(0, len(self._row_of_id) - logits.shape[-1])
        wide = F.pad(logits, (0, extra), value=least) if extra else logits.clone()
        wide = wide.index_fill_(-1, torch.tensor(self.query_ids, device=logits.device, dtype=torch.long), least)
        signal = F.linear(hidden, rows.to(hidden.dtype)).to(logits.dtype)
        return wide.index_copy_(-1, torch.tensor(said, device=logits.device), signal)

    @contextmanager
    def attached(self, language_model: nn.Module) -> Iterator[Tap]:
        """Make `language_model` handle signal tokens inside the block, and record its head's input.

        The yielded `Tap` holds that input after each forward pass; `tap.select` restricts the head, and whatever
        follows it, to some positions: logits are then `(1, M, V')`, or `(1, 0, V')` beyond `tap.most`.
        """
        embedding, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
        tap = Tap()
        ids: list[Tensor] = []

        def clamp_ids(module: nn.Module, args: tuple) -> tuple:
            ids[:] = [args[0]]
            return (args[0].clamp(max=module.weight.shape[0] - 1), *args[1:])

        def fill(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return self.fill_embeddings(output, ids[0], getattr(module, "embed_scale", 1.0))

        def read(module: nn.Module, args: tuple) -> tuple:
            tap.hidden = args[0] if tap.given is None else tap.given
            if tap.select is None:
                return (tap.hidden, *args[1:])
            beyond = tap.most is not None and len(tap.select[0]) > tap.most
            rows, positions = (places[:0] if beyond else places for places in tap.select)
            return (tap.hidden[rows, positions][None], *args[1:])

        def extend(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return self.extend_logits(output, args[0])

        handles = [
            embedding.register_forward_pre_hook(clamp_ids),
            embedding.register_forward_hook(fill),
            head.register_forward_pre_hook(read),
            head.register_forward_hook(extend),
        ]
        try:
            yield tap
        finally:
            for handle in handles:
                handle.remove()

    def run_head(self, language_model: nn.Module, states: Tensor) -> Tensor:
        """Logits `(M, V')` of the head's inputs `(M, H)`, outside `attached`."""
        with self.attached(language_model) as tap:
            tap.given = states[None]
            return run_after_layers(language_model, tap.given)[0]


@dataclass
class LayersOutput(BaseModelOutputWithPast):
    """The last hidden states; any other output of a model's layers (router logits, cross attentions) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def run_after_layers(language_model: nn.Module, states: Tensor) -> Tensor:
    """Logits `(1, M, V')` of the layers' last states `(1, M, H)`, inside `SignalTokens.attached`.

    The model's own `forward` runs, so whatever it does after its layers is done, but these return the states at once.
    """
    layers = language_model.get_decoder()
    before = vars(layers).get("forward")  # accelerate's hooks set it
    layers.forward = lambda *args, **kwargs: LayersOutput(last_hidden_state=states)
    try:
        return language_model(inputs_embeds=states, use_cache=False, return_dict=True).logits
    finally:
        del layers.forward
        if before is not None:
            layers.forward = before


def _rows_like(matrix: Tensor, count: int) -> Tensor:
    """`count` random float32 rows with the mean and standard deviation of `matrix`'s rows.

    Identical initial rows would stay interchangeable: every signal token would learn the same thing.
    """
    matrix = matrix.detach().float()
    mean, std = matrix.mean(dim=0), matrix.std(dim=0)
    return mean + std * torch.randn(count, matrix.shape[1], device=matrix.device)
