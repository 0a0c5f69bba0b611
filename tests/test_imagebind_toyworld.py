"""A tiny ImageBind learns ToyWorld with pictures as the binding modality; sounds and words never meet in training."""

from pathlib import Path

import numpy as np
import pytest
import torch

from anygpt import MultimodalModel, load_encoder
from anygpt.encoders.contrast import info_nce
from anygpt.encoders.imagebind import ImageBindConfig, ImageBindModel, ImageBindVideoProcessor, processor_for
from anygpt.media.files import Video
from anygpt.toyworld.datasets import write_dataset
from anygpt.toyworld.language import caption
from anygpt.toyworld.render import render_audio, render_image, render_video
from anygpt.toyworld.world import MOTIONS, THINGS
from anygpt.training.components import write_components
from anygpt.training.config import parse_config
from anygpt.training.stages import COMPONENTS
from anygpt.training.trainer import train

CONFIGS = Path(__file__).parent.parent / "configs/tiny/stage0"

END = 49407
RENDERS, STEPS = 24, 960


def make_inputs(seed, words):
    """`{modality: inputs}` of one render of each thing; the words' ids are added to `words`."""
    rng = np.random.default_rng(seed)
    clip = ImageBindVideoProcessor(clips=1)
    images = [render_image(thing, rng) for thing in THINGS]
    videos = [Video(render_video(thing, MOTIONS[rng.integers(4)], rng), 8.0) for thing in THINGS]
    sounds = [render_audio(thing, rng) for thing in THINGS]
    ids = torch.zeros(len(THINGS), 77, dtype=torch.long)
    for row, thing in zip(ids, THINGS, strict=True):
        said = caption(thing, rng).lower().strip(".!").split()
        row[: len(said) + 1] = torch.tensor([*(words.setdefault(word, len(words) + 1) for word in said), END])
    return {
        "vision": processor_for("image")(images)["media_values"],
        "video": clip(videos)["media_values"][:, 1:2],  # the crop in the middle
        "audio": processor_for("audio")(sounds)["media_values"][:, :1],
        "text": ids,
    }


def retrieval(model, inputs, first, second):
    """How often the nearest of all things' `second` is that of the same thing."""
    a, b = (torch.nn.functional.normalize(model.embed(m, inputs[m]), dim=-1) for m in (first, second))
    return ((a @ b.T).argmax(dim=1) == torch.arange(len(a))).float().mean().item()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_sounds_find_words_that_they_never_met():
    torch.manual_seed(0)
    towers = {f"{tower}_{n}": v for tower in ("vision", "text", "audio") for n, v in TOWER.items()}
    config = ImageBindConfig(
        kernel_size=[2, 28, 28],
        audio_kernel_size=16,
        audio_stride=16,
        out_embed_dim=64,
        modalities=["vision", "text", "audio"],
        **towers,
    )
    model, words = ImageBindModel(config), {}
    renders = [make_inputs(seed, words) for seed in range(RENDERS)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for step in range(STEPS):
        # pictures with one other modality at a time, each of another render: only pictures ever meet the others
        kind = ("audio", "text", "video")[step % 3]
        one, other = (renders[i] for i in np.random.default_rng(step).choice(RENDERS, 2))
        loss = info_nce(model.embed(kind, other[kind]), model.embed("vision", one["vision"]), 0.07).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    with torch.no_grad():
        fresh = make_inputs(1000, words)
        found = {pair: retrieval(model, fresh, *pair) for pair in (("audio", "text"), ("video", "audio"))}
    assert found["audio", "text"] > 0.9 and found["video", "audio"] > 0.9, found  # 1.00 and 0.98 were seen


TOWER = {"embed_dim": 64, "num_blocks": 2, "num_heads": 4}


def test_stage_0_binds_sounds_to_pictures(tmp_path):
    """The two runs of `configs/tiny/stage0`, of two updates each: what they train, and that their parts load."""
    sizes = ImageBindConfig.from_json_file(CONFIGS / "imagebind.json")
    ImageBindModel(sizes).save_pretrained(tmp_path / "untrained")
    for kind in ("views", "pairs"):
        write_dataset(tmp_path / "data", kind, 24, seed=0, things=THINGS)
    shortened = ["--train.max_steps=2", "--train.warmup_steps=1", "--train.batch_size=8"]
    for name in ("imagebind_words", "imagebind"):
        text = (CONFIGS / f"{name}.yaml").read_text().replace("runs/imagebind", str(tmp_path))
        (tmp_path / f"{name}.yaml").write_text(text)
        config = parse_config([f"--config={tmp_path / name}.yaml", *shortened])
        train(config, COMPONENTS)
        write_components(tmp_path / name.replace("imagebind_", "").replace("imagebind", "sounds") / "final", config)
    pictures = load_encoder(tmp_path / "words/parts/image_encoder", "image").state_dict()
    model = MultimodalModel.from_pretrained(tmp_path / "sounds/final")
    assert all(torch.equal(tensor, pictures[name]) for name, tensor in model.image_encoder.module.state_dict().items())
    before, after = (load_encoder(tmp_path / at, "audio") for at in ("untrained", "sounds/parts/audio_encoder"))
    assert any(not torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True))
