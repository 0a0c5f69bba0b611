"""Choice of the codes of a span, and the spans of codes in an answer. Shape legend: `anygpt.outputs`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from anygpt.composition import Composition


def code_options(
    model: Composition, decoder_kwargs: Mapping[str, Mapping[str, Any]], rows: int
) -> list[dict[str, dict[str, Any]]]:
    """Each row's options of the tokenizers, `{key: options}`, with its own `generator` if there are seeds."""
    options: list[dict[str, dict[str, Any]]] = [{} for _ in range(rows)]
    for key, tokenizer in model.tokenizers.items():
        given = decoder_kwargs.get(key, {})
        if key in model.decoder_keys:  # whose options these are
            given = {name: value for name, value in given.items() if name in ("seed", "generator")}
        given = tokenizer.options(given)
        seeds, generators = (
            found if isinstance(found, (list, tuple)) else [found] * rows
            for found in (given.get("seed"), given.get("generator"))
        )
        for row, (own, seed) in enumerate(zip(options, seeds, strict=True)):
            # a decoder takes a list with one generator a medium, which need not be one a row
            generator = generators[row % len(generators)] if seed is None else torch.Generator().manual_seed(seed)
            own[key] = given | {"generator": generator}
    return options


def choose_code(logits: Tensor, free: Tensor | None, allowed: range, options: Mapping[str, Any]) -> int:
    """The next code's id, among those `allowed`, from logits `(V',)` given all that precedes it and, for guidance,
    given the span alone."""
    scores = logits[allowed.start : allowed.stop].log_softmax(dim=-1)
    if free is not None:
        base = free[allowed.start : allowed.stop].log_softmax(dim=-1)
        scores = base + options["guidance_scale"] * (scores - base)
    if options["temperature"] == 0:
        return allowed.start + int(scores.argmax())
    if 0 < options["top_k"] < len(scores):
        scores = scores.masked_fill(scores < scores.topk(options["top_k"]).values[-1], -torch.inf)
    generator = options["generator"]
    shares = (scores / options["temperature"]).softmax(dim=-1).to("cpu" if generator is None else generator.device)
    return allowed.start + int(torch.multinomial(shares, 1, generator=generator))


def spans_of_codes(model: Composition, answer: Sequence[int]) -> Iterator[tuple[int, str, Tensor]]:
    """Yield index, tokenizer key and codes `(n,)` of each whole span of codes in an answer."""
    for key in (key for key in model.tokenizer_keys if key not in model.decoder_keys):
        span, first = model.signal_tokens.spans.get(key), model.signal_tokens.ids.get(key, [0])[-1]
        for start, token in enumerate(answer):
            if span and token == span[0] and len(answer) >= start + len(span):
                pairs = zip(answer[start:], span, strict=False)
                yield start, key, torch.tensor([one - first for one, place in pairs if isinstance(place, range)])
