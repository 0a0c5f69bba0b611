"""ImageBind: the original's outputs, its tensors' names, its preprocessing, its place as an encoder."""

import json
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_parts import IMAGEBIND
from tiny_pipelines import CHARACTERS, _clip_tokenizer
from training_utils import load_script
from transformers import CLIPImageProcessor

from anygpt import ModalEncoderModule, MultimodalModel, MultimodalProcessor
from anygpt.commands import execute
from anygpt.encoders.imagebind import (
    ImageBindAudioProcessor,
    ImageBindConfig,
    ImageBindEncoder,
    ImageBindImageProcessor,
    ImageBindModel,
    ImageBindTextProcessor,
    ImageBindVideoProcessor,
    processor_for,
)
from anygpt.encoders.imagebind.modeling import MASK
from anygpt.errors import InputError, warn_once
from anygpt.media.files import Video

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def reference():
    """What the original code computed of a tiny model with random weights: `(config, tensors)`.

    Of the embedding table only the rows that the texts use are kept.
    """
    with safe_open(DATA / "imagebind_reference.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {name.removeprefix("weight/"): t for name, t in tensors.items() if name.startswith("weight/")}
    name = "modality_preprocessors.text.token_embedding.weight"
    table = torch.zeros(49408, weights[name].shape[1], dtype=weights[name].dtype)
    table[tensors["text_rows"]] = weights[name]
    return ImageBindConfig(**config), weights | {name: table}, tensors


@pytest.fixture(scope="module")
def original(reference):
    config, weights, _ = reference
    model = ImageBindModel(config).double().eval()
    model.load_original_state_dict(weights)
    return model


@pytest.mark.parametrize("modality", ["vision", "text", "audio", "depth", "thermal", "imu"])
def test_outputs_are_the_originals(original, reference, modality):
    inputs, expected = (reference[2][f"{kind}/{modality}"] for kind in ("input", "output"))
    inputs = inputs if modality == "text" else inputs.double()
    found = original.embed(modality, inputs)
    assert (found - expected).abs().max() < 1e-6
    original.float()
    try:
        assert (original.embed(modality, inputs) - expected).abs().max() < 1e-4
    finally:
        original.double()


def test_clips_are_scaled_and_averaged(original):
    clips = torch.randn(2, 3, 3, 2, 224, 224, dtype=torch.float64)
    each = torch.stack([original.embed("vision", clips[:, i : i + 1]) for i in range(3)], dim=1)
    torch.testing.assert_close(original.embed("video", clips), each.mean(dim=1))
    sounds = torch.randn(1, 2, 1, 128, 204, dtype=torch.float64)
    found = original.embed("audio", sounds)
    torch.testing.assert_close(found, 20 * original.embed_clips("audio", sounds).mean(dim=1), rtol=1e-6, atol=1e-9)
    still = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    torch.testing.assert_close(original.embed("vision", still), original.embed("image", still[:, None]))


def test_the_huge_model_has_every_tensor_of_the_published_one():
    with torch.device("meta"):
        model = ImageBindModel(ImageBindConfig())
    assert sum(p.numel() for p in model.parameters()) == 1_200_781_057
    expected = {}
    for line in (DATA / "imagebind_keys.tsv").read_text().splitlines()[1:]:
        name, blocks, shape = line.split("\t")
        sizes = tuple(map(int, shape.split("x"))) if shape else ()
        names = [name.replace("*", str(i)) for i in range(int(blocks))] or [name]
        expected |= dict.fromkeys(names, sizes)
    assert len(expected) == 1311 and sum(map(prod, expected.values())) == 1_200_786_990
    expected.pop(MASK)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_original_tensors_are_loaded_strictly(reference):
    config, weights, _ = reference
    model = ImageBindModel(config)
    model.load_original_state_dict(weights | {MASK: torch.zeros(77, 77)})
    name = "modality_trunks.audio.blocks.1.attn.bias_k"
    with pytest.raises(InputError, match=f"Missing .*{name}"):
        model.load_original_state_dict({k: v for k, v in weights.items() if k != name})
    with pytest.raises(InputError, match=r'Unexpected .*"more"'):
        model.load_original_state_dict(weights | {"more": torch.zeros(1)})
    with pytest.raises(InputError, match=f"size mismatch for {name}"):
        model.load_original_state_dict(weights | {name: torch.zeros(3)})
    scale = "modality_postprocessors.audio.1.log_logit_scale"
    with pytest.raises(InputError, match=f"{scale} is 1.0000"):
        model.load_original_state_dict(weights | {scale: torch.ones(())})


def test_the_script_makes_a_folder_that_loads(original, reference, tmp_path, capsys):
    config, weights, tensors = reference
    settings = tmp_path / "sizes.json"
    settings.write_text(json.dumps(config.to_dict()))
    convert = partial(execute, load_script("convert_imagebind").convert)
    torch.save(weights | {MASK: torch.zeros(77, 77)}, tmp_path / "tiny.pth")
    save_file(weights, tmp_path / "tiny.safetensors")
    for file in ("tiny.pth", "tiny.safetensors"):
        output = tmp_path / f"from-{Path(file).suffix[1:]}"
        arguments = [str(tmp_path / file), "--output", str(output), "--config", str(settings)]
        assert convert(arguments) == 0
        loaded = ImageBindModel.from_pretrained(output).double()
        torch.testing.assert_close(loaded.embed("text", tensors["input/text"]), tensors["output/text"])
        assert "cc-by-nc-sa-4.0" in (output / "README.md").read_text()
        assert convert(arguments) == 2 and "already exists" in capsys.readouterr().err
    assert convert([str(tmp_path / "tiny.pth"), "--output", str(tmp_path / "x")]) == 2  # not the huge one's
    assert "not the tensors of this" in capsys.readouterr().err and not (tmp_path / "x").exists()

    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": Code()}, tmp_path / "code.pth")
    assert convert([str(tmp_path / "code.pth"), "--output", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "ran").exists()


def test_loading_says_the_licence(tmp_path, caplog):
    ImageBindModel(ImageBindConfig(**IMAGEBIND)).save_pretrained(tmp_path)
    warn_once.cache_clear()
    assert "CC BY-NC-SA" not in caplog.text
    ImageBindModel.from_pretrained(tmp_path)
    assert "CC BY-NC-SA" in caplog.text


# ------------------------------------------------------------------------------------------------------ preprocessing


def test_images_are_those_of_clips_processor():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    with_clip = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    found = ImageBindImageProcessor()(image)["media_values"]
    assert found.shape == (1, 3, 224, 224) and found.dtype == torch.float32
    expected = with_clip(images=image, return_tensors="pt")["pixel_values"]
    assert (found - expected).abs().max() < 1e-5
    grey = processor_for("thermal")([np.full((40, 30), 51, np.uint8)])["media_values"]
    assert grey.shape == (1, 1, 224, 224) and torch.allclose(grey, torch.tensor(0.2))
    depth = processor_for("depth")(np.full((40, 30), 2.5, np.float32))["media_values"]
    assert torch.allclose(depth, torch.tensor(2.5))


def test_videos_are_five_clips_of_two_frames_in_three_crops():
    # frame i is grey i, its left third darker: crops of a wide clip differ
    frames = np.repeat(np.arange(100, dtype=np.uint8)[:, None, None, None], 32, 1).repeat(96, 2).repeat(3, 3)
    frames[:, :, :32] //= 2
    processor = ImageBindVideoProcessor()
    found = processor([Video(frames, fps=10.0)])["media_values"]
    assert found.shape == (1, 15, 3, 2, 224, 224)
    mean, deviation = 0.48145466, 0.26862954
    grey = ((found[0, :, 0, :, 112, 220] * deviation + mean) * 255).round()
    # 10 s: clips begin at 0, 2, 4, 6 and 8 s, and their frames are 2 s apart
    right = [[0, 20], [20, 40], [40, 60], [60, 80], [80, 99]]
    assert grey[1::3].tolist() == right and grey[2::3].tolist() == right
    assert grey[0::3].tolist() == [[a // 2, b // 2] for a, b in right]
    torch.testing.assert_close(processor(frames)["media_values"], found)
    tall = processor(frames.transpose(0, 2, 1, 3))["media_values"]
    torch.testing.assert_close(tall, found.transpose(-1, -2))
    short = processor(Video(frames[:3], fps=10.0))["media_values"]  # shorter than a clip: all of it, five times
    assert torch.equal(short[:, :3], short[:, 12:])


def test_sounds_are_three_normalised_spectrograms():
    rate = 16000
    t = np.arange(5 * rate) / rate
    wave = (0.2 * np.sin(2 * np.pi * (200 + 300 * t) * t)).astype(np.float32) + 0.1
    found = ImageBindAudioProcessor()(wave, sampling_rate=rate)["media_values"]
    assert found.shape == (1, 3, 1, 128, 204)
    # Kaldi's filter banks from their definition, of the clip in the middle
    clip = wave[int(1.5 * rate) :][: 2 * rate]
    clip = (clip - clip.mean()).astype(np.float64)
    rows = np.stack([clip[i * 160 :][:400] for i in range((len(clip) - 400) // 160 + 1)])
    rows -= rows.mean(axis=1, keepdims=True)
    rows -= 0.97 * np.concatenate((rows[:, :1], rows[:, :-1]), axis=1)
    power = np.abs(np.fft.rfft(rows * np.hanning(400), 512)) ** 2
    mel = lambda hz: 1127 * np.log(1 + hz / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(8000), 130)
    places = mel(np.arange(257) * rate / 512)
    up = (places[None] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - places[None]) / (edges[2:] - edges[1:-1])[:, None]
    banks = np.log(np.maximum(power @ np.maximum(0, np.minimum(up, down)).T, np.finfo(np.float32).eps))
    expected = (np.pad(banks, ((0, 204 - len(banks)), (0, 0))) + 4.268) / 9.138
    np.testing.assert_allclose(found[0, 1, 0].numpy(), expected.T, atol=2e-3)
    assert ImageBindAudioProcessor()([wave[:300], wave])["media_values"].shape == (2, 3, 1, 128, 204)
    with pytest.raises(InputError, match="16000 Hz, not 44100"):
        ImageBindAudioProcessor()(wave, sampling_rate=44100)


def test_texts_and_motion():
    ids = ImageBindTextProcessor(_clip_tokenizer(77))(["a", "".join(CHARACTERS) * 9])
    assert ids.shape == (2, 77) and ids[0, 3:].eq(0).all() and ids[0, :3].ne(0).any()
    assert ids[1, -1] == 1 and ids[0, 2] == 1  # the end of text stays
    motion = processor_for("imu")([np.ones((6, 30)), np.ones((6, 2500))])["media_values"]
    assert motion.shape == (2, 6, 2000) and motion[0].sum() == 180
    with pytest.raises(InputError, match=r"\(30, 6\)"):
        processor_for("imu")(np.ones((30, 6)))
    with pytest.raises(InputError, match="reads no 'smell'"):
        processor_for("smell")


# ---------------------------------------------------------------------------------------------------- as an encoder


def make(parts, feature, projection_type):
    encoders = {
        key: ModalEncoderModule(ImageBindEncoder(ImageBindConfig(**IMAGEBIND).encoder_of(key, feature)))
        for key in ("image", "video", "audio")
    }
    model = MultimodalModel(encoders, parts.language_model(), init_projector_type=projection_type)
    processor = MultimodalProcessor({key: processor_for(key) for key in encoders}, parts.tokenizer(), model=model)
    return model.eval(), processor


@pytest.mark.parametrize(
    ("feature", "projection_type", "counts"),
    [
        ("embedding", "pooled", (1, 15, 3)),
        ("embedding", "linear", (1, 15, 3)),
        ("tokens", "pooled", (1, 15, 3)),
        ("tokens", "linear", (17, 15 * 17, 3 * 25)),
    ],
)
def test_tokens_of_an_image_a_clip_and_a_sound(parts, media, feature, projection_type, counts):
    model, processor = make(parts, feature, projection_type)
    content = [
        {"type": "image", "image": media.image()},
        {"type": "video", "video": Video(media.video(frames=9), 3.0)},
        {"type": "audio", "audio": (media.audio(), 16000)},
    ]
    batch = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
    ids = batch["input_ids"]
    assert tuple(int((ids == i).sum()) for i in processor.token_ids.values()) == counts
    assert model(**batch).logits.isfinite().all()


def test_pooled_tokens_are_the_means_of_clips():
    config = ImageBindConfig(**IMAGEBIND)
    encoder = ImageBindEncoder(config.encoder_of("audio", "tokens")).eval()
    module = ModalEncoderModule(encoder)
    module.init_projector(8, "pooled", "gelu")
    sounds = torch.randn(2, 3, 1, 128, 204)
    states = encoder(sounds).last_hidden_state.unflatten(1, (3, -1)).mean(dim=2)
    torch.testing.assert_close(module({"media_values": sounds}), module.projector.projection.linear(states))


def test_an_encoder_is_its_tower_of_the_joint_model(original):
    names = ImageBindEncoder(original.config.encoder_of("audio")).state_dict().keys()
    state = {name: tensor for name, tensor in original.state_dict().items() if name in names}
    encoder = ImageBindEncoder(original.config.encoder_of("audio")).double()
    encoder.load_state_dict(state)
    sounds = torch.randn(1, 3, 1, 128, 204, dtype=torch.float64)
    torch.testing.assert_close(encoder(sounds)[0], original.embed_clips("audio", sounds))
    left = encoder.config.left_out()
    rest = [name for name in original.state_dict() if name not in names]
    assert (
        rest
        and all(name.startswith(tuple(left)) for name in rest)
        and not any(name.startswith(tuple(left)) for name in names)
    )
    with pytest.raises(InputError, match="no encoder of 'text'"):
        original.config.encoder_of("text")


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="no tower for"):
        ImageBindConfig(modalities=["smell"])
    with pytest.raises(InputError, match="audio_num_heads = 7"):
        ImageBindConfig(audio_num_heads=7)
    with pytest.raises(InputError, match="expected embedding or tokens"):
        ImageBindConfig(feature="pixels")
    model = ImageBindModel(ImageBindConfig(**IMAGEBIND, modalities=["vision"]))
    with pytest.raises(InputError, match="no tower for 'audio'"):
        model.embed("audio", torch.zeros(1, 1, 128, 204))
    with pytest.raises(InputError, match="give 10"):
        model.embed("image", torch.zeros(1, 3, 168, 168))
    with pytest.raises(InputError, match="one tower"):
        ImageBindEncoder(ImageBindConfig(**IMAGEBIND))
