"""Labels through the chat templates of five families, as they are and with {% generation %} marks."""

import json
from pathlib import Path

import pytest

from anygpt import InputError
from anygpt.processing.chat_template import render, tokenize_many, tokenize_with_labels

FAMILIES = json.loads((Path(__file__).parent / "data/chat_templates.json").read_text())
ANSWERS = ["It is a red circle.", "No: [IMG0][IMG1] a ring"]
TURNS = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "Is it a square? It is a red circle."},  # what was answered, said by the user
    {"role": "assistant", "content": ANSWERS[1]},
]


@pytest.fixture
def tokenizer_of(parts):
    """The zoo's tokenizer with a family's special tokens and template."""

    def make(family, kind):
        tokenizer = parts.tokenizer()
        names = ["[IMG0]", "[IMG1]", *family["special"], *filter(None, (family["bos"], family["eos"]))]
        tokenizer.add_special_tokens({"extra_special_tokens": names}, replace_extra_special_tokens=False)
        tokenizer.bos_token, tokenizer.eos_token = family["bos"], family["eos"]
        tokenizer.chat_template = family[kind]
        return tokenizer

    return make


@pytest.mark.parametrize("kind", ["template", "marked"])
@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_the_assistants_turns_and_what_ends_them(tokenizer_of, name, system, kind):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, kind)
    messages = [{"role": "system", "content": "Be short."}, *TURNS] if system else TURNS
    if system and not family["system"]:
        with pytest.raises(InputError, match="chat template refuses this conversation: "):
            tokenize_with_labels(tokenizer, messages)
        return
    ids, labels = tokenize_with_labels(tokenizer, messages)
    assert ids == tokenizer(render(tokenizer, messages), add_special_tokens=False)["input_ids"]
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
    runs, before = [], -100
    for label in labels:
        if label != -100:
            runs = [*runs, []] if before == -100 else runs
            runs[-1].append(label)
        before = label
    expected = [answer + family["end"] for answer in ANSWERS]
    expected[-1] += family.get("last_end", "")
    plain = [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in expected]
    assert [tokenizer.decode(run) for run in runs] == plain


@pytest.mark.parametrize("name", FAMILIES)
def test_both_ways_give_the_same_tokens_and_labels(tokenizer_of, name):
    family = FAMILIES[name]
    assert tokenize_with_labels(tokenizer_of(family, "template"), TURNS) == tokenize_with_labels(
        tokenizer_of(family, "marked"), TURNS
    )


@pytest.mark.parametrize("way", ["template", "marked"])
@pytest.mark.parametrize("name", FAMILIES)
def test_many_conversations_at_once_are_as_each_by_itself(tokenizer_of, name, way):
    tokenizer = tokenizer_of(FAMILIES[name], way)
    conversations = [TURNS, TURNS[:2], [TURNS[0], {"role": "assistant", "content": "Yes."}]]
    alone = [tokenize_with_labels(tokenizer, messages) for messages in conversations]
    assert len({len(ids) for ids, _ in alone}) == 3
    assert tokenize_many(tokenizer, conversations) == alone
    assert tokenize_many(tokenizer, []) == []


@pytest.mark.parametrize("way", ["template", "marked"])
def test_one_conversation_that_is_refused_leaves_the_others(tokenizer_of, way):
    tokenizer = tokenizer_of(FAMILIES["Mistral"], way)
    first, refused, last = tokenize_many(tokenizer, [TURNS, TURNS[:1] * 2, TURNS[:2]])
    assert isinstance(refused, InputError) and "roles must alternate" in str(refused)
    assert [first, last] == [tokenize_with_labels(tokenizer, TURNS), tokenize_with_labels(tokenizer, TURNS[:2])]


def test_conversations_that_a_template_cannot_take(tokenizer_of):
    with pytest.raises(InputError, match="roles must alternate"):
        tokenize_with_labels(tokenizer_of(FAMILIES["Mistral"], "template"), TURNS[:1] * 2)
    with pytest.raises(InputError, match="begins with the assistant"):
        tokenize_with_labels(tokenizer_of(FAMILIES["Llama 3"], "template"), TURNS[1:])
