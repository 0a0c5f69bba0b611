"""All six terms in one run, and InfoNCE: against its formula, and over processes with unequal numbers of pairs."""

import math

import pytest
import torch
import torch.distributed as dist
from forked import server

from anygpt import MultimodalModel, load_decoder, load_encoder
from anygpt.encoders.contrast import info_nce
from anygpt.errors import InputError
from anygpt.losses.formulas import LossWeights
from anygpt.parts.source import Source
from anygpt.sequence.merging import IGNORE
from anygpt.toyworld.datasets import write_dataset
from anygpt.training.config import parse_config
from anygpt.training.stages import INSTRUCTION_TUNING
from anygpt.training.trainer import train

TERMS = ("encoder", "llm", "decoder", "encoder_llm", "llm_decoder", "encoder_decoder")


def naive_info_nce(first, second, temperature):
    """CLIP's, pair by pair, in float64."""

    def unit(row):
        return [x / math.sqrt(sum(y * y for y in row)) for x in row]

    first, second = ([unit(row) for row in side.double().tolist()] for side in (first, second))
    cosines = [[sum(x * y for x, y in zip(a, b, strict=True)) / temperature for b in second] for a in first]
    values = []
    for i, row in enumerate(cosines):
        column = [other[i] for other in cosines]
        logs = [math.log(sum(math.exp(x) for x in line)) for line in (row, column)]
        values.append(sum(logs) / 2 - row[i])
    return torch.tensor(values, dtype=torch.float64)


def pairs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randn(count, 6, generator=generator)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_info_nce_is_its_formula(count, temperature):
    first, second = pairs(count)
    loss = info_nce(first, second, temperature)
    assert loss.shape == (count,)
    expected = naive_info_nce(first, second, temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(info_nce(second, first, temperature), loss)


def test_info_nce_without_pairs_is_nothing():
    assert info_nce(torch.zeros(0, 6), torch.zeros(0, 6), 0.07).shape == (0,)


def test_info_nce_prefers_the_right_pairs():
    first, _ = pairs(5)
    assert info_nce(first, first, 0.07).mean() < 0.1 < 1 < info_nce(first, first.roll(1, dims=0), 0.07).mean()


# --------------------------------------------------------------------------------------------------- over processes


COUNTS = [(3, 2), (1, 4), (4, 0), (0, 2), (0, 0)]  # pairs on each process


def encode(first, second, weight):
    return first @ weight, second @ weight.square()


def train_rank(rank, folder):
    """One process's share of the loss and of the weight's gradient, over its own pairs, for all `COUNTS`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for case, counts in enumerate(COUNTS):
        weight = torch.eye(6).add(0.3).requires_grad_()
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        first, second = (side[own] for side in pairs(sum(counts)))
        loss = info_nce(*encode(first, second, weight), 0.5, gather=True)
        gradient = torch.autograd.grad(loss.sum() / sum(counts), weight)[0] if counts[rank] else torch.zeros(6, 6)
        torch.save((loss.detach(), gradient), f"{folder}/{case}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_unequal_pairs_are_as_one(tmp_path):
    """Also where one process, or both, have no pair at all: none may wait for the other."""
    ranks = [server().Process(target=train_rank, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    for case, counts in enumerate(COUNTS):
        shares = [torch.load(tmp_path / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        losses, gradients = zip(*shares, strict=True)
        assert tuple(map(len, losses)) == counts
        if sum(counts):
            weight = torch.eye(6).add(0.3).requires_grad_()
            whole = info_nce(*encode(*pairs(sum(counts)), weight), 0.5)
            torch.testing.assert_close(torch.cat(losses), whole.detach(), rtol=1e-6, atol=1e-6)
            expected = torch.autograd.grad(whole.mean(), weight)[0]
            torch.testing.assert_close(sum(gradients), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ in the model


def test_pairs_are_rows_with_both_media(tiny_model, media):
    model, processor = tiny_model(decoders=())
    model.loss_weights = LossWeights(nll=0, encoder=1.0, temperature=0.5)
    texts = ["<image> <audio> a ring", "<image> a cross", "<audio> and <image> a square", "<image><video> left"]
    images, audios = [media.image(i) for i in range(4)], [media.audio(i) for i in range(2)]
    batch = processor(
        {"image": {"images": images}, "audio": {"raw_speech": audios}, "video": {"videos": [media.video(0)]}},
        {"text": texts, "padding": True},
    )
    labels = batch["input_ids"]
    output = model(**batch, labels=labels)
    terms = {name: term.count for name, term in output.losses.items()}
    assert (
        terms
        == {"encoder/info_nce/audio": 2, "encoder/info_nce/video": 1}
        == model.count_losses({**batch, "labels": labels})
    )
    inputs = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask", "references")}
    features = model.encode(inputs)
    expected = naive_info_nce(features["audio"].mean(dim=1), features["image"][[0, 2]].mean(dim=1), 0.5)
    total = output.losses["encoder/info_nce/audio"].total.double()
    torch.testing.assert_close(total, expected.sum(), rtol=1e-5, atol=1e-5)
    output.loss.backward()
    assert model.image_encoder.projector.projection.weight.grad.any()


def test_encoders_are_bound_to_the_answer(tiny_model, media):
    """To the mean embedding of what carries a label, media and signal tokens apart."""
    model, processor = tiny_model(("image",), ("image",))
    model.loss_weights = LossWeights(nll=0, encoder=1.0, temperature=0.5, binding="text", alignment=0, denoising=0)
    texts = ["<image> a ring", "a cross", "<image> a red square <image_out>", "<image> no label"]
    batch = processor({"image": {"images": [media.image(i) for i in range(3)]}}, {"text": texts, "padding": True})
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    labels[:, :2], labels[3] = IGNORE, IGNORE
    output = model(**batch, labels=labels)
    assert output.losses["encoder/info_nce/image"].count == 2
    assert model.count_losses({**batch, "labels": labels})["encoder/info_nce/image"] == 2
    embedding = model.language_model.get_input_embeddings().weight
    left_out = [model.token_ids["image"], *model.signal_tokens.ids["image"]]
    answers = []
    for row in (0, 2):
        said = [i for i in labels[row].tolist() if i != IGNORE and i not in left_out]
        answers.append(embedding[said].double().mean(dim=0))
    features = model.encode({k: v for k, v in batch.items() if "." in k or k == "pixel_values"})["image"]
    expected = naive_info_nce(features[:2].mean(dim=1), torch.stack(answers), 0.5).sum()
    total = output.losses["encoder/info_nce/image"].total.double()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_what_encoders_are_bound_to_stays(tiny_model, media):
    model, processor = tiny_model(("image",), ())
    model.train_only(["language_model", "image_projector"])
    model.loss_weights = LossWeights(nll=0, encoder=1.0, binding="text")
    texts = ["<image> a ring", "<image> a red square"]
    batch = processor({"image": {"images": [media.image(i) for i in range(2)]}}, {"text": texts, "padding": True})
    model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)).loss.backward()
    assert model.image_encoder.projector.projection.weight.grad.any()
    gradient = model.language_model.get_input_embeddings().weight.grad
    assert gradient is None or not gradient.any()


def test_what_binds_must_be_there(tiny_model, media):
    model, processor = tiny_model(("image",), ())
    model.loss_weights = LossWeights(encoder=1.0, binding="audio")
    batch = processor({"image": {"images": [media.image(0)]}}, {"text": ["<image> a ring"]})
    with pytest.raises(InputError, match=r"loss\.binding is .*not an encoder; expected one of image, text"):
        model(**batch, labels=batch["input_ids"])


def test_an_unfrozen_decoder_trains_its_denoiser_alone(tiny_model):
    model, _ = tiny_model((), ("audio",))
    decoder = model.audio_decoder.module
    model.train_only(["audio_decoder"])
    model.train()
    assert all(p.requires_grad for p in decoder.unet.parameters()) and decoder.unet.training
    for frozen in (decoder.vae, decoder.text_encoder, decoder.vocoder):
        assert not any(p.requires_grad for p in frozen.parameters()) and not any(m.training for m in frozen.modules())
    first, second = (decoder.encode_text(["a red ring"]) for _ in range(2))
    assert torch.equal(first, second), "captions must be encoded the same each time"


def test_the_joint_configuration_trains_all_six_terms(tmp_path, capsys):
    rows = write_dataset(tmp_path / "data", "joint", 16, seed=0)
    config = parse_config(
        [
            "--config=configs/tiny/joint.yaml",
            f"--run.output_dir={tmp_path / 'run'}",
            "--run.device=cpu",
            f"--data.train=[{{path: {rows}}}]",
            "--train.max_steps=2",
            "--train.warmup_steps=0",
            "--train.batch_size=16",
            "--train.log_steps=1",
        ]
    )
    final = train(config, INSTRUCTION_TUNING)
    losses = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("update 1 "))
    names = [entry.split()[0] for entry in losses.split("  ")[1:]]
    assert {name.split("/")[0] for name in names} >= set(TERMS)
    assert {"encoder/info_nce/video", "encoder/info_nce/audio"} <= set(names)
    model = MultimodalModel.from_pretrained(final)
    zoo = load_decoder(Source("zoo:image_decoder"))
    assert not torch.equal(model.image_decoder.module.unet.conv_in.weight, zoo.unet.conv_in.weight)
    assert torch.equal(model.image_decoder.module.vae.quant_conv.weight, zoo.vae.quant_conv.weight)
    encoder = load_encoder(Source("zoo:audio_encoder"), "audio")
    assert not torch.equal(model.audio_encoder.module.conv1.weight, encoder.conv1.weight)
