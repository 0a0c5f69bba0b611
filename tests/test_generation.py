"""Generation: the language model's own answers, whole spans, and the states that training sees."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import enlarge
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as tokenizer_decoders
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from anygpt.errors import InputError
from anygpt.generation.answering import text_of

EOS = 2
PROMPTS = ["what is this?", "tell me a long story about a red circle and a blue ring, now", "and"]


@pytest.fixture(scope="module")
def text_model(tiny_model):
    return tiny_model((), ())


@pytest.fixture(scope="module")
def full_model(tiny_model):
    return tiny_model()


def tokenize(processor, texts, side="left"):
    processor.llm_tokenizer.padding_side = side
    return processor(llm_inputs={"text": texts, "padding": True})


def bare(model, batch, **options):
    """The language model's own `generate` on the same embeddings, row by row and without padding."""
    answers = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        embeds = model.language_model.get_input_embeddings()(ids[None, mask.bool()])
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        options |= {"inputs_embeds": embeds, "attention_mask": mask, "pad_token_id": 0}
        answers.append(model.language_model.generate(**options)[0])
    return torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)


# ---------------------------------------------------------------------- without decoders: the bare language model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"num_beams": 3},
        {"do_sample": False, "eos_token_id": [EOS, 5, 600]},
        {"do_sample": False, "min_new_tokens": 3, "bad_words_ids": [[7]]},
    ],
    ids=["greedy", "penalties", "beams", "eos-list", "min-new"],
)
def test_answers_are_the_bare_language_models(text_model, side, options):
    model, processor = text_model
    batch = tokenize(processor, PROMPTS, side)
    ours = model.generate(**batch, max_new_tokens=12, **options)
    theirs = bare(model, batch, max_new_tokens=12, **options)
    assert ours.sequences.tolist() == theirs.tolist()
    assert ours.text == processor.batch_decode(theirs, skip_special_tokens=True)
    assert len({tuple(row) for row in theirs.tolist()}) == len(PROMPTS), "the prompts must matter"


@pytest.mark.parametrize("options", [{}, {"top_k": 20, "temperature": 0.7}, {"top_p": 0.8}])
def test_sampling_is_the_bare_language_models(text_model, options):
    model, processor = text_model
    batch = tokenize(processor, PROMPTS[:1])
    answers = []
    for generate in (lambda **o: model.generate(**batch, **o).sequences, lambda **o: bare(model, batch, **o)):
        torch.manual_seed(3)
        answers.append(generate(max_new_tokens=12, do_sample=True, **options).tolist())
    assert answers[0] == answers[1]


def first_greedy(model, processor, count=6):
    batch = tokenize(processor, PROMPTS[:1])
    return batch, model.generate(**batch, max_new_tokens=count, eos_token_id=None).sequences[0].tolist()


def test_any_of_several_eos_tokens_ends_a_row(text_model):
    model, processor = text_model
    batch, said = first_greedy(model, processor)
    stop = next(token for token in said[1:] if token != said[0])
    answer = model.generate(**batch, max_new_tokens=6, eos_token_id=[EOS, stop]).sequences[0].tolist()
    assert answer == said[: said.index(stop) + 1]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_eos_of_a_generation_config_is_heard(full_model, num_beams):
    """Also with a required decoder, whose span has to come before the end."""
    model, processor = full_model
    batch = tokenize(processor, PROMPTS[:1])
    options = {"max_new_tokens": 9, "num_beams": num_beams, "pad_token_id": 0}
    first = model.generate(**batch, **options).sequences[0, 0].item()
    config = GenerationConfig(**options, eos_token_id=[first, EOS])
    sequence = model.generate(**batch, generation_config=config).sequences[0].tolist()
    assert first in sequence and not any(sequence[sequence.index(first) + 1 :])
    sequence = model.generate(**batch, generation_config=config, require=["audio"], **few(model)).sequences[0].tolist()
    start = sequence.index(model.signal_tokens.ids["audio"][0])
    assert first not in sequence[:start], "the end came before what was required"


def test_training_mode_is_given_back(tiny_model):
    model, processor = tiny_model((), ("image",))
    model.train("language_model", mode=False).train()
    before = {name: module.training for name, module in model.named_modules()}
    model.generate(**tokenize(processor, ["a"]), max_new_tokens=2, forbid=["image"])
    assert before == {name: module.training for name, module in model.named_modules()}


# ------------------------------------------------------------------------------------------------- with decoders


def few(model):
    return {"decoder_kwargs": {key: {"num_inference_steps": 1} for key in model.decoder_keys}}


def spans_of(output):
    return [[s for s in answer.segments if s.type != "text"] for answer in output.answers]


def make_talkative(model, key, factor):
    """Make the first signal token of a decoder likelier, so that it is said without being asked for."""
    with torch.no_grad():
        model.signal_tokens.output_rows[key][0].mul_(factor)


def teacher_forced(model, processor, batch, output):
    """The conditions and span states of a forward over prompt + answer, in row-major order by key."""
    prompts = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    rows = [torch.cat(pair) for pair in zip(prompts, output.sequences, strict=True)]
    media = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, model(ids, mask, **media)


def check_states(model, processor, batch, output):
    """Spans of generation and of a teacher-forced forward agree; returns how many there were."""
    with torch.no_grad():
        ids, forced = teacher_forced(model, processor, batch, output)
    seen = 0
    for key in model.decoder_keys:
        mine = [s for answer in output.answers for s in answer.segments if s.key == key]
        spans = model.signal_tokens.find_spans(ids, key)
        assert len(mine) == len(spans)
        if not mine:
            continue
        states = torch.stack([s.states for s in mine])
        if model.decoders[key].hidden_layer == -1:
            expected = spans.gather(forced.hidden_states) + model.signal_tokens.input_rows[key]
            assert (states - expected).abs().max() < 1e-5
        assert (torch.stack([s.condition for s in mine]) - forced.conditions[key]).abs().max() < 1e-5
        seen += len(mine)
    return seen


def media_prompts(processor, media, side="left"):
    processor.llm_tokenizer.padding_side = side
    return processor(
        {
            "image": {"images": [[media.image(0)], [], [media.image(1), media.image(2)]]},
            "audio": {"raw_speech": [[], [media.audio(1)], []], "sampling_rate": 16_000},
            "video": {"videos": [[media.video(0)], [], []]},
        },
        {"text": ["<image> and <video>: draw it", "<audio>!", "a <image> longer <image> prompt than the others"]},
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_states_in_generation_are_those_of_a_teacher_forced_forward(full_model, media, options, side):
    model, processor = full_model
    torch.manual_seed(0)
    batch = media_prompts(processor, media, side)
    output = model.generate(**batch, max_new_tokens=14, require=["image", "audio"], **few(model), **options)
    assert all({s.key for s in row} >= {"image", "audio"} for row in spans_of(output))
    assert check_states(model, processor, batch, output) >= 6


@pytest.mark.parametrize("hidden_layer", ["mix", 2, 0])
def test_states_of_inner_layers_agree_too(tiny_model, hidden_layer):
    model, processor = tiny_model((), ("image",), hidden_layer=hidden_layer)
    if hidden_layer == "mix":
        torch.nn.init.normal_(model.image_decoder.layer_weights)
    batch = tokenize(processor, PROMPTS)
    output = model.generate(**batch, max_new_tokens=7, require=["image"], **few(model))
    assert check_states(model, processor, batch, output) >= 3


def test_rows_with_several_spans_and_with_none(tiny_model):
    model, processor = tiny_model((), ("image", "audio"))
    make_talkative(model, "image", 3.0)
    make_talkative(model, "audio", 3.0)
    torch.manual_seed(1)
    batch = tokenize(processor, PROMPTS * 2)
    output = model.generate(**batch, max_new_tokens=24, do_sample=True, temperature=3.0, **few(model))
    numbers = [len(row) for row in spans_of(output)]
    assert min(numbers) == 0 and max(numbers) > 1, f"choose another seed: {numbers}"
    assert check_states(model, processor, batch, output) == sum(numbers)
    starts = [
        [ids.index(model.signal_tokens.ids[s.key][0]) for s in row[:1]]
        for ids, row in zip(output.sequences.tolist(), spans_of(output), strict=True)
    ]
    assert len({start for row in starts for start in row}) > 1, "the spans should begin at different steps"


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_batch_gives_what_its_rows_give_alone(full_model, options):
    """Some rows are in a span while others say text, and the answers end at different lengths."""
    model, processor = full_model
    options = options | {"max_new_tokens": 12, "require": ["image"], "eos_token_id": list(range(2, 500, 3))}
    together = model.generate(**tokenize(processor, PROMPTS), **options, **few(model))
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(**tokenize(processor, [prompt]), **options, **few(model))
        ids = alone.sequences[0].tolist()
        lengths.add(len(ids))
        assert together.sequences[row].tolist()[: len(ids)] == ids
        # transformers fills up ended rows with padding; in beam search with the first end token, as padding's id is 0.
        assert set(together.sequences[row].tolist()[len(ids) :]) <= {0, options["eos_token_id"][0]}
        for one, other in zip(spans_of(alone)[0], spans_of(together)[row], strict=True):
            assert (one.condition - other.condition).abs().max() < 1e-5
            assert (one.states - other.states).abs().max() < 1e-5


def test_no_half_spans_ever(tiny_model):
    """Rows of the inner signal tokens as likely as can be: only whole spans come out all the same."""
    model, _processor = tiny_model((), ("image", "audio"))
    with torch.no_grad():
        for rows in model.signal_tokens.output_rows.values():
            rows.mul_(4)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 900, (6, 9), generator=generator)
    found = 0
    for seed, budget in ((0, 5), (1, 9), (2, 13)):
        torch.manual_seed(seed)
        output = model.generate(ids, max_new_tokens=budget, do_sample=True, **few(model))
        assert output.sequences.shape[1] <= budget
        found += sum(len(model.signal_tokens.find_spans(output.sequences, key)) for key in model.decoder_keys)
        beams = model.generate(ids, max_new_tokens=budget, num_beams=2, **few(model)).sequences
        found += sum(len(model.signal_tokens.find_spans(beams, key)) for key in model.decoder_keys)
    assert found > 10


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_require_and_forbid(full_model, options):
    model, processor = full_model
    batch = tokenize(processor, PROMPTS)
    output = model.generate(**batch, max_new_tokens=9, require=["video", "image", "audio"], **few(model), **options)
    assert all(sorted(s.key for s in row) == ["audio", "image", "video"] for row in spans_of(output))
    assert output.sequences.shape == (3, 9), "9 tokens are exactly the three spans"
    output = model.generate(**batch, max_new_tokens=9, forbid=["video", "image", "audio"], **options)
    assert not any(spans_of(output))
    for answer in (model.generate(**batch, max_new_tokens=6, require=["image"], **few(model), **options)).answers:
        assert len(answer.images) == 1


def test_wishes_that_cannot_be_met_are_errors(full_model):
    model, processor = full_model
    batch = tokenize(processor, PROMPTS)
    with pytest.raises(InputError, match=r"max_new_tokens=5 has no room for the 6 signal tokens.*image, audio"):
        model.generate(**batch, max_new_tokens=5, require=["image", "audio"])
    with pytest.raises(InputError, match="no decoder smell; there are"):
        model.generate(**batch, max_new_tokens=5, require=["smell"])
    with pytest.raises(InputError, match=r"image.*required.*forbidden"):
        model.generate(**batch, max_new_tokens=9, require=["image"], forbid=["image"])
    with pytest.raises(InputError, match="max_new_tokens is not set"):
        model.generate(**batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"past_key_values": [1]}, "no past_key_values here: the prompt is read as a whole"),
        ({"streamer": object()}, "no streamer here: use on_event"),
        ({"stop_strings": ["a"]}, "no stop_strings here: use stop"),
        ({"return_dict_in_generate": True}, "no return_dict_in_generate here"),
        ({"prefix_allowed_tokens_fn": lambda row, said: [3]}, "for one row at a time"),
        ({"stop": "ring"}, r"stop is the text 'ring'; give a list of texts, as \['ring'\]"),
        ({"stop": ["ring"], "require": ["image"]}, "stop and require exclude each other"),
        *(({"stop": stop}, "a list of texts of at least one character") for stop in ([""], [1])),
        ({"seeds": [1, 2]}, "this is greedy search; set do_sample=True"),
        *(({"seeds": seeds, "do_sample": True}, "seeds are .* for 2 rows") for seeds in ([1], [1, 2, 3], [-1, 2], 3)),
        *(
            ({"budgets": budgets}, "budgets are .* for 2 rows")
            for budgets in ([3], [3, 4, 5], [0, 4], [-3, 4], [2.5, 4])
        ),
        ({"position_ids": torch.zeros(2, 3)}, "no position_ids here: positions follow from attention_mask"),
        ({"inputs_embeds": torch.zeros(2, 3, 4)}, "no inputs_embeds here"),
        ({"custom_generate": "a/repository"}, "no custom_generate here"),
        ({"guidance_scale": 3.0}, "no guidance_scale here: media are guided by decoder_kwargs"),
        ({"generation_config": GenerationConfig(guidance_scale=3.0)}, "no guidance_scale here"),
        ({"negative_prompt_ids": torch.zeros(2, 3)}, "no negative_prompt_ids here"),
        *(({f"output_{name}": True}, f"no output_{name} here") for name in ("scores", "hidden_states", "attentions")),
        ({"items_per_row": {"smell": [1, 1]}}, "items_per_row names 'smell'; there are"),
    ],
)
def test_options_that_would_do_something_else_are_refused(full_model, options, message):
    model, processor = full_model
    with pytest.raises(InputError, match=message):
        model.generate(**tokenize(processor, ["a", "b"]), max_new_tokens=9, **options)


def test_a_turn_ends_where_the_template_ends_it(tiny_model):
    """As base models in ChatML have another end of text than their template's end of a turn."""
    model, processor = tiny_model((), ())
    tokenizer = processor.llm_tokenizer
    end = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}" + end + "\n{% endfor %}"
    )
    tokenizer.eos_token = tokenizer.pad_token
    processor.register(model)
    assert model.end_of_turn == tokenizer.convert_tokens_to_ids(end)
    model.language_model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.language_model.get_output_embeddings().weight.data[model.end_of_turn] *= 0
    bias = torch.zeros(model.language_model.config.vocab_size).index_fill(0, torch.tensor(model.end_of_turn), 1e4)
    output = model.generate(
        **tokenize(processor, ["a"]), max_new_tokens=6, logits_processor=[lambda said, scores: scores + bias]
    )
    assert output.sequences.tolist() == [[model.end_of_turn]] and output.lengths == [1]


def test_the_space_behind_a_medium_is_kept():
    """A tokenizer of Llama's kind drops the first space of whatever it decodes."""
    words = ["<unk>", "▁a", "▁there", "▁is", "[IMG0]"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = tokenizer_decoders.Sequence(
        [tokenizer_decoders.Replace("▁", " "), tokenizer_decoders.Fuse(), tokenizer_decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["[IMG0]"]})
    model = SimpleNamespace(tokenizer=tokenizer)
    assert tokenizer.decode([2, 3]) == text_of(model, [2, 3]) == "there is"
    assert text_of(model, [2, 3], continued=True) == " there is" and text_of(model, [], continued=True) == ""


def test_required_decoder_without_known_ids_is_an_error(tiny_model):
    model, processor = tiny_model((), ("image",))
    model.signal_tokens.ids = {}
    with pytest.raises(InputError, match="ids"):
        model.generate(**tokenize(processor, ["a"]), max_new_tokens=9, require=["image"])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "group_beam_search"),
        ({"num_return_sequences": 2, "do_sample": True}, "sample"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
    ],
)
def test_other_modes_are_refused_by_name(full_model, options, name):
    model, processor = full_model
    with pytest.raises(InputError, match=name):
        model.generate(**tokenize(processor, ["a"]), max_new_tokens=4, **options)


def test_media_are_what_the_decoder_samples_from_that_condition(full_model):
    """Text and media in the order said, each from its own span, with the generator that was given."""
    model, processor = full_model
    batch = tokenize(processor, PROMPTS[:2])
    kwargs = {
        key: {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(7)} for key in model.decoder_keys
    }
    output = model.generate(**batch, max_new_tokens=14, require=["image", "video", "audio"], decoder_kwargs=kwargs)
    for key, form in (("image", "images"), ("video", "videos"), ("audio", "audios")):
        mine = [s for answer in output.answers for s in answer.segments if s.key == key]
        again = model.decoders[key].module.sample(
            torch.stack([s.condition for s in mine]), num_inference_steps=2, generator=torch.Generator().manual_seed(7)
        )
        for segment, content in zip(mine, again, strict=True):
            assert np.array_equal(np.array(segment.content), np.array(content))
        assert [len(row) for row in getattr(output, form)] == [
            sum(s.key == key for s in answer.segments) for answer in output.answers
        ]
    for answer, ids in zip(output.answers, output.sequences.tolist(), strict=True):
        said = [key for i in ids for key, span in model.signal_tokens.ids.items() if i == span[0]]
        assert [s.key for s in answer.segments if s.key] == said
        assert answer.text == processor.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_sliding_windows_do_not_see_the_neighbours_spans(tiny_model, parts, kind):
    """A row that waits while another says a span must not lose a part of its window."""
    sizes = {
        "vocab_size": 1000,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 8,
        "pad_token_id": 0,
        "eos_token_id": EOS,
    }
    torch.manual_seed(0)
    cls, config = {"mistral": (MistralForCausalLM, MistralConfig), "gemma2": (Gemma2ForCausalLM, Gemma2Config)}[kind]
    model, _processor = tiny_model((), ("image",), language_model=enlarge(cls(config(**sizes)), 6.0).eval())
    make_talkative(model, "image", 3.0 if kind == "mistral" else 40.0)
    ids = torch.randint(10, 900, (8, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"max_new_tokens": 16, "require": ["image"], **few(model)}
    together = model.generate(ids, mask, **options)
    first = model.signal_tokens.ids["image"][0]
    assert len({row.index(first) for row in together.sequences.tolist()}) > 2, "spans should begin at different steps"
    for row in range(len(ids)):
        kept = mask[row].bool()
        alone = model.generate(ids[row : row + 1, kept], **options)
        assert together.sequences[row].tolist() == alone.sequences[0].tolist()
        for one, other in zip(spans_of(alone)[0], spans_of(together)[row], strict=True):
            assert (one.states - other.states).abs().max() < 1e-5
        conditions = model(torch.cat([ids[row : row + 1, kept], alone.sequences], dim=1)).conditions["image"]
        assert (torch.stack([s.condition for s in spans_of(alone)[0]]) - conditions).abs().max() < 1e-5
