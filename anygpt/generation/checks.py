"""Checks of `generate`'s arguments, before anything runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anygpt.composition import Composition
from anygpt.decoders.options import MAX_SEED, is_integer
from anygpt.errors import InputError


def check_options(options: Mapping[str, Any], rows: int, stop: Sequence[str], require: Sequence[str]) -> None:
    """Raise an `InputError` for options of transformers' `generate` that would have no effect, or a wrong one."""
    instead = {
        "past_key_values": "the prompt is read as a whole",
        "inputs_embeds": "give input_ids and encoder inputs",
        "position_ids": "positions follow from attention_mask",
        "custom_generate": "it decodes in its own way",
        "guidance_scale": "media are guided by decoder_kwargs={decoder key: {'guidance_scale': …}}",
        "negative_prompt_ids": "media have a negative_prompt in decoder_kwargs",
        **{f"output_{what}": "a GenerationOutput has no such field" for what in ("scores", "logits", "attentions")},
        "output_hidden_states": "a GenerationOutput has only those of spans",
        "streamer": "use on_event, or generate_stream",
        "stop_strings": "use stop",
        "return_dict_in_generate": "a GenerationOutput is returned",
    }
    for name, advice in instead.items():
        if (value := options.get(name)) is not None and value is not False:
            raise InputError(f"generate takes no {name} here: {advice}")
    if options.get("prefix_allowed_tokens_fn") is not None and rows > 1:
        raise InputError("prefix_allowed_tokens_fn is for one row at a time: it could not tell them apart")
    if isinstance(stop, str):
        raise InputError(f"stop is the text {stop!r}; give a list of texts, as [{stop!r}]")
    if not all(isinstance(one, str) and one for one in stop or ()):
        raise InputError(f"stop is {stop!r:.80}; expected a list of texts of at least one character")
    if stop and require:
        raise InputError("stop and require exclude each other: an answer that stops early would lack what is required")


def check_by_row(name: str, values: Sequence[int] | None, rows: int, least: int) -> None:
    """Raise an `InputError` unless `values` are None, or one whole number per row, each at least `least`."""
    fits = isinstance(values, (list, tuple)) and all(is_integer(one) and least <= one <= MAX_SEED for one in values)
    if values is not None and (not fits or len(values) != rows):
        raise InputError(f"{name} are {values!r:.80} for {rows} rows; expected a list, one number from {least} per row")


def check_request(
    model: Composition,
    require: Iterable[str] = (),
    forbid: Iterable[str] = (),
    decoder_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Check arguments of `generate` before it runs, and return `require` and `forbid` without duplicates.

    Raises:
        InputError: an unknown decoder or option.
    """
    for name, keys in (("require", require), ("forbid", forbid)):
        if isinstance(keys, str):
            raise InputError(f"{name} is the text {keys!r}; give a list of decoders, as [{keys!r}]")
    require, forbid = tuple(dict.fromkeys(require)), tuple(dict.fromkeys(forbid))
    decoder_kwargs = decoder_kwargs or {}
    if not isinstance(decoder_kwargs, Mapping) or not all(isinstance(own, Mapping) for own in decoder_kwargs.values()):
        raise InputError(f"decoder_kwargs is {decoder_kwargs!r:.80}; expected {{decoder key: {{option: value}}}}")
    if unknown := sorted({*require, *forbid, *decoder_kwargs} - set(model.makers), key=str):
        raise InputError(f"there is no decoder {', '.join(map(str, unknown))}; there are {list(model.makers)}")
    for key, given in decoder_kwargs.items():
        model.makers[key].check_options(given)
    return require, forbid


def check_references(model: Composition, references: Mapping[str, Sequence[Any]], rows: int) -> None:
    """Raise an `InputError` unless there is one reference or None per row, for decoders that can use it."""
    form = "expected {decoder key: [medium or None, one per row]}"
    if not isinstance(references, Mapping):
        raise InputError(f"references are {references!r:.80}; {form}")
    for key, given in references.items():
        if key not in model.makers:
            raise InputError(f"references name the decoder {key!r}; there are {list(model.makers)}")
        if not isinstance(given, (list, tuple)) or len(given) != rows:
            raise InputError(f"references of {key!r} are {given!r:.80} for {rows} rows; {form}")
        if not model.makers[key].module.targets.editable and any(one is not None for one in given):
            raise InputError(f"{type(model.makers[key].module).__name__} takes no reference: leave it out")
