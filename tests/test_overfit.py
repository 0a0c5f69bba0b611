"""Stage 2 on four captions, by gradient descent alone: what a decoder is given ends where its own captions would be."""

import json

import pytest
import torch
from decoder_families import FAMILIES
from PIL import Image

from anygpt import MultimodalModel, MultimodalProcessor
from anygpt.commands.cache_features import main as cache_features
from anygpt.data.collation import BAD, CUT, SAMPLE_IDS, TARGET_IDS, Collator
from anygpt.data.dataset import ConversationDataset, DataSource
from anygpt.losses.formulas import caption_alignment
from anygpt.training.config import parse_config
from anygpt.training.stages import LLM_DECODER
from anygpt.training.trainer import train

CAPTIONS = ["a red circle", "a blue square", "a green cross", "a white ring"]
SUFFIX = {"image": "png", "video": "mp4", "audio": "wav"}
SLOW = ["sana", "audioldm2", "flux-dev"]
PROJECTOR = {"d_model": 128, "num_encoder_layers": 1, "num_decoder_layers": 1, "ffn_dim": 256}


def write_rows(folder, modality):
    """One JSONL file: each caption asked for in words, and answered by a medium that nothing opens."""
    lines = []
    for index, caption in enumerate(CAPTIONS):
        medium = {"type": modality, "path": f"{index}.{SUFFIX[modality]}", "caption": caption}
        (folder / medium["path"]).touch()
        messages = [
            {"role": "user", "content": [{"type": "text", "text": f"Make {caption}."}]},
            {"role": "assistant", "content": [medium]},
        ]
        lines.append(json.dumps({"id": str(index), "messages": messages}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def run_stage2(folder, modality, path, source=None, cached=False):
    """Stage 2 from a random projector, by AdamW on NLL and alignment: denoising has no say in where conditions go.

    With `cached`, captions and states come from the feature cache: SANA would read its long instruction in each update.
    """
    decoder = {"path": str(source or f"zoo:{modality}_decoder"), "projector": PROJECTOR}
    if modality == "video" and source is None:
        decoder["num_frames"] = 2
    arguments = {
        "run.output_dir": str(folder / "run"),
        "run.device": "cpu",
        "model.language_model.path": "zoo:language_model",
        "model.decoders": json.dumps({modality: decoder}),
        "data.train": json.dumps([{"path": str(path)}]),
        "train.batch_size": 4,
        "train.max_steps": 600 if cached else 300,
        "train.learning_rate": 3e-3,
        "loss.denoising": 0,
    }
    options = [f"--{name}={value}" for name, value in arguments.items()]
    if cached:
        (folder / "run.yaml").write_text("run: {seed: 0}\n")
        options.append(f"--data.cache_dir={folder / 'cache'}")
        for medium in folder.glob("*.png"):
            Image.new("RGB", (8, 8)).save(medium)
        cache_features(["--config", str(folder / "run.yaml"), "--stage", "2", *options])
    return train(parse_config(options), LLM_DECODER)


def collate(processor, path):
    dataset = ConversationDataset.from_files([DataSource(path=str(path))])
    dataset.decode_targets = False
    batch = Collator(processor)([dataset[i] for i in range(len(dataset))])
    assert (
        batch.pop(SAMPLE_IDS) == ["0", "1", "2", "3"] and not batch.pop(BAD) + batch.pop(CUT) and batch.pop(TARGET_IDS)
    )
    return batch


def sample_latents(decoder, condition):
    """What the VAE is asked to decode, `(4, values)`, when a decoder samples each condition from the same noise."""
    seen = []
    hook = decoder.vae.post_quant_conv.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    generators = [torch.Generator().manual_seed(5) for _ in CAPTIONS]
    decoder.sample(condition, num_inference_steps=4, guidance_scale=1.0, generator=generators)
    hook.remove()
    return torch.cat(seen).flatten().unflatten(0, (len(CAPTIONS), -1))


@pytest.mark.parametrize("modality", ["image", *(pytest.param(x, marks=pytest.mark.slow) for x in ("video", "audio"))])
def test_conditions_and_latents_become_those_of_the_captions(tmp_path, modality):
    path = write_rows(tmp_path, modality)
    final = run_stage2(tmp_path, modality, path)
    model, processor = MultimodalModel.from_pretrained(final).eval(), MultimodalProcessor.from_pretrained(final)
    processor.register(model)
    decoder = model.decoders[modality].module
    encodings = decoder.encode_text(CAPTIONS)  # (4, T, D)
    with torch.no_grad():
        conditions = model(**collate(processor, path)).conditions[modality]

    constant = decoder.normalize_condition(encodings.mean(dim=0, keepdim=True).expand_as(encodings))
    for kind in ("l2", "mse"):
        ours, best = (caption_alignment(x, encodings, kind).mean() for x in (conditions, constant))
        assert ours < 0.05 * best, kind

    distances = torch.cdist(conditions.flatten(1), encodings.flatten(1))
    assert distances.argmin(dim=1).tolist() == [0, 1, 2, 3]

    projected, wanted = (sample_latents(decoder, x) for x in (conditions, encodings))
    assert torch.linalg.vector_norm(projected - wanted, dim=1).max() < 0.1 * torch.pdist(wanted).min()


@pytest.mark.parametrize(
    "name",
    ["wan", "ltx", "stable-audio", "flux", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)],
)
def test_the_newer_families_too(name, tmp_path):
    """Masks included; what the denoiser makes of a projected condition is what it makes of its caption's."""
    family = FAMILIES[name]
    decoder, modality = family.decoder(), family.kind.modality
    decoder.save_pretrained(tmp_path / "decoder")
    path = write_rows(tmp_path, modality)
    final = run_stage2(tmp_path, modality, path, tmp_path / "decoder", cached=name == "sana")
    model, processor = MultimodalModel.from_pretrained(final).eval(), MultimodalProcessor.from_pretrained(final)
    processor.register(model)
    encodings = decoder.encode_text(CAPTIONS)
    with torch.no_grad():
        ours = model.decoders[modality].condition(model.read_states(**collate(processor, path))[modality])
    real = encodings.real
    assert torch.equal(ours.real, real)
    if encodings.pooled is not None:
        constant = encodings.pooled.mean(dim=0, keepdim=True)
        assert (ours.pooled - encodings.pooled).norm() < 0.1 * (constant - encodings.pooled).norm()
    mean = (encodings.embeds * real[..., None]).sum(dim=0) / real.sum(dim=0).clamp(min=1)[:, None]
    for kind in ("l2", "mse"):
        found = caption_alignment(ours.embeds, encodings.embeds, kind, real).mean()
        assert found < 0.1 * caption_alignment(mean.expand_as(encodings.embeds), encodings.embeds, kind, real).mean()

    noise = torch.randn(1, *family.latents, generator=torch.Generator().manual_seed(0)).expand(4, *family.latents)
    times = torch.full((4,), 0.5 if name == "stable-audio" else 500)
    with torch.no_grad():
        made, wanted = (decoder.predict(noise, times, decoder._ready(c)).flatten(1) for c in (ours, encodings))
    assert torch.linalg.vector_norm(made - wanted, dim=1).max() < 0.2 * torch.pdist(wanted).min()
