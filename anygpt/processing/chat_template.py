"""Tokens and labels of conversations, with any tokenizer's chat template."""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from anygpt.errors import InputError, refusing
from anygpt.media.types import is_heard
from anygpt.outputs import Answer
from anygpt.sequence.merging import IGNORE

# Vicuna's format, as in NExT-GPT's recipe, for tokenizers of base models without a template.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: "
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['role'] | upper }}: {{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
_MARKS_GENERATION = re.compile(r"\{%-?\s*generation\b")


def plain(text: str, special: Iterable[str]) -> str:
    """Insert a space into special tokens that occur literally in a text.

    Otherwise "<image>" would demand an input, "[IMG0]" break the signal spans, and the template's tokens end the turn.
    """
    for token in special:
        if len(token) > 1 and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def parts_of(content: str | Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """A message's content as parts, with adjacent texts joined so that `plain` sees split special tokens."""
    parts: list[dict[str, Any]] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
        if part["type"] == "text" and parts and parts[-1]["type"] == "text":
            parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
        else:
            parts.append(dict(part))
    return parts


def answer_message(answer: Answer) -> dict[str, Any]:
    """The assistant's message for an answer, with its media, which `feed_back` makes inputs."""
    parts = []
    for segment in answer.segments:
        content = (segment.content, int(segment.rate)) if is_heard(segment.type) else segment.content
        maker = {} if segment.key is None else {"key": segment.key}  # if a media type has several decoders
        parts.append({"type": segment.type, segment.type: content} | maker)
    return {"role": "assistant", "content": parts}


def feed_back(messages: Sequence[Mapping[str, Any]], reads: Collection[str]) -> list[Mapping[str, Any]]:
    """Put media from the assistant's turns also at the beginning of the user's next turn, as inputs.

    The assistant's turns keep their signal spans. Parts without a medium, and types that nothing `reads`, stay out.
    """
    result, made = [], []
    for message in messages:
        if message["role"] == "assistant" and not isinstance(message["content"], str | None):
            kinds = ((part["type"], part) for part in message["content"] if part["type"] in reads)
            made += [{"type": kind, kind: part[kind]} for kind, part in kinds if kind in part]
        elif message["role"] == "user" and made:
            message, made = {**message, "content": [*made, *parts_of(message["content"])]}, []
        result.append(message)
    return result


class Rendered(str):
    """Text rendered by a chat template, which has already added the special tokens."""


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> Rendered:
    """Render a conversation as text, with `options` for the template; an `InputError` if it refuses it."""
    return Rendered(_apply(tokenizer, messages, tokenize=False, **options))


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's template; of several by name, as Command R has them, its `default`."""
    advice = "; set tokenizer.chat_template to one of them"
    with refusing("the tokenizer's chat templates cannot be used", (ValueError,), advice):
        return tokenizer.get_chat_template() if tokenizer.chat_template else DEFAULT_CHAT_TEMPLATE


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> Any:
    form = _in_form_of(tokenizer, messages)
    try:
        return tokenizer.apply_chat_template(form, chat_template=_template_of(tokenizer), **options)
    except TemplateError as error:
        raise InputError(f"the tokenizer's chat template refuses this conversation: {error}") from error


def _in_form_of(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Messages whose contents are texts, or lists of parts if the template only reads lists, like LLaVA's."""
    mark, template = "\ue000", _template_of(tokenizer)  # a character that is in no template
    for content, form in ((mark, messages), (_parts(mark), [m | {"content": _parts(m["content"])} for m in messages])):
        with suppress(TemplateError, TypeError):
            probe = [{"role": "user", "content": content}]
            if mark in tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False):
                return form
    return messages


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that follows an answer directly in the chat template; None if none does."""
    question, answer = "\ue000", "\ue001"  # in no template
    exchange = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        behind = render(tokenizer, exchange).rpartition(answer)[2]
    except InputError:
        return None
    ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids[0] if ids and ids[0] in special else None


def tokenize_with_labels(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels of equal length, `-100` outside the assistant's turns.

    Turns are found by the template's `{% generation %}` marks, else by `find_turns`, which needs offsets of tokens.
    """
    if _MARKS_GENERATION.search(_template_of(tokenizer)):
        encoded = _apply(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        return ids, [i if keep else IGNORE for i, keep in zip(ids, mask, strict=True)]
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not tell the positions of its tokens in the text; use a fast tokenizer"
        )
    text = render(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    labels = [IGNORE] * len(ids)
    for begin, end in find_turns(tokenizer, messages, text):
        for i, (first, last) in enumerate(places):
            if first < last and begin < last <= end:
                labels[i] = ids[i]
    return ids, labels


def find_turns(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], text: str) -> list[tuple[int, int]]:
    """The begin and end of each of the assistant's turns in `text`, the whole conversation rendered by `render`.

    The conversation is rendered again with a mark at the end of each message's content. A turn begins after the
    generation prompt that the template writes after the preceding message. It ends with the text that follows its
    content both as the last message and in the whole conversation, so a template may render earlier turns differently
    from the last one, for instance without thinking. It is an `InputError` if the conversation begins with the
    assistant, or the template omits or changes contents.
    """
    marks = [character for character in map(chr, range(0xE000, 0xF8FF)) if character not in text][: len(messages)]
    unmark = str.maketrans(dict.fromkeys(marks))
    marked = []
    for message, mark in zip(messages, marks, strict=True):
        end = len(message["content"].rstrip())  # a template may strip trailing space
        marked.append(message | {"content": message["content"][:end] + mark + message["content"][end:]})
    lost = InputError(
        "the tokenizer's chat template leaves out or rewrites messages, so that the assistant's turns cannot be found; "
        "mark them in the template with {% generation %}"
    )

    def behind(mark: str, count: int, **options: Any) -> str:
        """What the template writes after a mark, given only the first `count` messages."""
        _, found, rest = render(tokenizer, marked[:count], **options).rpartition(mark)
        if not found:
            raise lost
        return rest.translate(unmark)

    whole = render(tokenizer, marked)
    if whole.translate(unmark) != text:
        raise lost
    places = {mark: len(whole.rpartition(mark)[0].translate(unmark)) for mark in marks if mark in whole}
    turns = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise InputError("the conversation begins with the assistant; put a user's message before it")
        if marks[turn] not in places or marks[turn - 1] not in places:
            raise lost
        prompt = behind(marks[turn - 1], turn, add_generation_prompt=True)
        begin, end = places[marks[turn - 1]] + len(prompt), places[marks[turn]]
        if not text.startswith(prompt, places[marks[turn - 1]]) or begin > end:
            raise lost
        both = zip(behind(marks[turn], turn + 1), text[end:], strict=False)
        turns.append((begin, end + len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], both)))))
    return turns
