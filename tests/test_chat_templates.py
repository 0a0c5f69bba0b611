"""Labels and ids through the chat templates of the language models of the support matrix, rebuilt in tests/data."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from tiny_parts import LANGUAGE_MODELS
from tokenizers.processors import TemplateProcessing

from anygpt import InputError, MultimodalModel, MultimodalProcessor, load_tokenizer
from anygpt.data import ContentPart, LoadedSample, Message, Sample
from anygpt.data.collation import Collator
from anygpt.outputs import Answer, Segment
from anygpt.processing.chat_template import answer_message, end_of_turn, render, tokenize_with_labels

FOLDER = Path(__file__).parent / "data/chat_templates"


class Family(NamedTuple):
    """A template's special tokens, what ends a turn, and what more ends or begins the last one."""

    bos: str | None
    eos: str
    end: str
    special: tuple[str, ...] = ()
    system: bool = True
    last_end: str = ""
    last_begin: str = ""


CHATML = ("<|im_start|>", "<|endoftext|>")
TURNS_OF_GEMMA = ("<start_of_turn>", "<end_of_turn>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
FAMILIES = {
    "llama3": Family("<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", HEADERS),
    "llama3_1": Family("<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", HEADERS),
    "qwen2_5": Family(None, "<|im_end|>", "<|im_end|>\n", CHATML),
    "qwen3": Family(None, "<|im_end|>", "<|im_end|>\n", CHATML, last_begin="<think>\n\n</think>\n\n"),
    "mistral": Family("<s>", "</s>", "</s>", system=False),
    "mixtral": Family("<s>", "</s>", "</s>"),
    "gemma": Family("<bos>", "<eos>", "<end_of_turn>\n", TURNS_OF_GEMMA, system=False),
    "gemma3": Family("<bos>", "<eos>", "<end_of_turn>\n", TURNS_OF_GEMMA),
    "phi3": Family(
        "<s>",
        "<|endoftext|>",
        "<|end|>\n",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        True,
        "<|endoftext|>",
    ),
    "olmo2": Family("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "deepseek_r1": Family("<|begin|>", "<|end|>", "<|end|>", ("<|User|>", "<|Assistant|>")),
}
MARKED = [path.stem.removesuffix("_marked") for path in sorted(FOLDER.glob("*_marked.jinja"))]
# The template of each language model of the support matrix; the others' checkpoints have none.
OF_MODEL = {
    "Llama": "llama3_1",
    "Mistral": "mistral",
    "Mixtral": "mixtral",
    "Qwen2": "qwen2_5",
    "Qwen3": "qwen3",
    "Qwen3-MoE": "qwen3",
    "Gemma 2": "gemma",
    "Gemma 3": "gemma3",
    "Phi-3": "phi3",
    "OLMo 2": "olmo2",
}
ANSWERS = ["It is a red circle.", "No: [IMG0][IMG1] a ring", "user", "It is a red circle."]
ASKED = ["What is it?", "Is it a square? It is a red circle.", "Who?  ", "assistant"]  # some of it is answered, too
FOUR = [
    {"role": role, "content": content}
    for pair in zip(ASKED, ANSWERS, strict=True)
    for role, content in zip(("user", "assistant"), pair, strict=True)
]
TURNS = FOUR[:4]


@pytest.fixture
def tokenizer_of(parts):
    """The zoo's tokenizer with a family's special tokens and template; it begins texts as the family's does."""

    def make(name, kind=""):
        family, tokenizer = FAMILIES[name], parts.tokenizer()
        names = ["[IMG0]", "[IMG1]", *family.special, *filter(None, (family.bos, family.eos))]
        tokenizer.add_special_tokens({"extra_special_tokens": names}, replace_extra_special_tokens=False)
        tokenizer.bos_token, tokenizer.eos_token = family.bos, family.eos
        tokenizer.chat_template = (FOLDER / f"{name}{kind}.jinja").read_text()
        if family.bos:
            begin = (family.bos, tokenizer.convert_tokens_to_ids(family.bos))
            single = TemplateProcessing(f"{family.bos} $A", f"{family.bos} $A $B:1", special_tokens=[begin])
            tokenizer.backend_tokenizer.post_processor = single
        return tokenizer

    return make


def runs_of(labels):
    """The neighbouring labels that are not ignored."""
    runs, before = [], -100
    for label in labels:
        if label != -100:
            runs = [*runs, []] if before == -100 else runs
            runs[-1].append(label)
        before = label
    return runs


KINDS = [(name, "") for name in FAMILIES] + [(name, "_marked") for name in MARKED]


@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_labels_are_the_assistants_turns_and_what_ends_them(tokenizer_of, name, kind, system):
    """Of four exchanges, whose words stand in other turns and in the template itself."""
    family, tokenizer = FAMILIES[name], tokenizer_of(name, kind)
    messages = [{"role": "system", "content": "Be short."}, *FOUR] if system else FOUR
    if system and not family.system:
        with pytest.raises(InputError, match="chat template refuses this conversation: "):
            tokenize_with_labels(tokenizer, messages)
        return
    ids, labels = tokenize_with_labels(tokenizer, messages)
    assert ids == tokenizer(render(tokenizer, messages), add_special_tokens=False)["input_ids"]
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
    expected = [answer + family.end for answer in ANSWERS]
    expected[-1] = family.last_begin + expected[-1] + family.last_end
    plain = [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in expected]
    assert [tokenizer.decode(run).strip() for run in runs_of(labels)] == [text.strip() for text in plain]


@pytest.mark.parametrize("name", MARKED)
def test_both_ways_give_the_same_tokens_and_labels(tokenizer_of, name):
    assert tokenize_with_labels(tokenizer_of(name), FOUR) == tokenize_with_labels(tokenizer_of(name, "_marked"), FOUR)


def test_thoughts_of_the_last_turn_are_learnt_and_those_before_taken_out(tokenizer_of):
    """As Qwen3's template has it."""
    tokenizer = tokenizer_of("qwen3")
    answers = [f"<think>\nlooking {i}\n</think>\n\nIt is {i}." for i in range(2)]
    turns = [message | {"content": answers[i // 2]} if i % 2 else message for i, message in enumerate(TURNS)]
    _, labels = tokenize_with_labels(tokenizer, turns)
    first, last = (tokenizer.decode(run) for run in runs_of(labels))
    assert "looking" not in first and "It is 0." in first
    assert "looking 1" in last and "It is 1." in last


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS, ids=lambda language_model: language_model.label)
def test_every_language_model_trains_on_four_exchanges_with_its_own_template(tokenizer_of, parts, language_model):
    """And a prompt has the same ids by every way: in training, and by both ways through the processor."""
    name = OF_MODEL.get(language_model.label)
    tokenizer = parts.tokenizer() if name is None else tokenizer_of(name)
    if name is None:
        tokenizer.chat_template = None
    model = MultimodalModel({}, language_model.build())
    model.language_model.resize_token_embeddings(len(tokenizer))
    processor = MultimodalProcessor({}, tokenizer, model=model)
    words = [message | {"content": message["content"].replace("[IMG0][IMG1]", "see")} for message in FOUR]
    messages = tuple(Message(m["role"], (ContentPart("text", text=m["content"]),)) for m in words)
    batch = Collator(processor)([LoadedSample(Sample("a", messages, "a:1"))])
    assert not batch["bad_samples"] and len(runs_of(batch["labels"][0].tolist())) == 4
    loss = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    loss.backward()
    assert torch.isfinite(loss)
    trained = batch["input_ids"].tolist()
    assert processor.apply_chat_template(words, tokenize=True)["input_ids"].tolist() == trained
    assert processor(text=processor.apply_chat_template(words))["input_ids"].tolist() == trained
    assert processor(text=[processor.apply_chat_template(words)])["input_ids"].tolist() == trained
    prompt = processor.apply_chat_template(words[:1], add_generation_prompt=True)
    ids = processor.apply_chat_template(words[:1], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert torch.equal(processor(text=prompt)["input_ids"], ids)
    if processor.llm_tokenizer.bos_token and prompt.startswith(processor.llm_tokenizer.bos_token):
        assert torch.equal(processor(text=str(prompt.encode(), "utf-8"))["input_ids"], ids)  # as somebody types it


@pytest.mark.parametrize("kind", ["", "_marked"])
def test_a_conversation_that_the_template_refuses(tokenizer_of, kind):
    with pytest.raises(InputError, match="roles must alternate"):
        tokenize_with_labels(tokenizer_of("mistral", kind), TURNS[:1] * 2)


OF_PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
    " {{ part.text }}{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_template_that_reads_parts_is_given_parts(tokenizer_of):
    tokenizer = tokenizer_of("llama3")
    tokenizer.chat_template = OF_PARTS
    assert render(tokenizer, TURNS[:2]).startswith(f"user: {ASKED[0]}")
    _ids, labels = tokenize_with_labels(tokenizer, TURNS[:2])
    assert tokenizer.decode([i for i in labels if i != -100]).strip() == f"{ANSWERS[0]}{tokenizer.eos_token}"
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = OF_PARTS.replace("{% for part", "{% generation %}{% for part").replace(
        "{{ eos_token }}{% endfor %}", "{{ eos_token }}{% endgeneration %}{% endfor %}"
    )
    assert ASKED[0] in tokenizer.decode(tokenize_with_labels(tokenizer, TURNS[:2])[0])


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_a_processors_template_is_the_tokenizers(file, parts, tmp_path):
    for own, expected in ((None, "of the processor"), ("of its own", "of its own")):
        tokenizer = parts.tokenizer()
        tokenizer.chat_template = own
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / file).write_text(json.dumps({"chat_template": "of the processor"}))
        assert load_tokenizer(tmp_path).chat_template == expected


def test_of_several_templates_the_default_is_used(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of("qwen2_5")
    expected = tokenize_with_labels(tokenizer, TURNS)
    tokenizer.chat_template = {"tool_use": "{{ messages | length }}", "default": tokenizer.chat_template}
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert set(loaded.chat_template) == {"tool_use", "default"} and tokenize_with_labels(loaded, TURNS) == expected
    loaded.chat_template.pop("default")
    with pytest.raises(InputError, match=r"no default specified.*set tokenizer.chat_template"):
        tokenize_with_labels(loaded, TURNS)


def test_what_else_a_message_holds_reaches_the_template(tiny_model):
    processor = tiny_model((), ("image", "audio"))[1]
    processor.llm_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    called = {"role": "assistant", "content": None, "tool_calls": ["look"]}
    assert processor.apply_chat_template([{"role": "user", "content": "a"}, called]) == "a['look']"
    called |= {"content": None}
    assert processor.apply_chat_template([{"role": "user", "content": "a"}, called], tokenize=True)["input_ids"].numel()
    drawn = Answer([Segment("image", Image.new("RGB", (8, 8)), "audio")])  # any decoder of several, by its key
    said = processor.apply_chat_template([{"role": "user", "content": "a"}, answer_message(drawn)])
    assert said == "a" + "".join(processor.signal_tokens["audio"])


def test_conversations_that_a_template_cannot_take(tokenizer_of):
    with pytest.raises(InputError, match="roles must alternate"):
        tokenize_with_labels(tokenizer_of("mistral"), TURNS[:1] * 2)
    with pytest.raises(InputError, match="begins with the assistant"):
        tokenize_with_labels(tokenizer_of("llama3"), TURNS[1:])
