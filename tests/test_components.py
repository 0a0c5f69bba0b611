"""Stage 0: losses of VAEs and vocoders, denoising under a text encoder that trains, parts that load by themselves."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AudioLDMPipeline, AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from training_utils import shared
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel, DacConfig, DacModel

from anygpt.decoders.audioldm import vocoder_loss
from anygpt.decoders.base import KL_WEIGHT, autoencoder_loss
from anygpt.errors import InputError
from anygpt.losses.formulas import LossWeights
from anygpt.losses.terms import Target
from anygpt.tokenizers import MediaTokenizer, load_media_tokenizer
from anygpt.tokenizers.base import COMMITMENT
from anygpt.toyworld.datasets import write_dataset
from anygpt.toyworld.world import THINGS
from anygpt.toyworld.zoo import zoo
from anygpt.training.components import write_components
from anygpt.training.config import parse_config
from anygpt.training.stages import COMPONENTS
from anygpt.training.trainer import train

ONLY_OWN = {"loss.llm": 0, "loss.encoder_llm": 0, "loss.llm_decoder": 0, "loss.encoder_decoder": 0}


def test_the_autoencoders_loss_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    media, decoded = torch.rand(2, 3, 8, 8, generator=generator), torch.rand(2, 3, 8, 8, generator=generator)
    mean, std = torch.randn(2, 4, 2, 2, generator=generator), torch.rand(2, 4, 2, 2, generator=generator) + 0.1
    found = autoencoder_loss(decoded, media, mean, std)
    for row in range(2):
        posterior = torch.distributions.Normal(mean[row].double(), std[row].double())
        divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum()
        error = (decoded[row] - media[row]).double().abs().sum()
        expected = (error + KL_WEIGHT * divergence) / media[row].numel()
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-7)


def test_the_autoencoders_loss_weighs_error_and_divergence_alike_in_media_of_any_size():
    generator = torch.Generator().manual_seed(0)
    media, decoded, mean, std = (torch.rand(1, 3, n, n, generator=generator) for n in (32, 32, 4, 4))
    tiled = [x.repeat(1, 1, 2, 2) for x in (decoded, media, mean, std)]
    torch.testing.assert_close(autoencoder_loss(*tiled), autoencoder_loss(decoded, media, mean, std))
    torch.testing.assert_close(KL_WEIGHT / media.numel(), 1e-5)  # the weight that the zoo's pictures were trained with


def test_the_vocoders_loss_is_the_relative_power_of_the_error():
    made, wanted = np.random.default_rng(0).standard_normal((2, 3, 40))
    found = vocoder_loss(torch.from_numpy(made), torch.from_numpy(wanted))
    np.testing.assert_allclose(found, ((made - wanted) ** 2).sum(1) / (wanted**2).sum(1), rtol=1e-6)
    silence = torch.zeros(1, 40, requires_grad=True)
    vocoder_loss(silence, torch.zeros(1, 40)).sum().backward()
    assert silence.grad.isfinite().all()


def test_a_vocoder_that_trains_is_given_the_samples_of_each_frame(parts):
    decoder = parts.decoder("audio")
    plain = decoder.targets
    waveform = np.random.default_rng(0).uniform(-0.5, 0.5, plain.num_frames * plain.hop_length).astype(np.float32)
    waveform -= waveform.mean()
    waveform *= 0.5 / np.abs(waveform).max()  # as the targets do it, so that they change nothing
    medium = (waveform, plain.sampling_rate)
    decoder.train_networks(["vocoder"])
    both = decoder.targets.one(medium, 0)
    mels, samples = np.split(both, [plain.num_mel_bins], axis=-1)
    np.testing.assert_array_equal(mels, plain.one(medium, 0))
    np.testing.assert_allclose(samples.reshape(-1), waveform, atol=1e-6)
    losses = decoder.reconstruction_losses([medium])
    with torch.no_grad():
        made = decoder.vocoder(torch.from_numpy(mels[0])[None])
    assert losses.keys() == {"vocoder"}
    torch.testing.assert_close(losses["vocoder"].detach(), vocoder_loss(made, torch.from_numpy(waveform)[None]))


def test_captions_are_dropped_by_share_and_by_their_own_generators(parts):
    captions, decoder = [f"a {thing}" for thing in THINGS] * 20, parts.decoder("image")

    def dropped(rows, **weights):
        generators = [torch.Generator().manual_seed(i) for i in range(len(captions))][rows]
        given = {"captions": captions[rows], "media": captions[rows]}
        return Target(
            "image", torch.arange(len(generators)), given, decoder, LossWeights(**weights), None, generators
        ).captions

    own = {"decoder": 1, "alignment": 0}
    first = dropped(slice(None), caption_dropout=0.25, **own)
    assert 0.2 < np.mean([text == "" for text in first]) < 0.3
    assert set(first) == {"", *captions}
    assert dropped(slice(5, 9), caption_dropout=0.25, **own) == first[5:9]
    assert dropped(slice(None), **own) == dropped(slice(None), caption_dropout=0.25) == captions


def test_captions_that_are_encoded_already_are_dropped_likewise(parts):
    captions, decoder = [f"a {thing}" for thing in THINGS], parts.decoder("image")
    weights, encodings = LossWeights(decoder=1, alignment=0, caption_dropout=0.5), []
    for given in ({"captions": captions}, {"conditions": decoder.encode_text(captions)}):
        generators = [torch.Generator().manual_seed(i) for i in range(len(captions))]
        rows, given = torch.arange(len(captions)), given | {"media": captions}
        target = Target("image", rows, given, decoder, weights, None, generators)
        encodings.append(target.encoding.embeds)
        assert 0 < sum(target.dropped) < len(captions)
    torch.testing.assert_close(*encodings)


def test_a_decoder_trains_the_networks_it_is_told(parts):
    decoder = parts.decoder("audio")
    assert decoder.trains == ("unet",)
    decoder.train_networks(["vocoder", "text_encoder"])
    decoder.requires_grad_(True).train()
    training = {name for name, child in decoder.named_children() if any(p.requires_grad for p in child.parameters())}
    assert training == {"vocoder", "text_encoder"}
    assert decoder.vocoder.training and not decoder.unet.training
    assert decoder.encode_text(["a red ring"]).requires_grad
    with pytest.raises(InputError, match=r"it has .*unet"):
        decoder.train_networks(["tokenizer"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    def make(folder):
        for kind in ("words", "pairs", "pictures", "sounds"):
            write_dataset(folder, kind, 12, seed=0, things=THINGS)

    return shared(tmp_path_factory, "component_data", make)


def run(folder, data, kind, parts, names, **settings):
    arguments = {
        "run.output_dir": folder / "run",
        "run.device": "cpu",
        "model.language_model.path": parts.folder / "language_model",
        "data.train": json.dumps([{"path": str(data / f"{kind}.jsonl")}]),
        "train.parts": json.dumps(names),
        "train.batch_size": 4,
        "train.max_steps": 3,
        "train.warmup_steps": 0,
        **settings,
    }
    config = parse_config([f"--{name}={value}" for name, value in arguments.items()])
    final = train(config, COMPONENTS)
    write_components(final, config)
    assert json.loads((Path(final) / "config.json").read_text())["trained"]["parts"] == names
    made = Path(config.run.output_dir) / "parts"
    assert len({path.stat().st_mode for path in made.rglob("*") if path.is_file()}) == 1  # as the umask says
    return made


def decoder_of(parts, modality):
    entry = {"path": str(parts.folder / f"{modality}_decoder"), "num_signal_tokens": 1}
    return {"model.decoders": json.dumps({modality: entry | {"projector": {"projection_type": "linear"}}})}


def changed(before, after):
    return {
        n for (n, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True) if (a != b).any()
    }


def test_the_autoencoder_is_trained_and_its_latents_are_scaled(tmp_path, data, parts):
    made = run(
        tmp_path, data, "pictures", parts, ["image_decoder.vae"],
        **{**decoder_of(parts, "image"), **ONLY_OWN, "loss.reconstruction": 1},
    )  # fmt: skip
    pipeline = StableDiffusionPipeline.from_pretrained(made / "image_decoder")
    before = parts.decoder("image")
    assert len(changed(before.vae, pipeline.vae)) > 40
    assert not changed(before.unet, pipeline.unet) and not changed(before.text_encoder, pipeline.text_encoder)
    decoder = parts.decoder("image")
    decoder.vae = AutoencoderKL.from_pretrained(made / "image_decoder" / "vae")
    rows = [json.loads(line) for line in (data / "pictures.jsonl").read_text().splitlines()]
    pictures = [Image.open(data / row["messages"][1]["content"][-1]["path"]) for row in rows]
    latents = decoder.posterior(decoder.targets(pictures))[0] * decoder.vae.config.scaling_factor
    assert abs(float(latents.std().detach()) - 1) < 1e-3


def test_bad_samples_are_skipped_to_the_end(tmp_path, data, parts):
    shutil.copytree(data, tmp_path / "data")
    row = json.loads((data / "pictures.jsonl").read_text().splitlines()[0])
    (tmp_path / "data" / row["messages"][1]["content"][-1]["path"]).unlink()
    own = {**decoder_of(parts, "image"), **ONLY_OWN, "loss.reconstruction": 1, "data.on_bad_sample": "skip"}
    assert list(run(tmp_path, tmp_path / "data", "pictures", parts, ["image_decoder.vae"], **own).iterdir())


def test_a_denoiser_and_its_text_encoder_train_together(tmp_path, data, parts):
    names = ["audio_decoder.unet", "audio_decoder.text_encoder"]
    own = {**decoder_of(parts, "audio"), **ONLY_OWN, "loss.decoder": 1, "loss.caption_dropout": 0.5}
    made = run(tmp_path, data, "sounds", parts, names, **own)
    pipeline = AudioLDMPipeline.from_pretrained(made / "audio_decoder")
    before = parts.decoder("audio")
    assert changed(before.unet, pipeline.unet) and changed(before.text_encoder, pipeline.text_encoder)
    assert not changed(before.vae, pipeline.vae) and not changed(before.vocoder, pipeline.vocoder)


def test_encoders_and_language_model_become_parts(tmp_path, data, parts):
    encoders = {m: {"path": str(parts.folder / f"{m}_encoder")} for m in ("image", "audio")}
    made = run(
        tmp_path / "encoders", data, "pairs", parts, ["image_encoder", "image_projector", "audio_encoder"],
        **{"model.encoders": json.dumps(encoders), **ONLY_OWN, "loss.encoder": 1},
    )  # fmt: skip
    assert sorted(path.name for path in made.iterdir()) == ["audio_encoder", "image_encoder"]
    assert changed(parts.encoder("image"), CLIPVisionModel.from_pretrained(made / "image_encoder"))
    made = run(tmp_path / "words", data, "words", parts, ["language_model"])
    after = AutoModelForCausalLM.from_pretrained(made / "language_model")
    assert len(changed(parts.language_model(lively=False), after)) > 30
    assert len(AutoTokenizer.from_pretrained(made / "language_model")) == after.config.vocab_size
    made = run(
        tmp_path / "on", data, "words", parts, ["language_model"], **{"model.language_model.path": "zoo:language_model"}
    )
    tokenizers = (AutoTokenizer.from_pretrained(folder / "language_model") for folder in (made, zoo()))
    assert len({tokenizer.backend_tokenizer.to_str() for tokenizer in tokenizers}) == 1


def test_a_tokenizer_is_trained_by_its_formula(tmp_path, data, parts):
    tokenizers = {"image": {"path": str(parts.folder / "image_tokenizer")}}
    made = run(
        tmp_path, data, "pictures", parts, ["image_tokenizer"],
        **{"model.tokenizers": json.dumps(tokenizers), **ONLY_OWN, "loss.reconstruction": 1},
    )  # fmt: skip
    before, after = (load_media_tokenizer(path / "image_tokenizer", "image") for path in (parts.folder, made))
    assert len(changed(before, after)) == len(list(before.parameters()))
    rows = [json.loads(line) for line in (data / "pictures.jsonl").read_text().splitlines()]
    pictures = [Image.open(data / row["messages"][1]["content"][-1]["path"]) for row in rows[:3]]
    found = before.reconstruction_losses(pictures)["tokenizer"]
    network, pixels = before.network, before.targets(pictures)
    latents = network.encode(pixels).latents.movedim(1, -1).reshape(-1, 8).double()
    codes = network.quantize.embedding.weight.double()
    distances = ((codes[:, None] - latents) ** 2).sum(-1)
    nearest = distances.amin(0).mean() / 8
    error = (network.decode(network.encode(pixels).latents).sample - pixels).double().square().mean((1, 2, 3))
    expected = error + COMMITMENT * 1.25 * nearest
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(InputError, match="a DacModel is not trained here"):
        MediaTokenizer(
            DacModel(DacConfig(encoder_hidden_size=4, decoder_hidden_size=16)), "audio"
        ).reconstruction_losses([])


def test_a_network_that_is_not_there_is_named(tmp_path, data, parts):
    own = {**decoder_of(parts, "image"), **ONLY_OWN, "loss.reconstruction": 1}
    with pytest.raises(InputError, match=r"no network 'vocoder'; it has .*vae"):
        run(tmp_path, data, "pictures", parts, ["image_decoder.vocoder"], **own)
    with pytest.raises(InputError, match="decoders are image_decoder"):
        run(tmp_path, data, "pictures", parts, ["video_decoder.vae"], **own)
