"""Signal tokens (`[IMG0]…[IMG3]`): their embedding and output rows, their spans, and their use with any language model.

A span of `N` contiguous signal tokens calls for a decoder. They are special tokens of the tokenizer, but the language
model's own matrices are not resized: `SignalTokens` owns the input and output rows. Inside a `with attached(…)` block
the model's embedding accepts the new ids and its head returns logits for them, whether its embeddings are tied,
whether PEFT wraps it, and whatever it does after its head (soft-capping, scaling).

With `queries` in place of `tokens` a span is one trigger, `[IMG]`, followed by `N` learned queries (MetaQuery,
arXiv 2504.06256): only the trigger is generated, so only it has an output row and an NLL; the states are read at the
queries. A media tokenizer's span is `<image> c₁ … cₙ </image>` (Chameleon, arXiv 2405.09818; Emu3, arXiv 2409.18869),
with a row for each of its codes; a decoder with `codes` reads the states at those of the tokenizer with its key, as
BLIP3o-NEXT does. Shape legend: `anygpt.outputs`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from anygpt.errors import InputError
from anygpt.media.types import MEDIA

SIGNALS = ("tokens", "queries", "codes")  # of decoders
NOISE = 0.1  # of rows from a codebook, in standard deviations: entries that are not in use may be equal
SET_IDS = "build the MultimodalProcessor with model=, or call model.signal_tokens.set_ids"
CHUNK = 512
"""Positions whose logits are computed at once where labels need more: logits of all would take the most memory."""


def token_names(key: str, count: int, signal: str = "tokens") -> list[str]:
    """`["[IMG0]", …, "[IMG3]"]` for `("image", 4)`; with queries, preceded by the trigger `"[IMG]"`.

    A key that is no media type gives `[KEY0]`, `[KEY1]`, …
    """
    prefix = MEDIA[key].prefix if key in MEDIA else key.upper()
    return [f"[{prefix}]"] * (signal == "queries") + [f"[{prefix}{i}]" for i in range(count)]


@dataclass(frozen=True)
class Grid:
    """The codes of one medium, in a span `<key> c₁ … cₙ </key>`.

    Attributes:
        size: number of different codes.
        bounds: for each code of a medium, the first that it may be and the end of those.
        columns: codes before each token that ends a row, `<key-row>`; None for no such tokens.
        codebook: `(size, d)`, whose linear map the codes' new rows are; None for random ones.
        origin: where the tokenizer is from, which tells codebooks on the meta device apart.
    """

    size: int
    bounds: Sequence[tuple[int, int]]
    columns: int | None = None
    codebook: Tensor | None = None
    origin: Any = None

    def names(self, key: str) -> list[str]:
        """The tokens that are no codes: begin, end and, if there are any, the end of a row."""
        return [f"<{key}>", f"</{key}>"] + [f"<{key}-row>"] * bool(self.columns)

    def __len__(self) -> int:
        """Tokens of a span."""
        return len(self.bounds) + 2 + (len(self.bounds) // self.columns if self.columns else 0)


@dataclass(frozen=True)
class Spans:
    """The signal spans of one decoder in a batch, in row-major order: rows `(K,)` and positions `(K, N)` of the tokens,
    int64."""

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
    """Input and output rows of all signal tokens, by decoder key, and of codes, by tokenizer key.

    Args:
        counts: `{decoder key: N}`.
        embedding, head: the language model's own; new rows are drawn with the statistics of theirs.
        signals: `{decoder key: "tokens" | "queries"}`; by default tokens.
        grids: `{tokenizer key: Grid}`.

    Attributes:
        input_rows: `{key: (span length, H)}` float32 parameters; a span has `N` tokens, or a trigger and `N` queries.
            Of a grid: its named tokens, then its codes.
        owners: `{key of a grid: the first key, sorted, with the same codebook}`, whose rows of codes it uses: so the
            frames of clips are read and written as pictures are.
        output_rows: `{key: (N, H)}`, or `(1, H)` for the trigger of queries; of a grid as many as input rows.
        ids: `{key: [id, …]}`, the tokenizer's ids of a span; empty until `set_ids`. A padded vocabulary puts some of
            them inside the model's own matrices and others beyond them, so rows are looked up by id, never by offset.
            Of a grid: the ids of its named tokens, and that of its first code, which the tokenizer does not know.
    """

    def __init__(
        self,
        counts: Mapping[str, int],
        embedding: nn.Module,
        head: nn.Module,
        signals: Mapping[str, str] | None = None,
        grids: Mapping[str, Grid] | None = None,
    ):
        super().__init__()
        self.counts, self.grids = dict(counts), dict(grids or {})
        self.signals = {key: (signals or {}).get(key, "tokens") for key in counts} | dict.fromkeys(self.grids, "codes")
        self.input_rows, self.output_rows = nn.ParameterDict(), nn.ParameterDict()
        self.ids: dict[str, list[int]] = {}
        for key, count in counts.items():
            if count < 1:
                raise InputError(f"decoder {key!r} has num_signal_tokens={count}; expected at least 1")
            queries = self.signals[key] == "queries"
            self.input_rows[key] = nn.Parameter(_rows_like(embedding.weight, count + queries))
            self.output_rows[key] = nn.Parameter(_rows_like(head.weight, 1 if queries else count))
        found = dict(sorted(self.grids.items()))
        self.owners = {key: next((one for one in found if _share(found[one], found[key])), key) for key in found}
        for key, grid in self.grids.items():
            for rows, matrix in ((self.input_rows, embedding.weight), (self.output_rows, head.weight)):
                rows[key] = nn.Parameter(_rows_like(matrix, len(grid.names(key))))
                if self.owners[key] == key:
                    codes = _rows_like(matrix, grid.size, grid.codebook)
                    rows[key] = nn.Parameter(torch.cat([rows[key].detach(), codes]))
        self._row_of_id: Tensor
        self.register_buffer("_row_of_id", torch.empty(0, dtype=torch.long), persistent=False)

    @property
    def names(self) -> dict[str, list[str]]:
        """The tokens of each decoder's span, and the named ones of each grid's."""
        names = {key: token_names(key, count, self.signals[key]) for key, count in self.counts.items()}
        return names | {key: grid.names(key) for key, grid in self.grids.items()}

    @property
    def vocabulary(self) -> int:
        """The least size of a vocabulary that holds all ids."""
        return len(self._row_of_id)

    def row_ids(self, key: str) -> list[int]:
        """The id of each input row."""
        if key not in self.grids:
            return self.ids[key]
        *named, first = self.ids[key]
        return [*named, *range(first, first + self.grids[key].size * (self.owners[key] == key))]

    @property
    def spans(self) -> dict[str, list[int | range]]:
        """What each place of a span may hold, by key: one id, or any code."""
        return {key: self._span_of_codes(key) if key in self.grids else list(ids) for key, ids in self.ids.items()}

    def _span_of_codes(self, key: str) -> list[int | range]:
        grid, (begin, end, *row_end, first) = self.grids[key], self.ids[key]
        codes: list[int | range] = [range(first + low, first + high) for low, high in grid.bounds]
        for column in range(len(codes), 0, -(grid.columns or len(codes))):
            codes[column:column] = row_end
        return [begin, *codes, end]

    @property
    def query_ids(self) -> list[int]:
        """Ids of learned queries; they are never generated, so they have no NLL."""
        return [i for key, span in self.ids.items() if self.signals[key] == "queries" for i in span[1:]]

    def set_ids(self, ids: Mapping[str, list[int]]) -> None:
        """Set the token ids of the rows: `{key: …}`, for every key as in the attribute `ids`, each id for one."""
        if set(ids) != set(self.names):
            raise InputError(f"signal token ids are given for {sorted(ids)}; expected {sorted(self.names)}")
        for key, names in self.names.items():
            if len(ids[key]) != len(names) + (key in self.grids):
                raise InputError(f"decoder {key!r} has {len(names)} signal tokens, but {len(ids[key])} ids were given")
        self.ids = {key: list(ids[key]) for key in self.names}
        flat = [i for key in self.ids for i in self.row_ids(key)]
        if len(set(flat)) != len(flat):
            raise InputError(f"signal token ids must all differ, got {dict(ids)}")
        row_of_id = torch.full((max(flat, default=-1) + 1,), -1, dtype=torch.long, device=self._row_of_id.device)
        row_of_id[flat] = torch.arange(len(flat), device=row_of_id.device)
        self._row_of_id = row_of_id

    def row_of(self, input_ids: Tensor, key: str) -> Tensor:
        """Row of each id in those of a key, -1 if it is none of its tokens; same shape."""
        inside = (input_ids >= 0) & (input_ids < len(self._row_of_id))
        row = torch.where(inside, self._row_of_id[input_ids.clamp(0, len(self._row_of_id) - 1)], -1)
        lengths = {name: len(rows) for name, rows in self.input_rows.items()}
        row = row - sum(list(lengths.values())[: list(lengths).index(key)])
        return torch.where(row < lengths[key], row, -1).clamp(min=-1)

    def find_spans(self, input_ids: Tensor, key: str) -> Spans:
        """The spans of one decoder in `(B, S)` ids, with the `N` positions whose states are read; or of one tokenizer,
        with the positions of the codes. An `InputError` names the row of a span that is incomplete or out of order."""
        span = self.spans.get(key, [-1])
        first, last = ([place[i] if isinstance(place, range) else place for place in span] for i in (0, -1))
        count, lowest, highest = len(span), input_ids.new_tensor(first), input_ids.new_tensor(last)
        rows, starts = (input_ids == span[0]).nonzero(as_tuple=True)
        positions = starts[:, None] + torch.arange(count, device=input_ids.device)
        inside = positions[:, -1] < input_ids.shape[1] if len(rows) else rows.bool()
        found = input_ids[rows[:, None], positions.clamp(max=input_ids.shape[1] - 1)]
        whole = inside & ((lowest <= found) & (found <= highest)).all(dim=1)
        stray = torch.zeros_like(input_ids[:, 0])
        for other in (one for one in self.ids if self.owners.get(one, one) == self.owners.get(key, key)):
            begun = (input_ids == self.ids[other][0]).sum(dim=1)
            stray += (self.row_of(input_ids, other) >= 0).sum(dim=1) - begun * len(self.spans[other])
        if not bool(whole.all()) or bool(stray.any()):
            bad = int(rows[~whole][0]) if not bool(whole.all()) else int(stray.nonzero()[0])
            expected = f"the {count} tokens {' '.join(self.names[key])} one after the other"
            if grid := self.grids.get(key):
                begin, end, *_ = grid.names(key)
                expected = f"{begin}, {len(grid.bounds)} codes of a medium, {end}"
            raise InputError(f"row {bad} holds a broken {key!r} signal span; expected {expected}")
        if key in self.grids:
            return Spans(rows, positions[:, lowest < highest])
        return Spans(rows, positions[:, -self.counts[key] :])

    def write_codes(
        self, input_ids: Tensor, labels: Tensor | None, codes: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Replace each run of begin tokens in ids and labels `(B, S)`, as long as a span, by the span of a medium's
        codes.

        `codes` are `{tokenizer key: (K, n) int64}`, in the order of the batch. An `InputError` refuses another number
        or shape of media, codes out of range, and a span that is not whole.
        """
        for key, given in codes.items():
            if key not in self.ids:
                raise InputError(f"there are {key!r} codes, but the model does not know their ids; {SET_IDS}")
            grid, span = self.grids[key], self.spans[key]
            if given.dim() != 2 or given.shape[1] != len(grid.bounds):
                raise InputError(f"{key!r} codes have shape {tuple(given.shape)}; expected (media, {len(grid.bounds)})")
            low, high = torch.tensor(grid.bounds, device=given.device).unbind(1)
            if not bool(((low <= given) & (given < high)).all()):
                raise InputError(f"{key!r} codes are out of range; the media tokenizer has {grid.size}")
            held = input_ids == span[0]
            per_row = held.sum(dim=1)
            if int(per_row.sum()) != len(given) * len(span) or bool((per_row % len(span)).any()):
                raise InputError(
                    f"{key!r}: the batch has {per_row.tolist()} places by row for the codes of {len(given)} media, "
                    f"each of which takes {len(span)} (MultimodalProcessor writes them)"
                )
            fixed = input_ids.new_tensor([-1 if isinstance(place, range) else place for place in span])
            spans = fixed.repeat(len(given), 1)
            spans[:, fixed < 0] = given.to(input_ids) + self.ids[key][-1]
            input_ids = input_ids.masked_scatter(held, spans)
            labels = labels if labels is None else torch.where(held & (labels == span[0]), input_ids, labels)
        for key in self.grids:
            self.find_spans(input_ids, key)
        return input_ids, labels

    def fill_embeddings(self, embeds: Tensor, input_ids: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Replace the embeddings `(…, H)` of signal tokens among the ids `(…,)` by the input rows.

        `scale` is the factor that the embedding applies to its own rows, as Gemma's does.
        """
        for key in self.ids:
            row = self.row_of(input_ids, key)
            held = row >= 0
            if bool(held.any()):
                found = (self.input_rows[key][row[held]] * scale).to(embeds.dtype)
                embeds = embeds.index_put((held,), found)
        return embeds

    def extend_logits(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Add the logits of signal tokens: `(…, V)` logits and `(…, H)` states -> `(…, V')` logits.

        Ids beyond the model's vocabulary that are no signal tokens (the encoders' placeholders), and learned queries,
        are never generated: their logit is the lowest finite number.
        """
        if not self.ids:
            return logits
        least, extra = torch.finfo(logits.dtype).min, max(0, len(self._row_of_id) - logits.shape[-1])
        wide = F.pad(logits, (0, extra), value=least) if extra else logits.clone()
        wide = wide.index_fill_(-1, torch.tensor(self.query_ids, device=logits.device, dtype=torch.long), least)
        for key, rows in self.output_rows.items():
            said = torch.tensor(self.row_ids(key)[: len(rows)], device=logits.device)
            wide = wide.index_copy_(-1, said, F.linear(hidden, rows.to(hidden.dtype)).to(logits.dtype))
        return wide

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

        with (
            embedding.register_forward_pre_hook(clamp_ids),
            embedding.register_forward_hook(fill),
            head.register_forward_pre_hook(read),
            head.register_forward_hook(lambda module, args, output: self.extend_logits(output, args[0])),
        ):
            yield tap

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


def _share(one: Grid, other: Grid) -> bool:
    """Whether two grids have the same codebook; on the meta device, which has no values, of the same origin."""
    if one.codebook is None or other.codebook is None or one.codebook.shape != other.codebook.shape:
        return False
    if one.codebook.is_meta or other.codebook.is_meta:
        return one.origin is not None and one.origin == other.origin
    return torch.equal(one.codebook, other.codebook.to(one.codebook.device))


def _rows_like(matrix: Tensor, count: int, codebook: Tensor | None = None) -> Tensor:
    """`count` random float32 rows with the mean and standard deviation of `matrix`'s rows; given a codebook
    `(count, d)`, a random linear map of it, and a little noise.

    Identical initial rows would stay interchangeable: every signal token would learn the same thing.
    """
    matrix = matrix.detach().float()
    mean, std = matrix.mean(dim=0), matrix.std(dim=0)
    drawn = torch.randn(count, matrix.shape[1], device=matrix.device)
    if codebook is not None:
        mapped = codebook.detach().float().to(matrix.device)
        mapped = (mapped - mapped.mean(dim=0)) @ torch.randn(mapped.shape[1], matrix.shape[1], device=matrix.device)
        drawn = (mapped - mapped.mean(dim=0)) / mapped.std(dim=0).clamp(min=1e-6) + NOISE * drawn
    return drawn.mul_(std).add_(mean)  # in place, since rows of many codes are gigabytes
