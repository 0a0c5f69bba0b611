"""Packages, conversions and rows of the real world at tiny sizes; the whole command where a cache folder is named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertModel, WhisperConfig, WhisperModel

from anygpt import InputError, load_decoder, load_encoder
from anygpt.commands import execute
from anygpt.data.dataset import ConversationDataset, DataSource
from anygpt.errors import warn_once
from anygpt.evaluation.metrics.features import PretrainedNetwork
from anygpt.media.files import Audio
from anygpt.model.language_models import load_tokenizer
from anygpt.realworld import __main__ as realworld
from anygpt.realworld import datasets, packages
from anygpt.realworld.__main__ import main
from anygpt.realworld.decoders import clap_text_encoder, write_untrained_decoder, write_video_decoder
from anygpt.realworld.parts import convert_audio_encoder, convert_image_encoder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A wheel in a folder that pip takes it from."""
    shop = tmp_path / "shop"
    shop.mkdir()
    wheel = shop / "tiny_part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny_part-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-part\nVersion: 1.0\n")
        file.writestr("tiny_part-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("tiny_part-1.0.dist-info/RECORD", "")
    monkeypatch.setattr(packages, "PIP", [*packages.PIP, "--no-index", "--find-links", str(shop)])
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return {"pin": "tiny-part==1.0", "file": wheel.name, "sha256": digest, "licence": "MIT"}


def test_a_package_is_fetched_once_and_a_changed_or_missing_one_is_named(package, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    archive = packages.fetch(package, cache)
    assert list(cache.iterdir()) == [archive]
    with packages.unpacked(archive, tmp_path / "part") as content:
        assert (content / "tiny_part-1.0.dist-info/METADATA").is_file()
    archive.write_bytes(archive.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"is not tiny-part==1\.0 as it was published.*remove it"):
        packages.fetch(package, cache)
    archive.unlink()
    with pytest.raises(InputError, match=r"other-part==1\.0 was not downloaded"):
        packages.fetch(package | {"pin": "other-part==1.0"}, cache)
    with pytest.raises(InputError, match="as it was published"):
        packages.fetch(package | {"sha256": "0" * 64}, cache)
    monkeypatch.setattr(packages, "PIP", ["no-such-client"])
    with pytest.raises(InputError, match="no-such-client is not installed"):
        packages.fetch(package, cache)
    assert not list(cache.iterdir())


def test_nothing_is_unpacked_outside_and_nothing_stays(tmp_path):
    archive = tmp_path / "evil.tgz"
    with tarfile.open(archive, "w:gz") as file:
        file.addfile(tarfile.TarInfo("../../outside"), io.BytesIO())
    with pytest.raises(tarfile.OutsideDestinationError), packages.unpacked(archive, tmp_path / "deep/part"):
        pass
    assert not list((tmp_path / "deep").iterdir()) and {p.name for p in tmp_path.iterdir()} == {"evil.tgz", "deep"}


def lite0_blocks():
    """Input, output and expanded channels, kernel and stride of each block (EfficientNet-lite0)."""
    width = 32
    for expand, out, repeats, stride, kernel in (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    ):
        for i in range(repeats):
            yield width, out, width * expand, kernel, stride if i == 0 else 1
            width = out


def same_convolution(x, weight, stride=1, groups=1):
    """TensorFlow's SAME padding: what is odd of it is added at the end."""
    kernel, side = weight.shape[-1], x.shape[-1]
    pad = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
    return F.conv2d(x, weight, stride=stride, groups=groups)


def test_lite0_computes_what_its_own_layers_do(tmp_path):
    random = torch.Generator().manual_seed(0)
    state, layers = {}, []

    def add(convolution, norm, shape):
        state[f"{convolution}.weight"] = torch.randn(shape, generator=random) * (2 / np.prod(shape[1:])) ** 0.5
        for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            state[f"{norm}.{name}"] = low + torch.rand(shape[0], generator=random)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    def run(x, convolution, norm, **options):
        x = same_convolution(x, state[f"{convolution}.weight"], **options)
        values = (state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *values, eps=1e-3)

    add("_conv_stem", "_bn0", (32, 3, 3, 3))
    for i, (width, out, wide, kernel, stride) in enumerate(lite0_blocks()):
        if wide != width:
            add(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", (wide, width, 1, 1))
        add(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", (wide, 1, kernel, kernel))
        add(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", (out, wide, 1, 1))
        layers.append((f"_blocks.{i}.", width == out and stride == 1, wide, width, stride))
    add("_conv_head", "_bn1", (1280, 320, 1, 1))
    state |= {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    (tmp_path / "package").mkdir()
    torch.save(state, tmp_path / "package/lite0.pth")
    convert_image_encoder(tmp_path / "package", tmp_path / "part")
    encoder = load_encoder(tmp_path / "part", "image").eval()
    pixels = torch.randn(1, 3, 64, 64, generator=random)
    x = run(pixels, "_conv_stem", "_bn0", stride=2).clamp(0, 6)
    for at, skips, wide, width, stride in layers:
        y = x if wide == width else run(x, f"{at}_expand_conv", f"{at}_bn0").clamp(0, 6)
        y = run(y, f"{at}_depthwise_conv", f"{at}_bn1", stride=stride, groups=wide).clamp(0, 6)
        y = run(y, f"{at}_project_conv", f"{at}_bn2")
        x = x + y if skips else y
    expected = run(x, "_conv_head", "_bn1").clamp(0, 6)
    with torch.no_grad():
        found = encoder(pixel_values=pixels).last_hidden_state
    assert found.shape == (1, 1280, 2, 2) and found.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    file = tmp_path / "part/model.safetensors"
    save_file({n: x for n, x in load_file(file).items() if "running_mean" not in n}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 49 tensors, embeddings\.batchnorm\.running_mean first"):
        PretrainedNetwork(str(tmp_path / "part"), "image")


def write_ctranslate2(path, encoder):
    """Write a Whisper encoder as CTranslate2's converter does: 16-bit floats, query, key and value in one."""
    state = {name: tensor.half().numpy() for name, tensor in encoder.state_dict().items()}
    found = {f"encoder/conv{i}/{end}": state[f"conv{i}.{end}"] for i in (1, 2) for end in ("weight", "bias")}
    found["encoder/num_heads"] = np.array(2, np.int16)
    found["encoder/position_encodings/encodings"] = state["embed_positions.weight"]
    norms = {"gamma": "weight", "beta": "bias"}
    for end, own in norms.items():
        found[f"encoder/layer_norm/{end}"] = state[f"layer_norm.{own}"]
    for i in range(len(encoder.layers)):
        at, own = f"encoder/layer_{i}", f"layers.{i}"
        zero = np.zeros_like(state[f"{own}.self_attn.q_proj.bias"])
        for end in ("weight", "bias"):
            parts = [state.get(f"{own}.self_attn.{one}_proj.{end}", zero) for one in "qkv"]
            found[f"{at}/self_attention/linear_0/{end}"] = np.concatenate(parts)
            found[f"{at}/self_attention/linear_1/{end}"] = state[f"{own}.self_attn.out_proj.{end}"]
            for number, layer in enumerate(("fc1", "fc2")):
                found[f"{at}/ffn/linear_{number}/{end}"] = state[f"{own}.{layer}.{end}"]
        for end, name in norms.items():
            found[f"{at}/self_attention/layer_norm/{end}"] = state[f"{own}.self_attn_layer_norm.{name}"]
            found[f"{at}/ffn/layer_norm/{end}"] = state[f"{own}.final_layer_norm.{name}"]

    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    with path.open("wb") as file:
        file.write(struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(found)))
        for name, values in found.items():
            file.write(text(name) + struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape))
            file.write(struct.pack("<BI", {2: 4}.get(values.itemsize) if values.ndim else 2, values.nbytes))
            file.write(np.ascontiguousarray(values).tobytes())


def test_a_whisper_of_ctranslate2_is_the_same_encoder(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 51865}
    own = WhisperModel(WhisperConfig(**sizes, **decoder, num_mel_bins=80)).eval().encoder
    (tmp_path / "package").mkdir()
    file = tmp_path / "package/model.bin"
    write_ctranslate2(file, own)
    (tmp_path / "part").mkdir()
    convert_audio_encoder(tmp_path / "package", tmp_path / "part")
    loaded = load_encoder(tmp_path / "part", "audio", dtype="float32").eval()
    sound = torch.randn(1, 80, 3000)
    with torch.no_grad():
        torch.testing.assert_close(loaded(sound)[0], own(sound)[0], atol=2e-2, rtol=0)
    judge = PretrainedNetwork(str(tmp_path / "part"), "audio")  # the folder has no decoder, which features need not
    assert judge.of_media([Audio(np.zeros((1, 16_000), np.float32), 16_000)]).shape == (1, 128)


def write_emoji(folder, clips):
    """Emoji in twelve colours, of which two look the same, two are of one name, and four are flags; some move."""
    pictures = folder / "package/img/google/64"
    pictures.mkdir(parents=True)
    (clips / "package/assets").mkdir(parents=True)
    rows = []
    names = [
        "MAN COOK",
        "WOMAN COOK",
        "APPLE",
        "POMME",
        *(f"THING {c}" for c in "ABCD"),
        *(f"{c} FLAG" for c in "EFGH"),
    ]
    for i, name in enumerate(names):
        code = f"1f60{i:x}"
        colour = tuple(np.random.default_rng(2 if name == "POMME" else i).integers(0, 256, 3).tolist())
        Image.new("RGBA", (64, 64), colour).save(pictures / f"{code}.png")
        if i < 9:
            moving = [Image.new("RGB", (16, 16), (40 * f, i, 0)) for f in range(1 + i % 2)]
            moving[0].save(clips / f"package/assets/{code}.webp", save_all=True, append_images=moving[1:])
        kind = "country-flag" if name.endswith("FLAG") else "food"
        rows.append(
            {"name": name, "unified": code.upper(), "image": f"{code}.png", "category": f"{kind}s", "subcategory": kind}
        )
    (folder / "package/emoji.json").write_text(json.dumps(rows))


def test_whole_concepts_are_held_out(tmp_path, capsys):
    write_emoji(tmp_path / "emoji", tmp_path / "clips")
    things = datasets.emoji(tmp_path / "emoji", tmp_path / "clips")
    concept = {one.name: one.concept for one in things}
    assert [one.name for one in things if one.modality == "video"] == ["woman cook", "pomme", "thing b", "thing d"]
    assert concept["man cook"] == concept["woman cook"] and concept["apple"] == concept["pomme"]
    assert len(set(concept.values())) == 7  # and the flags are one
    for seed in range(5):
        learnt, held = datasets.split(things, seed)
        assert not {one.concept for one in learnt} & {one.concept for one in held}
        assert sorted(one.modality for one in held if one.modality == "video") == ["video"]
        pictures = [one for one in held if one.modality == "image"]
        assert len(pictures) == 3 and len({one.concept for one in pictures}) == 3
    folder = tmp_path / "data"
    folder.mkdir()
    datasets.write_data(folder, learnt, held)
    for kind in ("video", "audio"):
        (folder / kind).mkdir(exist_ok=True)
    datasets.write_nouns(folder, [f"word{letter}" for letter in "abcdefgh"], {"worda"})
    asked = [json.loads(line)["messages"][1]["content"][1]["caption"] for line in (folder / "video_words.jsonl").open()]
    assert sorted(asked) == [f"word{letter}" for letter in "bcdefgh"]
    made = folder / "image_made.jsonl"
    made.write_text(made.read_text("utf-8").replace('"text": "', '"text": "\u2028'), "utf-8")  # ends no line of JSON
    datasets.write_conversations(folder, ["image_names.jsonl", "image_made.jsonl"], count=40)
    talks = [json.loads(line)["messages"] for line in (folder / "conversations.jsonl").open()]
    assert {len(talk) for talk in talks} == set(range(4, 18, 2))
    assert all([said["role"] for said in talk] == ["user", "assistant"] * (len(talk) // 2) for talk in talks)
    shown = sum(one.modality == "image" for one in learnt)
    assert f"\nimage_names.jsonl: {shown} rows" in capsys.readouterr().out
    for file in folder.glob("*.jsonl"):
        if file.stat().st_size:
            rows = ConversationDataset.from_files([DataSource(path=str(file))])
            assert all(rows[i].sample.messages for i in range(len(rows)))


def test_nouns_are_concrete_and_of_known_words(tmp_path):
    (tmp_path / "package/dict").mkdir(parents=True)
    (tmp_path / "package/dict/data.noun").write_text(
        "  1 This software and database is provided\n"
        "00012345 06 n 0a love_letter 0 billet-doux 0 a 0 a 0 a 0 a 0 a 0 a 0 a 0 letter 0 001 @ 0001 n 0000 | a b\n"
        "00012346 09 n 01 love 0 000 | a feeling\n"
        "00012347 05 n 02 Love 0 ox 0 000 | an animal\n"
    )
    assert datasets.nouns(tmp_path, {"love", "letter", "ox", "a", "billet"}) == ["love letter", "letter"]


def test_english_is_what_the_language_model_says_to_the_end(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(realworld, "LONGEST", 40)
    realworld.write_english(tmp_path, parts.folder / "language_model", 9)
    rows = [json.loads(line) for file in tmp_path.glob("*english.jsonl") for line in file.open()]
    prompts = sum(len(things) for things in realworld.OTHERS.values()) + 9 * len(realworld.PROMPTS)
    assert 0 < len(rows) < realworld.ANSWERS * prompts / 4  # a model of random weights hardly ends an answer
    assert len({row["id"] for row in rows}) == len(rows)
    held = [json.loads(line)["id"] for line in (tmp_path / "held_english.jsonl").open()]
    assert held and all(any(topic in one for topic in realworld.TOPICS[-realworld.HELD_TOPICS :]) for one in held)


def test_a_sentence_encoder_is_the_text_encoder_of_a_decoder(networks, tmp_path, caplog):
    """Words do not depend on padding, and stage 0's losses, sampling and a second saving work."""
    write_untrained_decoder("image", networks / "bert", tmp_path / "part")
    decoder = load_decoder(tmp_path / "part")
    assert decoder.condition_shape == (12, 16) and decoder.height == 64
    tokenizer, encoder = AutoTokenizer.from_pretrained(networks / "bert"), decoder.text_encoder
    warn_once.cache_clear()
    found = decoder.encode_text(["a red ring", "two green squares and a cross"])
    for states, text in zip(found, ["a red ring", "two green squares and a cross"], strict=True):
        with torch.no_grad():
            alone = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(states[: len(alone)], alone)
    for _ in range(2):  # diffusers alone says so of each batch, at length
        cut = decoder.encode_text(["a red ring", "two green squares " * 5])
    torch.testing.assert_close(cut[0], found[0])
    assert caplog.text.count("reads 12 tokens of a caption") == 1 and "truncated" not in caplog.text
    picture = Image.new("RGB", (64, 64), "red")
    latents = decoder.encode_media([picture] * 2)
    assert latents.shape == (2, 8, 8, 8) and decoder.denoising_loss(found, latents).shape == (2,)
    assert decoder.sample(found[:1], num_inference_steps=1)[0].size == (64, 64)
    decoder.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(load_decoder(tmp_path / "again").encode_text(["a red ring"]), found[:1])


def test_the_order_of_sounds_does_not_depend_on_where_they_lie(tmp_path):
    found = []
    for samples, animals in (("a", "b"), ("d", "c")):
        for file in (f"{samples}/bd_boom.flac", f"{samples}/zap_1.flac", f"{animals}/cow.mp3"):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        found.append([one.id for one in datasets.sounds(tmp_path / samples, tmp_path / animals)])
    assert found == [["bd_boom", "cow", "zap_1"]] * 2


def test_a_sentence_encoder_is_the_text_encoder_of_a_decoder_of_sounds(networks, tmp_path):
    """CLAP's network gives BERT's state of the first token, with padding and in half precision, too."""
    bert, tokenizer = (
        BertModel.from_pretrained(networks / "bert").eval(),
        AutoTokenizer.from_pretrained(networks / "bert"),
    )
    texts = tokenizer(["a red ring", "two green squares and a cross"], padding=True, return_tensors="pt")
    clap = clap_text_encoder(networks / "bert")
    with torch.no_grad():
        right = bert(**texts).last_hidden_state[:, 0]
        found = clap(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]).text_embeds
        half = clap.bfloat16()(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]).text_embeds
    torch.testing.assert_close(found, right, atol=1e-4, rtol=0)
    torch.testing.assert_close(half.float(), right, atol=0.05, rtol=0)
    write_untrained_decoder("audio", networks / "bert", tmp_path / "part")
    decoder = load_decoder(tmp_path / "part")
    condition = decoder.encode_text(["a red ring"])
    torch.testing.assert_close(condition[:, 0], F.normalize(right[:1], dim=-1), atol=1e-4, rtol=0)
    sound = decoder.sample(condition, num_inference_steps=1)[0]
    assert len(sound) == round(2.56 * 16_000) and decoder.sampling_rate == 16_000
    latents = decoder.encode_media([(sound, 16_000)])
    assert latents.shape == (1, 8, 32, 8) and decoder.denoising_loss(condition, latents).shape == (1,)


def test_a_denoiser_of_clips_starts_as_that_of_pictures(networks, tmp_path):
    """Frame by frame; the trained layers over time then make frames of one clip depend on each other."""
    write_untrained_decoder("image", networks / "bert", tmp_path / "image")
    write_video_decoder(tmp_path / "image", tmp_path / "video")
    picture, clip = load_decoder(tmp_path / "image"), load_decoder(tmp_path / "video", num_frames=3)
    random = torch.Generator().manual_seed(0)
    noisy, times = torch.randn(2, 8, 3, 8, 8, generator=random), torch.tensor([3, 700])
    states = clip.encode_text(["a red ring", "a cross"])
    torch.testing.assert_close(states, picture.encode_text(["a red ring", "a cross"]))
    with torch.no_grad():
        found = clip.denoiser(noisy, times, states).sample
        frames = picture.denoiser(
            noisy.transpose(1, 2).flatten(0, 1), times.repeat_interleave(3), states.repeat_interleave(3, 0)
        )
    torch.testing.assert_close(found, frames.sample.unflatten(0, (2, 3)).transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert clip.sample(states[:1], num_inference_steps=1)[0].shape == (3, 64, 64, 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif("ANYGPT_REALWORLD_CACHE" not in os.environ, reason="names the folder of the downloaded packages")
def test_the_command_on_24_items(tmp_path):
    arguments = ["--output", str(tmp_path), "--cache", os.environ["ANYGPT_REALWORLD_CACHE"], "--items", "24"]
    assert execute(main, arguments) == 0
    names = [line for file in tmp_path.glob("data/[aiv]*_names.jsonl") for line in file.read_text().splitlines()]
    held = (tmp_path / "data/held_image_names.jsonl").read_text().splitlines()
    assert len(held) == 6 and 40 < len(names) <= 72 - 18
    assert {path.name for path in tmp_path.iterdir()} == {"parts", "data"}
    assert load_encoder(tmp_path / "parts/audio_encoder", "audio").config.d_model == 384
    assert "<|im_start|>system" not in load_tokenizer(tmp_path / "parts/language_model").chat_template
    assert load_decoder(tmp_path / "parts/untrained_image_decoder").condition_shape == (12, 384)
    assert execute(main, arguments) == 0  # finds everything there
