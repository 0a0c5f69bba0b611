"""Conversations to tokens and labels, through any tokenizer's chat template."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from anygpt.errors import InputError
from anygpt.merging import IGNORE
from anygpt.outputs import Answer

# For base models, whose tokenizers have no template of their own. Vicuna's form, which NExT-GPT's recipe uses.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: "
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['role'] | upper }}: {{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
_MARKS_GENERATION = re.compile(r"\{%-?\s*generation\b")


def plain(text: str, special: Iterable[str]) -> str:
    """Text in which no special token can be read: one that was typed, or said letter by letter, gets a space inside.

    Else "<image>" in a message would ask for an input, "[IMG0]" break the signal spans, and the template's own marks
    end the turn and begin another.
    """
    for token in special:
        if len(token) > 1 and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def parts_of(content: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A message's content as parts, neighbouring texts as one: halves of a special token must not come together."""
    parts: list[dict[str, Any]] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text" and parts and parts[-1]["type"] == "text":
            parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
        else:
            parts.append(dict(part))
    return parts


def answer_message(answer: Answer) -> dict[str, Any]:
    """An answer as the assistant's turn of a conversation, with its media, which `feed_back` gives to the encoders."""
    parts = []
    for segment in answer.segments:
        content = (segment.content, int(segment.rate)) if segment.type == "audio" else segment.content
        parts.append({"type": segment.type, segment.type: content})
    return {"role": "assistant", "content": parts}


def feed_back(messages: Sequence[Mapping[str, Any]], reads: Collection[str]) -> list[Mapping[str, Any]]:
    """A conversation in which the media that the assistant made are inputs of the user's next turn, at its beginning.

    The assistant's own turns stay as they were said, with signal spans. Media that no encoder reads, and parts
    without a medium, are not fed back.

    Args:
        reads: the media types that encoders read.
    """
    result, made = [], []
    for message in messages:
        if message["role"] == "assistant" and not isinstance(message["content"], str):
            kinds = ((part["type"], part) for part in message["content"] if part["type"] in reads)
            made += [{"type": kind, kind: part[kind]} for kind, part in kinds if kind in part]
        elif message["role"] == "user" and made:
            message, made = {**message, "content": [*made, *parts_of(message["content"])]}, []
        result.append(message)
    return result


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
    """The conversation as text. `options` go to the template, `add_generation_prompt` among them."""
    return tokenizer.apply_chat_template(
        messages, chat_template=tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE, tokenize=False, **options
    )


def tokenize_with_labels(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels on the assistant's turns alone.

    The mask comes from the template where it marks what is generated; else a turn's labels are the tokens by which
    the conversation up to and with it is longer than the prompt for it.

    Returns:
        ids and labels of equal length; labels are `-100` outside the assistant's turns.

    Raises:
        InputError: the template renders a conversation's beginning differently once it goes on, so that turns cannot
            be told apart.
    """
    template = tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
    if _MARKS_GENERATION.search(template):
        encoded = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        return ids, [i if keep else IGNORE for i, keep in zip(ids, mask, strict=True)]

    def ids_of(part: list[dict[str, str]], prompt: bool) -> list[int]:
        return tokenizer.apply_chat_template(
            part, chat_template=template, tokenize=True, return_dict=True, add_generation_prompt=prompt
        )["input_ids"]

    ids = ids_of(messages, prompt=False)
    labels = [IGNORE] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, answered = ids_of(messages[:turn], prompt=True), ids_of(messages[: turn + 1], prompt=False)
        if ids[: len(answered)] != answered or answered[: len(prompt)] != prompt:
            raise InputError(
                "the tokenizer's chat template renders the beginning of a conversation differently once it goes on, "
                "so the assistant's turns cannot be found; mark them in the template with {% generation %}"
            )
        labels[len(prompt) : len(answered)] = answered[len(prompt) :]
    return ids, labels
