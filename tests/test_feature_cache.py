"""The feature cache: the same losses as without it, never a stale one, never a pickle."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_encoder_coverage import compose
from tiny_parts import ENCODERS, LLAMA
from training_utils import (
    REPOSITORY,
    argument_maker,
    check_mistake,
    cli_here,
    environment,
    losses_of,
    reset_accelerate,
    toy_data,
    train_here,
    trained_tensors,
)

from anygpt import InputError, ModalEncoderModule, commands
from anygpt.cache.reading import Cached, Entry, entries, open_cache
from anygpt.cache.store import Store, StoreWriter, create_store
from anygpt.data.caching import CacheWriter, Preparation, Prepared
from anygpt.data.collation import BAD, NOT_FOR_MODEL, TARGET_IDS, Collator
from anygpt.data.dataset import ConversationDataset, DataSource, LoadedSample
from anygpt.data.schema import ContentPart, Message, Sample
from anygpt.encoders.projector import MultimodalProjector, MultimodalProjectorConfig
from anygpt.losses.formulas import LossWeights
from anygpt.losses.terms import is_read
from anygpt.training.config import Config, DataConfig
from anygpt.training.loading import make_generators, use_cache, use_frames_of

SCRIPT = "scripts/cache_features.py"
ROWS = (1, 3, 7, 13, 15, 22)  # of the stage 3 data: every input and every output
BOARD = ("--run.tracker", "tensorboard")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory)


@pytest.fixture(scope="module")
def make_arguments(tmp_path_factory):
    return argument_maker(tmp_path_factory)


@pytest.fixture
def accelerator():
    reset_accelerate()
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def script():
    """`anygpt cache-features` in this process: arguments to exit code."""

    def main(arguments):
        reset_accelerate()
        return commands.run("cache-features", arguments)

    return main


@pytest.fixture
def world(data, tmp_path, tiny_model, accelerator):
    """A model, a copy of a stage 3 data set of its own, and how to write and open their cache."""
    return World(data, tmp_path, tiny_model, accelerator)


class World:
    def __init__(self, data, folder, tiny_model, accelerator):
        shutil.copytree(data, folder / "data")
        self.folder, self.path, self.accelerator = folder / "cache", folder / "data/stage3.jsonl", accelerator
        lines = self.path.read_text().splitlines(keepends=True)
        self.path.write_text("".join(lines[row] for row in ROWS))
        self.tiny_model = tiny_model
        self.model, self.processor = tiny_model()
        self.model.train_only([f"{key}_projector" for key in self.model.encoder_keys])

    def keep(self, wanted):
        """Leave out the rows that are not wanted."""
        lines = self.path.read_text().splitlines(keepends=True)
        self.path.write_text("".join(line for line in lines if wanted(json.loads(line))))

    def dataset(self):
        dataset = ConversationDataset.from_files([DataSource(str(self.path))])
        use_frames_of(dataset, self.processor)
        return dataset

    def write(self, **options):
        parts = (self.folder, self.model, self.processor, [self.dataset()], self.accelerator)
        return CacheWriter(*parts, **options).write()

    def open(self, precision="no"):
        frames = self.dataset().num_video_frames
        return open_cache(self.folder, self.model, self.processor, frames, precision)

    def losses(self, cache):
        dataset = self.dataset()
        dataset.decode_targets = is_read("media", self.model.loss_weights)
        collator = Collator(self.processor)
        dataset.cache = collator.cache = cache
        batch = collator([dataset[row] for row in range(len(dataset))])
        ids = {name: batch.pop(name) for name in NOT_FOR_MODEL}
        assert not ids[BAD]
        found = self.model(**batch, generators=make_generators(ids[TARGET_IDS], 0, 0)).losses
        return {name: float(term.total.detach()) for name, term in found.items()}, batch


# -- the same losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", ENCODERS, ids=lambda tiny: tiny.label)
def test_features_given_are_features_computed(tiny):
    """Bit for bit, whatever the layout: `forward(inputs)` is `forward({"features": encode(inputs)})`."""
    encoder = tiny.build().eval()
    module = ModalEncoderModule(encoder, modality=tiny.modality)
    sizes = {"in_features": module.feature_size, "out_features": 8}
    module.projector = MultimodalProjector(MultimodalProjectorConfig(**sizes))
    media, processor = [tiny.media(seed) for seed in range(3)], tiny.build_processor()
    name = {"image": "images", "video": "videos", "audio": "raw_speech"}[tiny.modality]
    family = module.family
    options = {"sampling_rate": 16_000} if tiny.modality == "audio" else {}
    inputs = dict(processor(**{name: media, "return_tensors": "pt"} | options | dict(family.processor_options)))
    inputs = {key: value for key, value in inputs.items() if key in module.input_names}
    with torch.no_grad():
        features = module.encode(inputs)
        assert [len(item) for item in features] == family.count(encoder.config, inputs)
        whole, given = module(inputs), module({"features": features})
        if isinstance(whole, torch.Tensor):
            assert torch.equal(whole, module({"features": torch.stack(features)}))
    for one, other in zip(whole, given, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="replace all other inputs"):
        module({"features": features} | inputs)


def test_a_batch_has_the_same_losses_with_and_without(world, monkeypatch):
    plain, _ = world.losses(None)
    assert world.write(batch_size=4)["written"]
    cache = world.open()
    assert all(note.endswith("from the cache") for note in cache.notes) and len(cache.notes) == 10

    def fail(*_):
        raise AssertionError("computed in spite of the cache")

    monkeypatch.setattr(ModalEncoderModule, "_encode", fail)
    monkeypatch.setattr("anygpt.data.dataset.read_media", fail)
    for decoder in world.model.decoders.values():
        monkeypatch.setattr(decoder.module, "encode_text", fail)
        monkeypatch.setattr(decoder.module, "posterior", fail)
    cached, batch = world.losses(cache)
    assert any("denoising" in name for name in plain) and any("alignment" in name for name in plain)
    assert cached == pytest.approx(plain, rel=1e-6)  # batched kernels round otherwise than smaller ones
    assert {"image.features", "video.features", "audio.features"} <= set(batch)


def test_rows_of_text_are_not_read_again(world, monkeypatch):
    """Where all rows of a batch are text, and nothing below the states trains, the layers have run once."""
    world.keep(lambda row: not any(part["type"] != "text" for part in row["messages"][0]["content"]))
    world.model.loss_weights.denoising = 0
    world.model.train_only(["signal_tokens", "image_output_projector"])
    world.model.signal_tokens.input_rows.requires_grad_(False)
    plain, batch = world.losses(None)
    assert "text_states" not in batch and {name.split("/")[1] for name in plain} == {"nll", "alignment"}
    world.write(batch_size=2)
    cache = world.open()
    monkeypatch.setattr(type(world.model.language_model.base_model), "forward", None)
    cached, batch = world.losses(cache)
    assert set(batch["text_states"]) == {"head", "image_decoder", "video_decoder", "audio_decoder"}
    assert cached == pytest.approx(plain, rel=1e-6)
    states = world.model.read_states(**batch)  # what ridge regression looks at
    assert {key: len(x) for key, x in states.items()} == {
        key: len(target["captions"]) for key, target in batch["decoder_targets"].items()
    }

    lines = world.path.read_text().splitlines(keepends=True)
    changed = [json.loads(line) for line in lines]
    for row in changed:
        row["messages"][0]["content"][0]["text"] += "!"
    world.path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    dataset = world.dataset()
    collator = Collator(world.processor)
    collator.cache = cache
    (bad, *_) = collator([dataset[row] for row in range(len(lines))])[BAD]
    assert bad.kind == "stale" and "nothing for a row of these" in bad.reason


def test_what_keeps_states_from_being_stored(world):
    def obstacle():
        return next(entry.obstacle for entry in entries(world.model) if entry.name == "language_model")

    assert obstacle() is None
    world.model.train("signal_tokens")
    assert "input rows" in obstacle()
    world.model.signal_tokens.input_rows.requires_grad_(False)
    assert obstacle() is None
    world.model.preprocess_llm_callback = lambda inputs_embeds: {}
    assert "callback" in obstacle()
    world.model.train("language_model")
    assert obstacle() == "it trains"
    world.model.language_model = get_peft_model(world.model.language_model, LoraConfig(target_modules=["q_proj"]))
    world.model.train_only([])
    assert obstacle() == "it has adapters"
    mixed = world.tiny_model(hidden_layer="mix")[0]
    mixed.train_only([])
    assert "mixes" in next(entry.obstacle for entry in entries(mixed) if entry.name == "language_model")


@pytest.mark.parametrize("change", ["rows", "layer", "loss"])
def test_other_states_are_kept_beside_those_that_are_there(world, change):
    def note():
        return next(note for note in world.open().notes if note.startswith("language_model"))

    world.write()
    assert note() == "language_model: from the cache"
    with torch.no_grad():
        world.model.signal_tokens.input_rows["image"] += change == "rows"
    world.model.decoders["audio"].hidden_layer = 1 if change == "layer" else -1
    world.model.loss_weights.nll = float(change != "loss")
    assert note() == "language_model: computed anew: the cache does not hold it"
    counts = world.write()
    assert counts["written"] == 1 and note() == "language_model: from the cache"  # of the rows here one is of text
    assert len(list(world.folder.glob("language_model-*"))) == 2


@pytest.mark.parametrize("sharded", [False, True])
def test_sharded_layers_run_in_every_batch(world, sharded):
    """Processes gather them together; one with media in its rows would wait for one that passes over them."""
    world.write()
    config = Config(data=DataConfig(cache_dir=str(world.folder)))
    dataset, collator = world.dataset(), Collator(world.processor)
    notes = use_cache([dataset], collator, world.model, config, sharded)
    assert dataset.cache is not None and (collator.cache is None) == sharded
    said = [note for note in notes if note.startswith("language_model:")]
    assert len(notes) == 10 and said[0].endswith("its layers are sharded" if sharded else "from the cache")


def test_a_row_whose_media_were_cut_off_is_computed(world):
    """It has no media any more, but was no row of text when the cache was written."""
    row = json.loads(world.path.read_text().splitlines()[0])
    text = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
    row["messages"] = [*text, *row["messages"]]
    world.path.write_text(json.dumps(row) + "\n")
    world.write()
    whole = Collator(world.processor)([world.dataset()[0]])
    collator = Collator(world.processor, whole["input_ids"].shape[1] - 1, cut=True)
    collator.cache = world.open()
    batch = collator([world.dataset()[0]])
    assert batch["cut_samples"] and not batch[BAD] and "text_states" not in batch


def test_a_run_of_text_has_the_same_losses_with_and_without(script, make_arguments, tmp_path):
    """Stage 2 with new signal tokens, which script and run draw alike; and a run that goes on where it was."""
    cache = ("--data.cache_dir", str(tmp_path / "cache"))
    more = (*BOARD, "--train.signal_rows=output", "--loss.denoising=0", "--run.seed=3")

    def run(name, *options, steps):
        return train_here(2, make_arguments(2, tmp_path / name, *more, *options, steps=steps, batch_size=1))

    plain = run("plain", steps=3)
    written = make_arguments(2, tmp_path / "cached", *more, *cache, steps=3, batch_size=1)
    assert script([*written, "--stage", "2", "--batch-size", "1"]) == 0
    cached = run("cached", *cache, steps=3)
    assert losses_of(tmp_path / "cached") == losses_of(tmp_path / "plain")
    first, second = trained_tensors(plain), trained_tensors(cached)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert "language_model: from the cache" in (tmp_path / "cached/log.txt").read_text()
    run("other", *cache, "--run.seed=4", steps=1)
    assert "language_model: computed anew" in (tmp_path / "other/log.txt").read_text()


def test_a_run_that_goes_on_compares_the_cache_with_its_checkpoint(script, make_arguments, tmp_path):
    """Not with what `init_from` holds by now."""
    more = (*BOARD, "--train.signal_rows=output", "--loss.denoising=0")
    start = train_here(2, make_arguments(2, tmp_path / "start", *more, steps=1))
    more += ("--model.init_from", str(start), "--train.save_steps=1", "--data.cache_dir", str(tmp_path / "cache"))
    arguments = make_arguments(2, tmp_path / "run", *more, steps=2)
    assert script([*arguments, "--stage", "2"]) == 0
    train_here(2, arguments)
    before = losses_of(tmp_path / "run")
    for name in ("final", "checkpoint-2"):
        shutil.rmtree(tmp_path / "run" / name)
    other = train_here(2, make_arguments(2, tmp_path / "elsewhere", *BOARD, "--run.seed=9", steps=1))
    shutil.rmtree(start)
    shutil.copytree(other, start)
    assert script([*arguments, "--stage", "2"]) == 0  # for the other model; that of the checkpoint's stays
    train_here(2, arguments)
    assert losses_of(tmp_path / "run")[2] == before[2]


def test_latents_are_drawn_anew_and_not_stored(world):
    world.write()
    _, batch = world.losses(world.open())
    posterior = batch["decoder_targets"]["image"]["posterior"]
    decoder = world.model.decoders["image"].module
    one, other = (
        decoder.sample_posterior(*posterior.unbind(1), [torch.Generator().manual_seed(s)] * len(posterior))
        for s in (0, 1)
    )
    assert posterior.shape[1] == 2 and not torch.equal(one, other)


def test_a_run_has_the_same_losses_with_and_without(script, make_arguments, tmp_path_factory, tmp_path):
    """Through the script and the stage, with workers: to the last bit, one row at a time (see the test above).

    The rows have one medium of a kind: an encoder reads several of a row as a batch, which rounds differently.
    """
    cache = ("--data.cache_dir", str(tmp_path / "cache"))
    single = [{"path": str(toy_data(tmp_path_factory) / f"stage{stage}.jsonl")} for stage in (1, 2)]
    more = (*BOARD, "--train.gradient_accumulation_steps=4", f"--data.train={json.dumps(single)}")
    args = make_arguments(3, tmp_path / "plain", *more, steps=2, batch_size=1)
    plain = train_here(3, args)
    assert script([*args, *cache, "--num-workers", "1", "--batch-size", "1"]) == 0
    more = (*more, *cache, "--data.num_workers=1")
    cached = train_here(3, make_arguments(3, tmp_path / "cached", *more, steps=2, batch_size=1))
    losses = losses_of(tmp_path / "plain")
    assert any("denoising" in name for metrics in losses.values() for name in metrics)
    assert losses_of(tmp_path / "cached") == losses
    first, second = trained_tensors(plain), trained_tensors(cached)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    said = (tmp_path / "cached/log.txt").read_text()
    assert said.count("from the cache") == 9 and "language_model: computed anew: it trains" in said


def test_samples_of_a_cached_run_are_answers_to_the_media(script, make_arguments, tmp_path_factory, tmp_path):
    data = json.dumps([{"path": str(toy_data(tmp_path_factory) / "stage1.jsonl")}])
    more = (
        "--data.cache_dir",
        tmp_path / "cache",
        "--data.eval",
        data,
        "--train.sample_steps=1",
        "--train.sample_rows=3",
    )
    args = make_arguments(1, tmp_path / "run", *more, steps=1)
    assert script(args) == 0
    train_here(1, args)
    assert len((tmp_path / "run/samples/000001/index.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_two_processes_write_what_one_does(make_arguments, tmp_path):
    args = make_arguments(3, tmp_path / "run")
    launched = [str(Path(sys.executable).parent / "accelerate"), "launch", "--main_process_port", "0"]
    launched += ["--config_file", "configs/accelerate/two_processes_cpu.yaml", SCRIPT]
    stores = []
    for folder, command in (("one", [sys.executable, SCRIPT]), ("two", launched)):
        done = subprocess.run(
            [*command, *args, "--data.cache_dir", str(tmp_path / folder)],
            **{"cwd": REPOSITORY, "env": environment(), "capture_output": True, "text": True, "check": False},
        )
        assert done.returncode == 0, done.stderr
        stores.append({path.name: stored(path) for path in sorted((tmp_path / folder).iterdir())})
    one, two = stores
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].keys() == two[name].keys() and one[name]
        for fingerprint, tensors in one[name].items():
            torch.testing.assert_close(tensors, two[name][fingerprint], rtol=1e-5, atol=1e-5)


def stored(folder):
    """`{fingerprint: its tensors}` of a store."""
    store = Store(folder, json.loads((folder / "key.json").read_text()))
    return {name.hex(): store.get(name.hex()) for name in store.places}


# -- resuming, and what is left out ----------------------------------------------------------------------------


def test_writing_goes_on_where_it_was(world):
    world.write()
    shards = sorted(world.folder.rglob("*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in shards}
    counts = world.write()
    assert counts["written"] == 0 and counts["known"]
    lost = next(path for path in shards if path.parent.name == "image_encoder")
    (lost.parent / ".shard-x.safetensors.0.tmp").write_bytes(b"half")  # of a run that was killed
    before_it = stored(lost.parent)
    names = load_file(lost)
    lost.unlink()
    assert world.write()["written"] == len(names)
    after = sorted(world.folder.rglob("*.safetensors"))
    assert {path: path.stat().st_mtime_ns for path in after if path in before}.items() <= before.items()
    assert not list(world.folder.rglob(".*"))
    found = stored(lost.parent)
    assert found.keys() == before_it.keys()
    assert all(torch.equal(found[name]["features"], before_it[name]["features"]) for name in found)


def test_a_full_shard_is_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("anygpt.cache.store.SHARD_BYTES", 3000)
    create_store(tmp_path / "s", {})
    writer = StoreWriter(tmp_path / "s")
    batch = torch.arange(1000.0).view(10, 100)
    names = [f"{i:032x}" for i in range(10)]
    for name, row in zip(names, batch, strict=True):
        writer.add(name, {"features": row})
    writer.flush()
    store = Store(tmp_path / "s", {})
    assert len(store.shards) == 2 and len(store.places) == 10 and names[3] in store and "f" * 32 not in store
    assert all(torch.equal(store.get(name)["features"], row) for name, row in zip(names, batch, strict=True))
    again = pickle.loads(pickle.dumps(store))  # as for a worker that is spawned
    assert torch.equal(again.get(names[3])["features"], batch[3])


def test_tensors_of_any_length_width_and_type(tmp_path):
    given = [
        {"a": torch.rand(3, 2), "b": torch.rand(0, 4, 5)},
        {"a": torch.rand(0, 2), "b": torch.rand(2, 4, 5)},
        {"a": torch.rand(2, 6).bfloat16(), "b": torch.tensor(3)},
        {"a": torch.arange(3), "b": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)},
    ]
    create_store(tmp_path / "s", {})
    writer = StoreWriter(tmp_path / "s")
    for i, tensors in enumerate(given):
        writer.add(f"{i:032x}", tensors)
    before = os.umask(0o027)
    writer.flush()
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("s/shard*")} == {0o640}
    store = Store(tmp_path / "s", {})
    for i, tensors in enumerate(given):
        found = store.get(f"{i:032x}")
        assert found.keys() == tensors.keys()
        assert all(found[n].dtype == x.dtype and torch.equal(found[n], x) for n, x in tensors.items())
        # what a worker hands on is a storage, whole
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in found.values())


@pytest.mark.parametrize("name", ["features", "0" * 31 + ".features", "0" * 32, "0" * 32 + ".a.b"])
def test_a_shard_whose_tensors_have_other_names(tmp_path, name):
    create_store(tmp_path / "s", {})
    good = {"0" * 32 + ".features": torch.zeros(1, 3)}
    save_file(good, tmp_path / "s/shard-a.safetensors")
    assert Store(tmp_path / "s", {}).get("0" * 32)["features"].shape == (1, 3)
    save_file(good | {name: torch.zeros(2)}, tmp_path / "s/shard-a.safetensors")
    with pytest.raises(InputError, match=r"shard-a\.safetensors is no whole shard"):
        Store(tmp_path / "s", {})


def test_what_trains_is_computed_anew_and_said_to_be(world):
    world.write()
    decoder = world.model.decoders["audio"].module
    decoder.vae.requires_grad_(True)
    world.model.train("image_encoder")
    notes = dict(note.split(": ", 1) for note in world.open().notes)
    trained = [name for name, note in notes.items() if note == "computed anew: it trains"]
    assert trained == ["image_encoder", "audio_decoder.latents"]
    decoder.vae.requires_grad_(False)
    decoder.text_encoder.requires_grad_(True)  # latents do not depend on it
    notes = [note for note in world.open().notes if "it trains" in note]
    assert notes == [f"{name}: computed anew: it trains" for name in ("image_encoder", "audio_decoder.captions")]
    said = []
    shutil.rmtree(world.folder)
    world.write(leave_out=["video_encoder"], say=said.append)
    assert "image_encoder: left out: it trains" in said and "video_encoder: left out: as asked" in said
    assert not {"image_encoder", "video_encoder"} & {path.name for path in world.folder.iterdir()}
    assert "video_encoder: computed anew: the cache does not hold it" in world.open().notes


def test_random_losses_keep_what_they_need(world):
    """Captions dropped at random are replaced by the empty one; losses that look at the media themselves need them."""
    world.model.loss_weights = LossWeights(decoder=1.0, caption_dropout=0.1, reconstruction=1.0)
    obstacles = {entry.name: entry.obstacle for entry in entries(world.model)}
    assert obstacles["image_decoder.captions"] is None
    assert obstacles["image_decoder.latents"] == "a loss looks at the media themselves"
    assert obstacles["image_encoder"] is None


@pytest.mark.parametrize("projection", ["linear", "pooled"])
def test_pieces_of_a_long_sound_are_kept_apart(parts, media, tmp_path, accelerator, projection):
    """A cached sound of three windows gives what it gives without the cache, and one of one window too."""
    clap = next(tiny for tiny in ENCODERS if tiny.label == "CLAP")
    model, processor = compose(clap, LLAMA, parts.tokenizer(), init_projector_type=projection)
    entry = Entry("audio_encoder", "features", "audio", "audio", None)
    short, long = ((media.audio(seconds=seconds), 16_000) for seconds in (0.5, 2.5))
    data, pieces = Preparation(entry, {}, processor, Collator(processor)).inputs([short, long])
    assert pieces == [1, 3]
    found = Prepared(["a", "b"], data, pieces)
    kept = CacheWriter(tmp_path, model, processor, [], accelerator).outputs(entry, found)
    kept = [tensors["features"] for tensors in kept]
    assert [item.ndim for item in kept] == [2, 3]
    sounds = tuple(ContentPart("audio", path=Path(name)) for name in "ab")
    sample = Sample("a", (Message("user", sounds),), "rows")
    loaded = LoadedSample(sample, inputs={"audio": [Cached(item) for item in kept]})
    data, counts = Collator(processor).encoder_inputs([loaded])
    fresh = model.audio_encoder(model.assign_inputs(found.data)["audio"])
    torch.testing.assert_close(model.audio_encoder({"features": data["audio.features"]}), fresh)
    assert counts["audio"] == [len(fresh[0]), 3 * len(fresh[0])]


# -- stale caches ----------------------------------------------------------------------------------------------


def test_another_part_makes_the_cache_stale(world):
    world.write()
    with torch.no_grad():
        next(world.model.encoders["image"].module.parameters()).add_(1e-3)
    with pytest.raises(InputError, match=r"image_encoder is stale.*: weights changed\. Write"):
        world.open()
    with pytest.raises(InputError, match="is stale"):
        world.write()
    world.model.train("image_encoder")  # then it is not asked
    with torch.no_grad():
        next(world.model.decoders["video"].module.vae.parameters()).add_(1e-3)
    with pytest.raises(InputError, match=r"video_decoder\.latents is stale.*: weights\.vae changed"):
        world.open()


def test_other_preprocessing_makes_the_cache_stale(world):
    world.write()
    extractor = world.processor.encoder_processors["audio"]
    extractor.dither = 0.5
    with pytest.raises(InputError, match=r"audio_encoder is stale.*: preprocessing\.dither was 0\.0 and is 0\.5"):
        world.open()
    extractor.dither = 0.0
    with pytest.raises(InputError, match="precision was 'no' and is 'bf16'"):
        world.open(precision="bf16")
    tokenizer = world.model.decoders["image"].module.pipeline.tokenizer
    tokenizer.model_max_length -= 1
    with pytest.raises(InputError, match=r"image_decoder\.captions is stale.*tokenizers\.tokenizer\.length was 16"):
        world.open()


def test_media_and_captions_that_changed_are_never_skipped(script, make_arguments, data, tmp_path, capsys):
    """Though bad samples are: the run ends, and says which file it was."""
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data/stage3.jsonl"
    args = [
        *make_arguments(3, tmp_path / "run", steps=1, batch_size=24),  # all rows in the first batch
        *("--data.train", f"[{{path: {path}}}]", "--data.on_bad_sample=skip"),
        *("--data.cache_dir", str(tmp_path / "cache")),
    ]
    assert script(args) == 0
    assert "image_encoder:   0%" in capsys.readouterr().err  # which is no terminal
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    images = [
        path.parent / part["path"]
        for row in rows
        for message in row["messages"]
        for part in message["content"]
        if isinstance(part, dict) and part["type"] == "image"
    ]
    content = images[0].read_bytes()
    other = next(image for image in images if image.read_bytes() != content)
    images[0].write_bytes(other.read_bytes() + b"\0")
    check_mistake(*cli_here(3, args, capsys), str(path), images[0].name, "the file changed", "cache_features.py again")
    images[0].write_bytes(content)
    for row in rows:
        for part in row["messages"][-1]["content"]:
            if isinstance(part, dict) and "caption" in part:
                part["caption"] += " anew"
    later = path.with_name("later.jsonl")
    later.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = []  # of a run with such captions in its evaluation alone, which no update precedes
    evaluated = [*args, "--data.eval", f"[{{path: {later}}}]", "--train.eval_steps=1"]
    check_mistake(*cli_here(3, evaluated, capsys, out), str(later), "nothing for the caption", "anew")
    assert "update 1 " not in out[0]
    path.write_bytes(later.read_bytes())
    check_mistake(*cli_here(3, args, capsys), "nothing for the caption", "anew")


# -- broken and hostile ----------------------------------------------------------------------------------------


def test_media_that_cannot_be_read(world):
    image = next(part.path for sample in world.dataset().samples for _, part in sample.media() if part.type == "image")
    image.write_bytes(image.read_bytes()[:50])
    with pytest.raises(InputError, match=rf"{world.path}:\d+ \(sample .*{image.name}"):
        world.write()
    said = []
    assert world.write(on_bad_sample="skip", say=said.append)["unreadable"] >= 1
    assert any(image.name in line for line in said)
    dataset = world.dataset()  # which skips, as the loop's does
    dataset.use_cache(world.open())
    bad = [item for item in (dataset[i] for i in range(len(dataset))) if hasattr(item, "reason")]
    assert bad and all(image.name in item.reason and item.kind == "bad" for item in bad)


class Trap:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["TRAP"])),)


def test_pickles_are_refused_and_not_run(world, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "trapped"))
    payload = pickle.dumps(Trap())
    world.folder.write_bytes(payload)
    with pytest.raises(InputError, match=r"is a file.*never a pickle"):
        world.open()
    world.folder.unlink()
    with pytest.raises(InputError, match=r"does not exist.*image_encoder.*cache_features\.py"):
        world.open()
    (world.folder / "image_encoder").mkdir(parents=True)
    (world.folder / "image_encoder/features.pt").write_bytes(payload)
    for use in (world.open, world.write):
        with pytest.raises(InputError, match=r"image_encoder is no feature cache.*pickles among them"):
            use()
    shutil.rmtree(world.folder)
    world.write()
    extra = world.folder / "image_encoder/features.pkl"
    extra.write_bytes(payload)
    with pytest.raises(InputError, match=r"features\.pkl is no part of a feature cache"):
        world.open()
    extra.unlink()
    shard = next((world.folder / "image_encoder").glob("*.safetensors"))
    content = shard.read_bytes()
    for broken in (payload, content[:-10], content[:4], b""):
        shard.write_bytes(broken)
        with pytest.raises(InputError, match=rf"{shard.name} is no whole shard"):
            world.open()
    key = world.folder / "image_encoder/key.json"
    shard.write_bytes(content)
    key.write_bytes(payload)
    with pytest.raises(InputError, match=r"key\.json is damaged"):
        world.open()
    assert not (tmp_path / "trapped").exists()


def test_a_full_disk_leaves_what_is_whole(world):
    """No file may be larger than what is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (1_000, 8_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            with pytest.raises(InputError, match=r"cannot be written: .*File too large.*whole"):
                world.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(world.folder.rglob(".*"))
    assert world.write()["written"]
    world.folder = world.path / "below a file"
    with pytest.raises(InputError, match=r"cannot be written: .*Not a directory"):
        world.write()


def test_the_script_says_what_is_wrong(script, make_arguments, tmp_path, capsys):
    for more, said in (
        ((), "data.cache_dir is null"),
        (("--data.cache_dir", "x", "--train.batch_sise=3"), "did you mean train.batch_size"),
        (("--data.cache_dir", "x", "--batch-size=0"), "--batch-size is 0, expected a number of at least 1"),
    ):
        capsys.readouterr()
        assert script(make_arguments(3, tmp_path / "run", *more)) == 2
        shown = capsys.readouterr().err
        assert said in shown and shown.count("\n") == 1, shown
