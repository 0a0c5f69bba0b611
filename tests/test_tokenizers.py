"""Media tokenizers: equal to the libraries' own encoding and decoding, loaded strictly, clear about bad input."""

import json

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    DacConfig,
    DacModel,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3VQVAE,
    Emu3VQVAEConfig,
    EncodecConfig,
    EncodecModel,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVQVAE,
    JanusVQVAEConfig,
    MimiConfig,
    MimiModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from anygpt.errors import InputError
from anygpt.tokenizers import MediaTokenizer, load_media_tokenizer
from anygpt.tokenizers.base import PATIENCE, PIXELS
from anygpt.tokenizers.module import ModalTokenizerModule
from anygpt.toyworld.judges import load_judges
from anygpt.toyworld.render import render
from anygpt.toyworld.world import MOTIONS, THINGS

GAN = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "latent_channels": 4, "embed_dim": 4}
CODEC = {"num_filters": 4, "hidden_size": 16, "upsampling_ratios": [4, 2], "codebook_dim": 16, "sampling_rate": 160}

LLM = "zoo:language_model"


def vq(channels=3, size=16, width=8, **options):
    return VQModel(
        channels, channels, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (width, width), latent_channels=4,
        num_vq_embeddings=16, norm_num_groups=4, sample_size=size, **options,
    )  # fmt: skip


def emu3():
    return Emu3VQVAE(Emu3VQVAEConfig(**GAN, codebook_size=16, temporal_downsample_factor=2, hidden_size=64))


def janus():
    return JanusVQVAE(JanusVQVAEConfig(**GAN, num_embeddings=16, num_patches=8))


def chameleon():
    return ChameleonVQVAE(ChameleonVQVAEConfig(**GAN, num_embeddings=16, resolution=16))


def encodec():
    return EncodecModel(EncodecConfig(**CODEC, codebook_size=16, target_bandwidths=[0.08, 0.24]))


def dac():
    sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "downsampling_ratios": [2, 4]}
    return DacModel(DacConfig(**sizes, n_codebooks=3, codebook_size=16, codebook_dim=4, sampling_rate=160))


def mimi():
    attention = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    sizes = {"vector_quantization_hidden_dimension": 16, "num_quantizers": 3, "upsample_groups": 16}
    return MimiModel(MimiConfig(**CODEC | attention | sizes, codebook_size=16))


def vocoder():
    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=16, sampling_rate=1600, upsample_initial_channel=8, upsample_rates=[4, 5],
            upsample_kernel_sizes=[8, 10], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]],
        )
    )  # fmt: skip


BUILDERS = {
    "vq": ("image", vq, {}),
    "vq_amused": ("image", lambda: vq(lookup_from_codebook=True), {}),
    "vq_spatial": ("image", lambda: vq(width=32, norm_type="spatial"), {"size": [8, 16]}),
    "vq_frames": ("video", vq, {"num_frames": 3}),
    "vq_mels": ("audio", lambda: vq(1), {"vocoder": vocoder}),
    "emu3": ("image", emu3, {"size": 16}),
    "emu3_clips": ("video", emu3, {"size": 16, "num_frames": 4}),
    "janus": ("image", janus, {}),
    "chameleon": ("image", chameleon, {}),
    "encodec": ("audio", encodec, {}),
    "encodec_first": ("audio", encodec, {"codebooks": 1, "seconds": 0.5}),
    "dac": ("audio", dac, {}),
    "dac_two": ("audio", dac, {"codebooks": 2}),
    "mimi": ("audio", mimi, {}),
}


@torch.no_grad()
def build(name):
    torch.manual_seed(0)
    modality, network, options = BUILDERS[name]
    network = network()
    for key, tensor in network.state_dict().items():  # buffers too: codecs start with empty codebooks
        if "embed" in key or "codebook.weight" in key or "quant_conv.weight" in key:
            tensor.normal_(std=0.02 if ".codebook.embed" in key else 1.0)
    if isinstance(network, EncodecModel):  # whose random latents differ little: take some as codes
        latents = network.encoder(torch.randn(1, 1, 128))[0].T
        for layer in network.quantizer.layers:
            layer.codebook.embed.copy_(latents)
    options = {key: value() if callable(value) else value for key, value in options.items()}
    return MediaTokenizer(network, modality, **options)


def media(tokenizer, count=3):
    rng = np.random.default_rng(0)
    if tokenizer.modality == "image":
        return [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]
    if tokenizer.modality == "video":
        return [rng.integers(0, 256, (6, 20, 24, 3), dtype=np.uint8) for _ in range(count)]
    rate = int(tokenizer.rate)
    return [(rng.uniform(-0.5, 0.5, 2 * rate).astype(np.float32), rate) for _ in range(count)]


def pixels_of(tokenizer, given):
    """Inputs of the network by image processors' formula, from the 8-bit targets."""
    eight_bit = (tokenizer.targets(given) + 1) * 127.5
    return eight_bit / 255


def library_codes(name, tokenizer, given):
    """The libraries' own encoding, with no code of ours but the conversion of raw media."""
    network, raw = tokenizer.network, tokenizer.targets(given)
    if name in ("encodec", "encodec_first"):
        return network.encode(raw, bandwidth=0.08 if name == "encodec_first" else 0.24).audio_codes[0]
    if name in ("dac", "dac_two"):
        return network.encode(raw, n_quantizers=2 if name == "dac_two" else None).audio_codes
    if name == "mimi":
        return network.encode(raw).audio_codes
    if name == "vq_mels":
        raw = (raw - tokenizer.vocoder.mean) / tokenizer.vocoder.scale
    elif name == "vq_amused":
        raw = pixels_of(tokenizer, given)
    if name == "emu3":
        return torch.stack(network.encode(raw, torch.tensor([[16, 16]] * len(raw))).image_tokens)
    if name == "emu3_clips":
        return network.quantize(
            network.quant_conv(network.encoder(raw.transpose(1, 2)).transpose(1, 2)).transpose(1, 2)
        )
    if name in ("janus", "chameleon"):
        return network.encode(raw).image_tokens.view(len(raw), -1)
    if name == "vq_frames":
        raw = raw.transpose(1, 2).flatten(0, 1)
    return network.quantize(network.encode(raw).latents)[2][2]


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_codes_are_the_librarys_own(name):
    tokenizer = build(name)
    given = media(tokenizer)
    codes, expected = tokenizer.encode(given), library_codes(name, tokenizer, given)
    if tokenizer.family.hop is not None:  # (K, Q, T): frame by frame, each codebook after the one before
        assert expected.shape[1:] == tokenizer.shape[::-1]
        expected = expected + 16 * torch.arange(expected.shape[1])[:, None]
        expected = expected.transpose(1, 2)
    assert codes.dtype == torch.int64 and codes.shape == (3, tokenizer.num_codes) and len(codes.unique()) > 2
    assert torch.equal(codes, expected.reshape(3, -1))
    assert tokenizer.num_codes == np.prod(tokenizer.shape)
    tokenizer.check_codes(codes)
    assert torch.equal(tokenizer.encode(tokenizer.targets(given)), codes)
    assert torch.equal(torch.cat([tokenizer.encode([one]) for one in given]), codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(given), codes)


def library_media(name, tokenizer, codes):
    """The libraries' own decoding of a batch of codes, as pixels in [0, 1] or waveforms."""
    network, grid = tokenizer.network, codes.view(-1, *tokenizer.shape)
    if tokenizer.family.hop is not None:
        grid = (grid - 16 * torch.arange(grid.shape[-1])).transpose(1, 2)
        if name.startswith("encodec"):
            return network.decode(grid[None], [None]).audio_values[:, 0]
        return (network.decode(audio_codes=grid).audio_values).reshape(len(grid), -1)
    if name == "emu3":
        return (network.decode(grid) + 1) / 2
    if name == "emu3_clips":
        return (network.decode(grid).transpose(1, 2) + 1) / 2
    if name == "janus":
        return (network.decode(codes) + 1) / 2
    grid = grid.reshape(-1, *grid.shape[-2:])
    shape = (*grid.shape, 4)
    if name == "vq_amused":
        return network.decode(grid, force_not_quantize=True, shape=shape).sample
    made = network.decode(network.quantize.get_codebook_entry(grid.flatten(), shape), force_not_quantize=True).sample
    if name == "vq_mels":
        return tokenizer.vocoder((made * tokenizer.vocoder.scale + tokenizer.vocoder.mean)[:, 0])
    made = made.unflatten(0, (len(codes), -1)) if tokenizer.modality == "video" else made
    return (made.transpose(1, 2) + 1) / 2 if tokenizer.modality == "video" else (made + 1) / 2


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "chameleon"])
@torch.no_grad()
def test_media_are_the_librarys_own(name):
    tokenizer = build(name)
    codes = tokenizer.encode(media(tokenizer))
    made, expected = tokenizer.decode(codes), library_media(name, tokenizer, codes)
    alone = [tokenizer.decode(codes[i : i + 1])[0] for i in range(3)]
    if tokenizer.modality == "audio":
        assert all(one.dtype == np.float32 and one.ndim == 1 for one in made)
        np.testing.assert_array_equal(np.stack(made), expected.numpy())
        np.testing.assert_allclose(np.stack(alone), np.stack(made), atol=1e-5)
        return
    expected = (expected * 255).clamp(0, 255)
    expected = expected.movedim(1, -1).numpy()  # (K, [F,] H, W, 3)
    kinds = {"image": Image.Image, "video": np.ndarray}
    assert all(isinstance(one, kinds[tokenizer.modality]) for one in made)
    found = np.stack([np.asarray(one) for one in made])
    assert found.dtype == np.uint8 and found.std() > 1
    assert np.abs(found - expected).max() <= 0.5 + 1e-3  # rounded
    assert np.abs(np.stack([np.asarray(one) for one in alone]).astype(int) - found).max() <= 1


@torch.no_grad()
def test_delayed_codes_are_the_same_in_another_order(tmp_path):
    plain = build("dac")
    delayed = MediaTokenizer(plain.network, "audio", delay=True, seconds=0.25)
    plain = MediaTokenizer(plain.network, "audio", seconds=0.25)
    given = media(plain)
    codes, grid = delayed.encode(given), plain.encode(given).view(3, *plain.shape)
    frames, books = plain.shape
    written = [
        (t, q) for step in range(frames + books - 1) for t in range(frames) for q in range(books) if t + q == step
    ]
    assert torch.equal(codes, torch.stack([grid[:, t, q] for t, q in written], dim=1))
    assert all(np.array_equal(*pair) for pair in zip(delayed.decode(codes), plain.decode(grid.flatten(1)), strict=True))
    with pytest.raises(InputError, match="of audio 0 is"):
        delayed.check_codes(grid.flatten(1))
    delayed.save_pretrained(tmp_path)
    assert torch.equal(load_media_tokenizer(tmp_path, "audio").encode(given), codes)
    with pytest.raises(InputError, match="row_ends is set, but with delay"):
        ModalTokenizerModule(delayed, row_ends=True)
    with pytest.raises(InputError, match="delay is set, but a VQModel under image has none"):
        MediaTokenizer(vq(), "image", delay=True)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_saved_tokenizer_is_the_same(name, tmp_path):
    tokenizer = build(name)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_media_tokenizer(tmp_path, tokenizer.modality)
    given = media(tokenizer)
    codes = tokenizer.encode(given)
    assert torch.equal(loaded.encode(given), codes) and loaded.shape == tokenizer.shape
    assert loaded.anygpt_fingerprint and loaded.anygpt_source.path == str(tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.network.training
    if tokenizer.can_decode:
        pairs = zip(loaded.decode(codes), tokenizer.decode(codes), strict=True)
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
    book = tokenizer.codebook()
    assert book.shape[0] == tokenizer.codebook_size == 16 * (tokenizer.shape[-1] if tokenizer.family.hop else 1)
    assert torch.equal(loaded.codebook(), book)


def test_real_sizes_are_those_of_the_models(tmp_path):
    """On the meta device, from the configs of the models on the hub."""
    dac = DacConfig(n_codebooks=12, downsampling_ratios=[2, 4, 5, 8])
    with torch.device("meta"):
        models = {
            "emu3": (Emu3VQVAE(Emu3VQVAEConfig()), "image", {"size": 720}, (90, 90), 32768),
            "emu3_clips": (Emu3VQVAE(Emu3VQVAEConfig()), "video", {"size": 720, "num_frames": 8}, (2, 90, 90), 32768),
            "janus": (JanusVQVAE(JanusVQVAEConfig(num_patches=24)), "image", {}, (24, 24), 16384),
            "chameleon": (ChameleonVQVAE(ChameleonVQVAEConfig()), "image", {}, (32, 32), 8192),
            "encodec": (EncodecModel(EncodecConfig()), "audio", {"codebooks": 8}, (75, 8), 8192),
            "dac": (DacModel(dac), "audio", {}, (50, 12), 12288),
            "mimi": (MimiModel(MimiConfig()), "audio", {"codebooks": 8, "seconds": 2}, (25, 8), 16384),
        }
    for name, (network, modality, options, shape, codes) in models.items():
        tokenizer = MediaTokenizer(network, modality, **options)
        assert (tokenizer.shape, tokenizer.codebook_size) == (shape, codes), name


TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("name", ["emu3", "janus", "chameleon"])
def test_a_tokenizer_is_taken_out_of_a_whole_model(name, tmp_path):
    tokenizer = build(name)
    settings = {"vq_config": tokenizer.network.config.to_dict()}
    text = TEXT | {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    words = {f"IMGIMG{c}Z": 32 + i for i, c in enumerate("ABCDEFGHIJKLMNOP")} | {"<image>": 50}
    words |= {f"<|visual token {i:06d}|>": 32 + i for i in range(16)} | {"<|extra_200|>": 51}
    if name == "emu3":
        whole = Emu3ForConditionalGeneration(Emu3Config(**settings, text_config=text, vocabulary_map=words))
    elif name == "chameleon":
        whole = ChameleonForConditionalGeneration(ChameleonConfig(**settings, **text, vocabulary_map=words))
    else:
        vision = TEXT | {"image_size": 16, "patch_size": 2, "num_image_tokens": 64, "projection_dim": 16}
        settings["vq_config"] |= {"projection_dim": 16, "image_token_embed_dim": 16}
        whole = JanusForConditionalGeneration(
            JanusConfig(**settings, vision_config=vision, text_config=text | {"model_type": "llama"})
        )
    whole.model.vqmodel.load_state_dict(tokenizer.network.state_dict())
    whole.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.0] * 3, "image_std": [1.0] * 3}))
    options = {"size": 16} if name == "emu3" else {}
    loaded = load_media_tokenizer(tmp_path, "image", **options)
    given = media(tokenizer)
    with torch.no_grad():
        expected = tokenizer.family.encode(tokenizer.network, pixels_of(tokenizer, given)).flatten(1)
    assert torch.equal(loaded.encode(given), expected)
    assert not torch.equal(loaded.encode(given), tokenizer.encode(given))  # the image processor's numbers are followed


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"image_mean": [0.2] * 3, "image_std": [0.3] * 3}, {"image_mean": [0.2] * 3, "image_std": [0.3] * 3}),
        ({"image_mean": [0.2] * 3, "do_normalize": False}, {"image_mean": 0.0, "image_std": 1.0}),
        ({"rescale_factor": 1 / 255, "do_rescale": False}, {"rescale_factor": 1.0}),
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["preprocessor_config", "processor_config"])
def test_the_image_processors_settings_are_followed(nested, settings, expected, tmp_path):
    janus().save_pretrained(tmp_path)
    file = tmp_path / ("processor_config.json" if nested else "preprocessor_config.json")
    file.write_text(json.dumps({"image_processor": settings} if nested else settings))
    assert load_media_tokenizer(tmp_path, "image").pixels == PIXELS | expected


def test_the_loading_is_strict(tmp_path):
    build("vq").save_pretrained(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    tensors = load_file(weights)
    odd = {"quantize.embedding.weight": torch.zeros(17, 4)}
    lacking = {name: value for name, value in tensors.items() if name not in odd}
    for damaged, message in ((lacking, "lacks quantize.embedding"), (tensors | odd, "another shape")):
        save_file(damaged, weights, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            load_media_tokenizer(tmp_path, "image")
    encodec = tmp_path / "encodec"
    build("encodec").save_pretrained(encodec)
    (weights,) = encodec.glob("*.safetensors")
    save_file(load_file(weights) | {"more": torch.zeros(1)}, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"cannot load the audio tokenizer .* it has left over more"):
        load_media_tokenizer(encodec, "audio")


def test_bad_input_is_named(tmp_path):
    tokenizer, sounds = build("vq"), build("dac")
    codes = tokenizer.encode(media(tokenizer))
    cases = {
        r"code 5 of image 1 is 16, expected 0 to 15": lambda: tokenizer.decode(put(codes, 1, 5, 16)),
        r"code 0 of image 0 is -1": lambda: tokenizer.decode(put(codes, 0, 0, -1)),
        r"code 1 of audio 0 is 3, expected 16 to 31": lambda: sounds.decode(put(sounds.encode(media(sounds)), 0, 1, 3)),
        r"\(3, 63\), expected integers \(media, 64\): a grid of 8 × 8": lambda: tokenizer.decode(codes[:, 1:]),
        r"codes of image are torch.float32": lambda: tokenizer.decode(codes.float()),
        r"ChameleonVQVAE only encodes": lambda: build("chameleon").decode(codes),
        r"size is 10 × 15 pixels, expected multiples of 2": lambda: MediaTokenizer(vq(), "image", size=[10, 15]),
        r"num_frames is 3, expected a multiple of 2": lambda: MediaTokenizer(emu3(), "video", size=16, num_frames=3),
        r"has 6 channels, expected 3": lambda: MediaTokenizer(vq(6), "image"),
        r"has 1 channels, expected 3": lambda: MediaTokenizer(vq(1), "video"),
        r"size is 0 × 0 pixels": lambda: MediaTokenizer(vq(), "image", size=0),
        r"name a vocoder": lambda: MediaTokenizer(vq(1), "audio"),
        r"vocoder takes 16 mels, but the VQModel has 32": lambda: MediaTokenizer(vq(1, 32), "audio", vocoder=vocoder()),
        r"it takes no image": lambda: MediaTokenizer(dac(), "image"),
        r"frame_rate is 0, expected a number above 0": lambda: MediaTokenizer(vq(), "video", frame_rate=0),
        r"size is \[8\], expected one number, or height and width": lambda: MediaTokenizer(vq(), "image", size=[8]),
        r"codebooks is 4, but the DacModel has 3": lambda: MediaTokenizer(dac(), "audio", codebooks=4),
        r"seconds is 0.001, shorter than one code": lambda: MediaTokenizer(dac(), "audio", seconds=0.001),
        r"num_frames is set, but a VQModel under image has none": lambda: MediaTokenizer(vq(), "image", num_frames=2),
        r"set size to pixels": lambda: MediaTokenizer(emu3(), "image"),
        r"takes 16 pixels only": lambda: MediaTokenizer(janus(), "image", size=32),
        r"Linear is no tokenizer; expected VQModel": lambda: MediaTokenizer(torch.nn.Linear(1, 1), "image"),
        r"normalised chunks": lambda: MediaTokenizer(EncodecModel(EncodecConfig(**CODEC, normalize=True)), "audio"),
        r"'llama' is no tokenizer; expected one of VQModel": lambda: load_media_tokenizer(LLM, "image"),
        r"a part has no option 'frames'": lambda: load_media_tokenizer(LLM, "image", frames=3),
    }  # fmt: skip
    for message, run in cases.items():
        with pytest.raises(InputError, match=message):
            run()


def test_damaged_settings_are_named(tmp_path):
    build("vq").save_pretrained(tmp_path)
    for damaged in ({"size": "large"}, {"size": [16]}, {"pixels": {"image_mean": "grey"}}, {"speed": 3}):
        (tmp_path / "anygpt_tokenizer.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match="cannot load the image tokenizer"):
            load_media_tokenizer(tmp_path, "image")


def put(codes, row, place, value):
    codes = codes.clone()
    codes[row, place] = value
    return codes


def test_a_vocoder_of_ones_own_choice_is_taken(tmp_path):
    build("vq_mels").save_pretrained(tmp_path)
    (tmp_path / "other").mkdir()
    vocoder().save_pretrained(tmp_path / "other" / "vocoder")
    loaded = load_media_tokenizer(tmp_path, "audio", vocoder=str(tmp_path / "other"))
    loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "vocoder").exists()  # it is named instead
    other, again = loaded.vocoder.state_dict(), load_media_tokenizer(tmp_path / "again", "audio").vocoder.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in other.items())


def test_training_keeps_codes_in_use():
    """A new codebook begins as latents of the first batch; a code that no batch uses moves to a latent."""
    tokenizer = MediaTokenizer(vq(), "image")
    rng = np.random.default_rng(0)
    given = tokenizer.targets([render("image", thing, None, rng) for thing in THINGS[:4]])
    codes = tokenizer.network.quantize.embedding.weight

    def distance():
        latents = tokenizer.network.encode(tokenizer.to_network(given)).latents.movedim(1, -1).flatten(0, 2)
        return torch.cdist(codes, latents).amin(1)

    before = codes.clone()
    tokenizer.reconstruction_losses(given)
    assert torch.equal(codes, before), "frozen"
    tokenizer.network.requires_grad_(True)
    tokenizer.reconstruction_losses(given)["tokenizer"].sum().backward()
    assert float(distance().max()) < 1e-3
    with torch.no_grad():
        codes[3] = 50.0
    for _ in range(PATIENCE):
        tokenizer.reconstruction_losses(given)
    assert float(codes[3].max()) == 50.0
    tokenizer.reconstruction_losses(given)
    assert float(distance()[3]) < 1e-3


@pytest.mark.parametrize(
    ("modality", "name", "options", "codes"),
    [
        ("image", "image_tokenizer", {}, 64),
        ("video", "image_tokenizer", {"num_frames": 2}, 128),
        ("audio", "audio_tokenizer", {}, 64),
    ],
)
def test_the_zoos_tokenizers_keep_what_a_medium_shows(modality, name, options, codes):
    """A share of the 500 renders that scripts/zoo_quality.py measures."""
    tokenizer, judges = load_media_tokenizer(f"zoo:{name}", modality, **options), load_judges()
    rng = np.random.default_rng(3)
    motions = [MOTIONS[i % 4] for i in range(48)]
    renders = [render(modality, thing, motion, rng) for thing, motion in zip(THINGS, motions, strict=True)]
    given = [(one, 16_000) if modality == "audio" else one for one in renders]
    found = tokenizer.encode(given)
    assert found.shape == (48, codes) and tokenizer.codebook_size == 64
    made = tokenizer.decode(found)
    verdicts = getattr(judges, modality)(made)
    assert np.mean([one == (x.shape, x.colour) for one, x in zip(verdicts, THINGS, strict=True)]) >= 0.93
    if modality == "video":
        assert np.mean(np.array(judges.motion(made)) == motions) >= 0.95
