"""Data as people have them: repeated ids, archives of other tools, linked snapshots, lists, media that parts refuse."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import enlarge
from PIL import Image
from tiny_parts import ENCODERS, LLAMA
from torch.utils.data import DataLoader

from anygpt import InputError, ModalEncoderModule, MultimodalModel, MultimodalProcessor
from anygpt.data import ConversationDataset, DataSource, UpdateSampler, read_media, read_samples, write_audio
from anygpt.data.collation import Collator
from anygpt.data.lengths import Lengths
from anygpt.data.validation import validate
from anygpt.evaluation.rows import rows_of
from anygpt.evaluation.suite import Ask


def png(colour="red", size=(4, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def lines(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(*parts, answer="yes", **more) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}], **more}


def image(path="a.png", **more) -> dict:
    return {"type": "image", "path": path, **more}


# ------------------------------------------------------------------------------------------------------------ ids


def test_ids_are_labels(tmp_path):
    """One picture, several conversations; and a label that is what a number would make of another."""
    (tmp_path / "a.png").write_bytes(png())
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    rows = [{"id": name, "image": "a.png", "conversations": turns} for name in ("7", "7", "7-2", "7", 7, "8")]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    for faults in (None, []):
        samples = read_samples(tmp_path / "d.json", "llava", faults=faults)
        assert [sample.id for sample in samples] == ["7", "7-3", "7-2", "7-4", "7-5", "8"] and not faults
    report = validate(DataSource(tmp_path / "d.json", "llava"))
    assert (report.samples, report.repeated_ids, report.faults) == (6, 3, {})
    sources = [DataSource(str(tmp_path / "d.json"), "llava")] * 2
    names = [sample.id for sample in ConversationDataset.from_files(sources, on_bad_sample="skip").samples]
    assert len(set(names)) == 12


# --------------------------------------------------------------------------------------------------------- archives


def shard(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            info.size = len(content) if isinstance(content, bytes) else 0
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def entry(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, "x"
    return info


ARCHIVES = {
    "a Mac's": {"._0.png": b"\0\5", "0.png": png(), "._0.txt": b"\0\5", "0.txt": b"c", "__MACOSX/._0.png": b"\0"},
    "of a folder": {"./": entry(tarfile.DIRTYPE), "./0.png": png(), "./0.txt": b"c", "./.DS_Store": b"1"},
    "absolute names": {"/data/0.png": png(), "/data/0.txt": b"c"},
    "names upwards": {"../data/0.png": png(), "../data/0.txt": b"c"},
    "metadata": {"__index__.json": b"{}", "__meta__/x.png": b"1", "__x__": b"1", "0.png": png(), "0.txt": b"c"},
    "without a suffix": {"LICENSE": b"x", "Makefile": b"", "0.png": png(), "0.txt": b"c"},
    "links": {"0.jpg": entry(tarfile.SYMTYPE), "0.png": png(), "0.txt": b"c", "0.cls": entry(tarfile.LNKTYPE)},
    "upper case": {"0.PNG": png(), "0.TXT": b"c"},
    "several dots": {"0.v1.png": png(), "0.v1.txt": b"c"},
    "fields of other names": {"0.png": png(), "0.seg.png": png("blue"), "0.mask.jpg": b"1", "0.txt": b"c"},
    "caption under another name": {"0.png": png(), "0.text": b"c", "0.cls": b"3"},
    "caption in jsn": {"0.png": png(), "0.jsn": b'{"caption": "c"}'},
    "folders with dots": {"v1.0/a.b/0.png": png(), "v1.0/a.b/0.txt": b"c"},
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_archives_of_other_tools(tmp_path, what):
    """What the `webdataset` library passes over or accepts."""
    (sample,) = read_samples(shard(tmp_path / "s.tar", ARCHIVES[what]), task="generation")
    (part,) = sample.messages[1].content
    assert part.caption == "c" and read_media("image", part.path).getpixel((0, 0)) == (255, 0, 0)


def test_a_key_that_comes_again_is_another_sample(tmp_path):
    """As in shards that were put one behind the other."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in [("0.png", png()), ("0.txt", b"a"), ("1.png", png()), ("1.txt", b"b")] * 2:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    samples = read_samples(tmp_path / "s.tar", task="generation")
    assert [sample.id for sample in samples] == ["s/0", "s/1", "s/0-2", "s/1-2"]


def test_an_unknown_medium_is_named(tmp_path):
    path = shard(tmp_path / "s.tar", {"0.jxl": b"1", "0.txt": b"c"})
    with pytest.raises(InputError, match=r"end in jxl, txt, media in \.png"):
        read_samples(path, task="generation")


# ------------------------------------------------------------------------------------------------------------- links


def test_links_are_followed_where_that_is_asked_for(tmp_path):
    """A snapshot of the hub's cache, whose files are links into its blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/0a1b").write_bytes(png())
    folder = tmp_path / "snapshots/main"
    (folder / "images").mkdir(parents=True)
    (folder / "images/a.png").symlink_to("../../../blobs/0a1b")
    lines(tmp_path / "blobs/data", asked(image("images/a.png")))
    (folder / "d.jsonl").symlink_to("../../blobs/data")
    with pytest.raises(InputError, match=r"not inside the media root .* or set follow_links"):
        read_samples(folder / "d.jsonl")
    dataset = ConversationDataset.from_files([DataSource(str(folder / "d.jsonl"), follow_links=True)])
    assert dataset[0].inputs["image"][0].getpixel((0, 0)) == (255, 0, 0)
    assert validate(DataSource(folder / "d.jsonl", follow_links=True), deep=True).samples == 1
    for name in ("../../blobs/0a1b", str(tmp_path / "blobs/0a1b"), "images/../../../blobs/0a1b"):
        with pytest.raises(InputError, match="not inside the media root"):
            read_samples(lines(folder / "bad.jsonl", asked(image(name))), follow_links=True)


# ------------------------------------------------------------------------------------------------------------- lists


@pytest.fixture
def table(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    stored = [{"bytes": png(colour), "path": None} for colour in ("red", "blue", "white")]
    (tmp_path / "c.png").write_bytes(png("lime"))
    rows = {
        "images": [stored[:2], stored[2:]],
        "files": [["c.png", "c.png"], ["c.png"]],
        "image": stored[:2],
        "captions": [["a red thing", "red it is"], ["blue", "so blue"]],
        "question": ["<image> or\n<image>, which?", "What?"],
    }
    text = datasets.Value("string")
    features = {"images": datasets.List(datasets.Image()), "image": datasets.Image(), "question": text}
    features |= {"files": datasets.List(text), "captions": datasets.List(text)}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


def shown(message):
    return [part.text or (part.path and read_media("image", part.path).getpixel((0, 0))) for part in message.content]


def test_lists_of_media_stand_in_the_order_of_their_placeholders(table):
    columns = {"image": "images", "text": "question", "prompt": "question"}
    first, second = read_samples(table, columns=columns, task="comprehension")
    assert shown(first.messages[0]) == [(255, 0, 0), " or", (0, 0, 255), ", which?"]
    assert shown(second.messages[0]) == [(255, 255, 255), "What?"]
    columns["image"] = "files"
    first, _ = read_samples(table, columns=columns, task="comprehension")
    assert shown(first.messages[0]) == [(0, 255, 0), " or", (0, 255, 0), ", which?"]
    with pytest.raises(InputError, match=r"2 '<image>' marker\(s\) for 1 media"):
        read_samples(table, columns=columns | {"image": "image"}, task="comprehension")


def test_one_of_several_captions_is_drawn_by_seed_and_epoch(table):
    """Both the wish and the target; evaluation has them all."""
    source = DataSource(str(table), columns={"image": "image", "text": "captions"}, task="generation")
    dataset = ConversationDataset.from_files([source])
    assert [sample.wordings for sample in dataset.samples] == [2, 2]
    target = dataset.samples[0].messages[1].content[0]
    assert (target.caption, *target.others) == ("a red thing", "red it is")

    def epochs(seed, workers=0, batch_size=2, start=0, **grouping):
        options = {"batch_size": batch_size, "num_updates": 40 // batch_size, "start_update": start}
        sampler = UpdateSampler(len(dataset), seed=seed, **options, **grouping)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=list, num_workers=workers)
        items = [item for batch in loader for item in batch]
        for item in items:
            asked_for = item.sample.messages[0].content[0].text
            assert asked_for == f"Make this image: {item.captions['image'][0]}"
        return [item.captions["image"][0] for item in items]

    seen = epochs(0)
    assert set(seen) == {"a red thing", "red it is", "blue", "so blue"}
    assert seen == epochs(0, workers=2) == epochs(0, batch_size=1) and seen != epochs(1)
    assert epochs(0, start=10) == seen[20:]
    assert set(epochs(0, groups=[0, 1])) == set(seen)


def test_all_wordings_of_an_answer_are_references_of_an_evaluation(table):
    columns = {"image": "image", "text": "captions"}
    sample, _ = read_samples(table, columns=columns, task="comprehension")
    (row,) = rows_of(sample, Ask())
    assert row.references == ("a red thing", "red it is")


def test_lists_of_texts_in_rows_of_json(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    target = [image(caption=["a", "b"])]
    path = lines(tmp_path / "d.jsonl", asked({"type": "text", "text": ["Draw a.", "Draw b."]}, answer=target))
    (sample,) = read_samples(path)
    assert [[m.content[0].text or m.content[0].caption for m in sample.worded(i).messages] for i in range(3)] == [
        ["Draw a.", "a"],
        ["Draw b.", "b"],
        ["Draw a.", "a"],
    ]
    lines(path, asked({"type": "text", "text": ["x", "y", "z"]}, answer=target))
    with pytest.raises(InputError, match=r"d\.jsonl:1 .*lists of wordings have 2 and 3 entries"):
        read_samples(path)


def test_several_targets_have_a_caption_each(table):
    columns = {"image": "images", "text": "captions"}
    faults = []
    (sample,) = read_samples(table, columns=columns, task="generation", faults=faults)[:1]
    assert [part.caption for part in sample.messages[1].content] == ["a red thing", "red it is"]
    assert sample.wordings == 1


# ------------------------------------------------------------------------------------------ what processors refuse


def reader(parts, label):
    """A model with one encoder, and its processor."""
    encoder = next(encoder for encoder in ENCODERS if encoder.label == label)
    model = MultimodalModel({encoder.modality: ModalEncoderModule(enlarge(encoder.build()))}, LLAMA.build())
    return model, MultimodalProcessor({encoder.modality: encoder.build_processor()}, parts.tokenizer(), model=model)


@pytest.mark.parametrize("label", ["Qwen2-VL vision", "Pixtral"])
def test_what_a_processor_refuses_is_its_rows_fault(tmp_path, parts, label):
    """A picture of 900 × 2: in training, in validation, and in chat."""
    _, processor = reader(parts, label)
    (tmp_path / "thin.png").write_bytes(png(size=(900, 2)))
    (tmp_path / "a.png").write_bytes(png(size=(24, 24)))
    rows = [asked(image(name), {"type": "text", "text": "What?"}) for name in ("a.png", "thin.png", "a.png")]
    path = lines(tmp_path / "d.jsonl", *rows)
    dataset = ConversationDataset(read_samples(path))
    batch = Collator(processor)([dataset[i] for i in range(3)])
    assert batch["sample_ids"] == ["d-0", "d-2"] and len(batch["input_ids"]) == 2
    (bad,) = batch["bad_samples"]
    assert f"{path}:2 (sample 'd-1'): the 'image' encoder's" in bad.reason and bad.kind == "bad"
    alone = Collator(processor)([dataset[0], dataset[2]])
    assert torch.equal(batch["input_ids"], alone["input_ids"])
    faults = []
    assert validate(DataSource(path), deep=True, lengths=Lengths(processor), on_fault=faults.append).samples == 2
    assert f"{path}:2 (sample 'd-1'): the 'image' encoder's" in str(faults[0])
    content = [{"type": "image", "image": Image.open(tmp_path / "thin.png")}, {"type": "text", "text": "What?"}]
    with pytest.raises(InputError, match=r"the 'image' encoder's .* refuses it"):
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)


def test_what_an_encoders_forward_refuses_is_one_line_in_chat(parts):
    """A picture that is left at another size than the encoder's."""
    model, processor = reader(parts, "CLIP")
    for step in ("do_resize", "do_center_crop"):
        setattr(processor.encoder_processors["image"], step, False)
    content = [{"type": "image", "image": Image.new("RGB", (48, 24))}, {"type": "text", "text": "What?"}]
    batch = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
    with pytest.raises(InputError, match=r"the 'image' encoder's CLIPVisionModel refuses it: Input image size"):
        model.generate(**batch, max_new_tokens=1)


# --------------------------------------------------------------------------------------------------- repeatable draws


def test_a_processor_that_draws_gives_an_input_the_same_tensors(tmp_path, parts):
    """CLAP takes a random part of a long sound, were it not split: the same tensors in any batch, worker and order."""
    _, processor = reader(parts, "CLAP")
    rate = processor.encoder_processors["audio"].sampling_rate
    seconds = processor.encoder_processors["audio"].nb_max_samples / rate
    for i in range(3):
        sound = np.random.default_rng(i).standard_normal((1, int(rate * seconds * (0.5 + i)))).astype(np.float32)
        write_audio(tmp_path / f"{i}.wav", 0.1 * sound, rate)
    rows = [asked({"type": "audio", "path": f"{i}.wav"}, {"type": "text", "text": "What?"}) for i in range(3)]
    dataset = ConversationDataset(read_samples(lines(tmp_path / "d.jsonl", *rows)))
    collate = Collator(processor)
    before = np.random.get_state()[1].copy()
    alone = [collate([dataset[i]])["input_features"] for i in range(3)]
    assert [len(windows) for windows in alone] == [1, 2, 3]
    for workers, order in ((0, [0, 1, 2]), (0, [2, 0, 1]), (2, [2, 1, 0])):
        loader = DataLoader(dataset, batch_sampler=[order], collate_fn=collate, num_workers=workers)
        (batch,) = list(loader)
        assert torch.equal(batch["input_features"], torch.cat([alone[i] for i in order]))
    assert np.array_equal(np.random.get_state()[1], before)  # nobody else's draws are changed
