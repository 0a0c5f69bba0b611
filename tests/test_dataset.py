"""The dataset of conversations, and the sampler that decides what each update sees."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from anygpt.data import (
    BadSample,
    ConversationDataset,
    DataSource,
    UpdateSampler,
    read_samples,
    write_audio,
    write_image,
    write_video,
)
from anygpt.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_image(tmp_path / "a.png", Image.new("RGB", (8, 6), "red"))
    write_image(tmp_path / "b.png", Image.new("RGB", (4, 4), "blue"))
    write_video(tmp_path / "a.mp4", np.zeros((9, 16, 16, 3), np.uint8), 10)
    write_audio(tmp_path / "a.wav", np.zeros((2, 800), np.float32), 16000)
    (tmp_path / "broken.png").write_text("no picture")
    return tmp_path


def row(*media: str, targets: tuple[str, ...] = (), **more) -> dict:
    def parts(names):
        kinds = {".png": "image", ".mp4": "video", ".wav": "audio"}
        return [{"type": kinds[Path(name).suffix], "path": name} for name in names]

    answer = [{"type": "text", "text": "Here."}] + [part | {"caption": f"of {part['path']}"} for part in parts(targets)]
    question = [*parts(media), {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def data_file(path: Path, *rows: dict) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_media_come_in_order_and_each_file_is_decoded_once(folder, monkeypatch):
    samples = read_samples(
        data_file(folder / "d.jsonl", row("b.png", "a.png", "a.mp4", "b.png", targets=("a.png", "a.wav")))
    )
    dataset = ConversationDataset(samples, num_video_frames=4)
    reads = Counter()
    read = dataset.decode
    monkeypatch.setattr(dataset, "decode", lambda *args: (reads.update([args[-1].name]), read(*args))[1])
    loaded = dataset[0]
    assert [image.size for image in loaded.inputs["image"]] == [(4, 4), (8, 6), (4, 4)]
    assert loaded.inputs["video"][0].frames.shape == (4, 16, 16, 3)
    assert [image.size for image in loaded.targets["image"]] == [(8, 6)]
    assert loaded.targets["audio"][0].waveform.shape == (2, 800)
    assert loaded.captions == {"image": ["of a.png"], "audio": ["of a.wav"]}
    assert set(reads.values()) == {1} and len(reads) == 4


def test_a_sample_that_cannot_be_decoded_is_an_error_or_a_bad_sample(folder):
    path = data_file(folder / "d.jsonl", row("a.png"), row(targets=("broken.png",), id="b"))
    with pytest.raises(InputError, match=rf"{path}:2 \(sample 'b'\), target image: .*broken\.png cannot be read"):
        ConversationDataset(read_samples(path))[1]
    bad = ConversationDataset(read_samples(path), on_bad_sample="skip")[1]
    assert isinstance(bad, BadSample) and bad.id == "b" and "broken.png" in bad.reason


def test_skip_leaves_bad_rows_out_when_reading(folder):
    path = data_file(folder / "d.jsonl", row("a.png"), row("gone.png"), row(id=""))
    dataset = ConversationDataset.from_files([DataSource(path)], on_bad_sample="skip")
    assert (len(dataset), dataset.lengths, len(dataset.faults)) == (1, [1], 2)
    with pytest.raises(InputError, match="'id' is empty"):
        ConversationDataset.from_files([DataSource(path)])
    with pytest.raises(InputError, match=r"no usable row, and the first fault is: .*gone\.png"):
        ConversationDataset.from_files(
            [DataSource(data_file(folder / "e.jsonl", row("gone.png")))], on_bad_sample="skip"
        )


def test_files_are_joined_with_unique_ids(folder):
    root = str(folder)
    sources = [
        DataSource(data_file(folder / "x" / "a.jsonl", row(id="1"), row(id="2")), media_root=root, weight=0.5),
        DataSource(data_file(folder / "y" / "b.jsonl", row(id="2"), row(id="3")), media_root=root),
        DataSource(data_file(folder / "z" / "b.jsonl", row(id="2")), media_root=root),
    ]
    dataset = ConversationDataset.from_files(sources)
    assert [s.id for s in dataset.samples] == ["1", "2", "2-2", "3", "2-3"]
    assert (dataset.lengths, dataset.weights) == ([2, 2, 1], [0.5, 1.0, 1.0])


def test_the_dataset_checks_what_it_is_given(folder):
    samples = read_samples(data_file(folder / "d.jsonl", row("a.png")))
    with pytest.raises(InputError, match="no samples"):
        ConversationDataset([])
    assert [sample.id for sample in ConversationDataset(samples * 3).samples] == ["d-0", "d-0-2", "d-0-3"]
    with pytest.raises(InputError, match="on_bad_sample is 'ignore'"):
        ConversationDataset(samples, on_bad_sample="ignore")


def test_it_works_in_a_data_loader_with_workers(folder):
    dataset = ConversationDataset(read_samples(data_file(folder / "d.jsonl", *[row("a.png", "a.mp4")] * 4)))
    sampler = UpdateSampler(len(dataset), batch_size=2, num_updates=2)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=1, collate_fn=list)
    assert [[x.sample.id for x in batch] for batch in loader] == [
        [f"d-{i}" for i in batch] for batch in indices(sampler)
    ]


# -- sampler ---------------------------------------------------------------------------------------------


def indices(sampler: UpdateSampler) -> list[list[int]]:
    return [[index for index, _ in batch] for batch in sampler]


def flat(sampler: UpdateSampler) -> list[int]:
    return [index for index, _ in chain.from_iterable(sampler)]


def test_every_epoch_visits_every_sample_once_in_another_order():
    order = flat(UpdateSampler(10, batch_size=4, num_updates=5, seed=3))  # 20 positions, 2 epochs
    first, second = order[:10], order[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second and first != list(range(10))
    assert flat(UpdateSampler(10, batch_size=4, num_updates=5, seed=4)) != order


def test_resuming_gives_what_the_uninterrupted_run_gives():
    settings = {"batch_size": 3, "gradient_accumulation_steps": 2, "num_updates": 9, "seed": 1}
    whole = list(UpdateSampler(7, **settings))
    for start in range(10):
        sampler = UpdateSampler(7, start_update=start, **settings)
        assert list(sampler) == whole[2 * start :]
        assert len(sampler) == len(whole) - 2 * start


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_same_samples_under_any_split(accumulation):
    settings = {"num_updates": 6, "seed": 5, "gradient_accumulation_steps": accumulation}
    alone = list(UpdateSampler(11, batch_size=4, **settings))
    ranks = [list(UpdateSampler(11, batch_size=2, rank=r, world_size=2, **settings)) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == alone
    whole = UpdateSampler(11, batch_size=4 * accumulation, num_updates=6, seed=5)
    assert flat(whole) == flat(alone)


def test_weights_say_how_often_an_epoch_draws_from_a_dataset():
    sampler = UpdateSampler([10, 4, 6], weights=[0.5, 2.5, 0], batch_size=5, num_updates=6)  # 15 draws, 2 epochs
    order = flat(sampler)
    epochs = [Counter(order[:15]), Counter(order[15:])]
    for counts in epochs:
        assert sum(counts[i] for i in range(10)) == 5 and max(counts[i] for i in range(10)) == 1
        assert sorted(counts[i] for i in range(10, 14)) == [2, 2, 3, 3]
        assert not any(counts[i] for i in range(14, 20))
    assert epochs[0] != epochs[1]  # the random part is drawn anew


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1, 1]}, "1 datasets and 2 weights"),
        ({"weights": [-1]}, "weight of dataset 0 is -1"),
        ({"weights": [float("nan")]}, "weight of dataset 0 is nan"),
        ({"weights": [0.01]}, "rounds to none: raise it to 0.1 or more"),
        ({"weights": [0]}, "all weights are 0"),
    ],
)
def test_the_sampler_checks_its_settings(settings, message):
    with pytest.raises(InputError, match=message):
        UpdateSampler(**{"lengths": 10, "batch_size": 2, "num_updates": 5} | settings)


# -- groups and sizes -------------------------------------------------------------------------------------

GROUPS = [0] * 13 + [1] * 5 + [2] * 9
SIZES = [(i * 7) % 27 for i in range(27)]
GROUPED = {"groups": GROUPS, "sizes": SIZES, "seed": 2}


def test_batches_of_one_group_visit_every_sample_once_an_epoch():
    batches = indices(UpdateSampler([20, 7], batch_size=4, num_updates=18, **GROUPED))  # 4 + 2 + 3 batches, twice
    for epoch in (batches[:9], batches[9:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(27))
        assert all(len({GROUPS[index] for index in batch}) == 1 for batch in epoch)
    assert batches[:9] != batches[9:]
    kinds = [GROUPS[batch[0]] for batch in batches[:9]]
    assert kinds != sorted(kinds)  # the groups are mixed in time


def test_batches_of_about_one_size():
    batches = indices(UpdateSampler(27, batch_size=3, num_updates=9, sizes=SIZES, seed=2))
    assert sorted(index for batch in batches for index in batch) == list(range(27))
    assert max(max(SIZES[i] for i in batch) - min(SIZES[i] for i in batch) for batch in batches) == 2
    firsts = [SIZES[batch[0]] for batch in batches]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_grouped_batches_resume_and_split_as_others_do(accumulation):
    settings = {"num_updates": 10, "gradient_accumulation_steps": accumulation, **GROUPED}
    alone = list(UpdateSampler(27, batch_size=4, **settings))
    assert list(UpdateSampler(27, batch_size=4, start_update=7, **settings)) == alone[7 * accumulation :]
    ranks = [list(UpdateSampler(27, batch_size=2, rank=r, world_size=2, **settings)) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == alone


def test_output_groups(folder):
    rows = [row("a.png"), row(targets=("a.png",)), row("a.wav"), row(targets=("a.wav",)), row(targets=("b.png",) * 2)]
    dataset = ConversationDataset(read_samples(data_file(folder / "d.jsonl", *rows)))
    assert dataset.output_groups() == [0, 1, 0, 2, 1]
