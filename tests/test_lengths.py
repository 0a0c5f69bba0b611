"""Lengths in tokens: counted as the collator makes them, and what becomes of rows that are too long."""

import json

import pytest
import torch
from PIL import Image
from test_validate_data import main  # noqa: F401 (a fixture)

from anygpt import InputError
from anygpt.data import ConversationDataset, read_samples, write_image
from anygpt.data.collation import BAD, CUT, SAMPLE_IDS, TARGET_IDS, Collator
from anygpt.data.lengths import Lengths
from anygpt.training.config import parse_config
from anygpt.training.loading import BadSampleError, take_ids


def part(**more):
    return {"type": "image", "path": "a.png", **more}


def text(words):
    return {"type": "text", "text": " ".join(["what"] * words)}


TURN = [
    {"role": "user", "content": [part(), text(3)]},
    {"role": "assistant", "content": [text(2), part(caption="a ring")]},
]
ROWS = [
    {"id": "short", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"id": "turns", "messages": TURN * 3},
    {"id": "wordy", "messages": [{"role": "user", "content": [text(300)]}, *TURN[1:]]},
]


@pytest.fixture
def world(tiny_model, tmp_path):
    write_image(tmp_path / "a.png", Image.new("RGB", (8, 8), "red"))
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return (*tiny_model(("image",), ("image",)), path)


def length_of(processor, path, row):
    return Lengths(processor).of(read_samples(path)[row])


def test_lengths_are_those_of_the_collators_rows(world):
    _, processor, path = world
    samples = read_samples(path)
    items = [ConversationDataset(samples)[i] for i in range(3)]
    batch = Collator(processor)(items)
    lengths = [Lengths(processor).of(sample) for sample in samples]
    assert lengths == batch["attention_mask"].sum(dim=1).tolist()
    estimated = Lengths(processor).estimate(samples)
    assert estimated.tolist() == lengths  # three rows, three coefficients
    short, turns, wordy = Lengths(processor).estimate(samples, measured=0)
    assert short < turns and short < wordy and 3 * (17 + 4) < turns < lengths[1]


def test_a_long_row_is_left_out_or_cut_behind_a_turn(world):
    model, processor, path = world
    dataset = ConversationDataset(read_samples(path))
    items = [dataset[i] for i in range(3)]
    one, two = (length_of_turns(processor, path, turns) for turns in (1, 2))
    for limit, turns in ((two, 2), (two + 1, 2), (two - 1, 1), (one, 1)):
        batch = Collator(processor, limit, cut=True)(items)
        assert batch[SAMPLE_IDS] == ["short", "turns"] and batch[CUT] == ["turns"]
        assert [(bad.id, bad.kind) for bad in batch[BAD]] == [("wordy", "long")]
        assert "its first turn does not fit either" in batch[BAD][0].reason and "d.jsonl:3" in batch[BAD][0].reason
        assert len(batch["pixel_values"]) == len(batch["decoder_targets"]["image"]["captions"]) == turns
        assert batch[TARGET_IDS] == {"image": [f"turns/image/{i}" for i in range(turns)]}
        ids = {name: batch.pop(name) for name in (SAMPLE_IDS, TARGET_IDS, BAD, CUT)}
        with torch.no_grad():
            losses = model(**batch).losses  # spans and targets, placeholders and features fit
        assert losses["encoder_decoder/alignment/image"].count == turns and ids
    batch = Collator(processor, one - 1, cut=True)(items)
    assert batch[SAMPLE_IDS] == ["short"] and len(batch[BAD]) == 2
    left_out = Collator(processor, two)(items)
    assert left_out[SAMPLE_IDS] == ["short"] and left_out[CUT] == [] and "pixel_values" not in left_out


def length_of_turns(processor, path, turns):
    row = ROWS[1] | {"messages": TURN * turns}
    other = path.with_name("e.jsonl")
    other.write_text(json.dumps(row))
    return length_of(processor, other, 0)


@pytest.mark.parametrize(("policy", "stops"), [("error", True), ("skip", False), ("cut", False)])
def test_the_loop_stops_at_long_rows_only_if_it_should(world, tmp_path, policy, stops):
    _, processor, path = world
    (tmp_path / "c.yaml").write_text("model: {init_from: x}\n")
    config = parse_config(
        [f"--config={tmp_path}/c.yaml", f"--data.train=[{{path: {path}}}]", f"--data.on_long_sample={policy}"]
    )
    dataset = ConversationDataset(read_samples(path))
    limit = length_of(processor, path, 1) - 1
    batch = Collator(processor, limit, cut=policy == "cut")([dataset[i] for i in range(3)])
    if stops:
        with pytest.raises(BadSampleError, match=rf"jsonl:2 \(sample 'turns'\) has .* tokens .*max_length = {limit}"):
            take_ids(batch, config)
    else:
        ids = take_ids(batch, config)
        assert len(ids[BAD]) == (1 if policy == "cut" else 2) and ids[CUT] == (["turns"] if policy == "cut" else [])


def test_a_conversation_that_the_template_refuses_is_a_bad_sample(world):
    _, processor, path = world
    processor.llm_tokenizer.chat_template = "{{ raise_exception('no systems') }}"
    dataset = ConversationDataset(read_samples(path))
    batch = Collator(processor)([dataset[0]])
    assert batch[SAMPLE_IDS] == [] and "d.jsonl:1" in batch[BAD][0].reason and "no systems" in batch[BAD][0].reason


def test_the_validator_counts_tokens(world, main, tmp_path, capsys):  # noqa: F811
    _, processor, path = world
    processor.save_pretrained(tmp_path / "final")
    lengths = [length_of(processor, path, i) for i in range(3)]
    command = [str(path), "--processor", str(tmp_path / "final")]
    for workers in ("0", "2"):
        assert main([*command, "--max-tokens", str(lengths[1]), "--deep", "--num-workers", workers]) == 1
        shown = capsys.readouterr().out
        assert f"{path}:3 (sample 'wordy') has {lengths[2]} tokens including its media's" in shown
        assert shown.count("too long") == 1 and f"{sum(lengths)}" in shown and f"{max(lengths)}" in shown
    assert main(command) == 0
    path.write_text(json.dumps({"messages": [{"role": "user", "content": [part() | {"type": "audio"}]}, *TURN[1:]]}))
    assert main(command) == 1
    assert "no encoder reads 'audio'" in capsys.readouterr().out
    token = processor.tokens["image"]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": f"what is {token}?"}, *TURN[1:]]}))
    assert main(command) == 1
    assert f"contains {token!r}, which is a reserved token" in capsys.readouterr().out
    assert main([str(path), "--processor", str(tmp_path)]) == 2
    with pytest.raises(SystemExit):
        main([str(path), "--max-tokens", "3"])


def test_features_of_inputs_that_differ_are_counted_on_the_media(world, monkeypatch):
    """Where an encoder gives each input features of its own number, a blank one would not do."""
    _, processor, path = world
    lengths = Lengths(processor)
    assert lengths.is_fixed("image") and lengths.features("image", path.with_name("gone.png")) == 17
    processor.num_feature_funcs["image"] = lambda inputs, outputs: [inputs["images"][0].width]
    assert lengths.features("image", path.with_name("a.png")) == 8
    with pytest.raises(InputError, match="does not exist"):
        lengths.features("image", path.with_name("gone.png"))
