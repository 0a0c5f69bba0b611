"""All at once: rows of text, pictures, clips and sounds under one cross-entropy, cached, resumed, and said back."""

import json

import numpy as np
import pytest
import torch
from code_utils import vq_model
from training_utils import (
    assert_same_losses,
    cli_here,
    losses_of,
    run_forked,
    tensors_of,
    train_here,
)
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, EncodecConfig, EncodecModel

from anygpt import MultimodalModel, MultimodalProcessor, commands
from anygpt.chat.chat_model import ChatModel, Settings
from anygpt.media.types import media_type, read_media
from anygpt.tokenizers.base import MediaTokenizer
from anygpt.toyworld.datasets import write_render
from anygpt.toyworld.world import SEEN

ASKED = {"image": "Draw it.", "video": "Film it.", "audio": "Play it."}
SUFFIX = {"image": "png", "video": "mp4", "audio": "wav"}
CONFIG = """
model:
  language_model: {{path: "zoo:language_model"}}
  tokenizers:
    image: &greedy {{path: {0}/image, defaults: {{temperature: 0}}}}
    video: {{<<: *greedy, path: {0}/video}}
    audio: {{<<: *greedy, path: {0}/audio}}
data: {{train: [{{path: {0}/rows.jsonl}}], pack_to: 64, in_memory: true}}
run: {{tracker: tensorboard}}
train: {{batch_size: 4, learning_rate: 3.0e-3, learning_rates: {{signal_tokens: 1.0e-2}}, log_steps: 1}}
lora: {{r: 0}}
"""
READ_BACK = """
import json, sys
from anygpt.chat.chat_model import ChatModel, Settings
chat = ChatModel(sys.argv[1])
for line in open(sys.argv[2]):
    question = json.loads(line)["messages"][0]
    reply = chat.answer([question], Settings(max_new_tokens=64)).answer
    print(json.dumps([reply.text, [segment.codes.tolist() for segment in reply.segments if segment.type != "text"]]))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny tokenizers, four rows (a picture, a clip, a sound, and a picture of the user's in words), and a config."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    codec = {
        "upsampling_ratios": [8, 5, 4],
        "num_filters": 4,
        "hidden_size": 16,
        "codebook_size": 32,
        "codebook_dim": 16,
    }
    sounds = EncodecModel(EncodecConfig(target_bandwidths=[1.5], sampling_rate=16000, normalize=False, **codec))
    MediaTokenizer(vq_model(), "image").save_pretrained(folder / "image")
    MediaTokenizer(vq_model(48), "video", num_frames=2).save_pretrained(folder / "video")
    MediaTokenizer(sounds, "audio", seconds=0.1, codebooks=2).save_pretrained(folder / "audio")
    rows, rng = [], np.random.default_rng(0)
    for number, (kind, question) in enumerate(ASKED.items()):
        path = f"{kind}.{SUFFIX[kind]}"
        write_render(folder / path, SEEN[number], kind, "left" if kind == "video" else None, rng)
        answer = [{"type": "text", "text": "Here:"}, {"type": kind, "path": path, "caption": "a thing"}]
        rows.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    shown = [{"type": "image", "path": "image.png"}, {"type": "text", "text": "What is it?"}]
    rows.append([{"role": "user", "content": shown}, {"role": "assistant", "content": "A thing."}])
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (folder / "config.yaml").write_text(CONFIG.format(folder))
    return folder


def arguments(world, output, steps, *more):
    settings = ("--run.output_dir", str(output), "--run.device", "cpu", "--train.max_steps", str(steps))
    return ["--config", str(world / "config.yaml"), *settings, *map(str, more)]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    train_here("all_at_once", arguments(world, output, 45))
    return output / "final"


def test_codes_come_back_exactly_in_a_new_process(world, trained):
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    (world / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    run = run_forked("-c", READ_BACK, trained, world / "asked.jsonl")
    model = MultimodalModel.from_pretrained(trained)
    for line, kind in zip(run.stdout.splitlines(), ASKED, strict=True):
        tokenizer = model.tokenizers[kind].module
        medium = read_media(kind, world / f"{kind}.{SUFFIX[kind]}", getattr(tokenizer.targets, "num_frames", None))
        codes = tokenizer.encode([media_type(kind).to_target(medium)])
        assert json.loads(line) == ["Here:", codes.tolist()], kind


def test_media_of_a_user_are_read(world, trained):
    chat = ChatModel(trained)
    shown = [chat.read("image", str(world / "image.png")), {"type": "text", "text": "What is it?"}]
    assert chat.answer([{"role": "user", "content": shown}], Settings(max_new_tokens=16)).answer.text == "A thing."


def test_commands_talk_with_it(world, trained, tmp_path, capsys):
    """The terminal's chat and an evaluation suite, neither of which asks for options that tokenizers do not have."""
    asked = ["--checkpoint", str(trained), "--output", str(tmp_path / "chat"), "--require", "image"]
    assert commands.run("chat", [*asked, "--prompt", next(iter(ASKED.values()))]) == 0
    assert [path.suffix for path in (tmp_path / "chat").iterdir()] == [".png"]
    suite = {"name": "few", "data": [{"path": str(world / "rows.jsonl")}], "metrics": [{"metric": "exact_match"}]}
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    given = [
        "--checkpoint",
        str(trained),
        "--suite",
        str(tmp_path / "suite.yaml"),
        "--output",
        str(tmp_path / "report"),
    ]
    assert commands.run("evaluate", [*given, "--no-baselines"]) == 0, capsys.readouterr().err


def test_a_limit_shorter_than_one_medium_is_refused(world, tmp_path, capsys):
    limit = ["--data.pack_to=null", "--data.max_length", 5, "--data.on_long_sample", "cut"]
    code, lines = cli_here("all_at_once", arguments(world, tmp_path / "run", 2, *limit), capsys)
    assert code != 0 and "data.max_length is 5, but one medium of" in lines[-1]
    assert not (tmp_path / "run").exists()


def test_an_output_whose_tokenizer_only_encodes_is_refused(world, tmp_path, capsys):
    sizes = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "resolution": 16}
    tokenizer = ChameleonVQVAE(ChameleonVQVAEConfig(**sizes, num_embeddings=16, embed_dim=8, latent_channels=8))
    MediaTokenizer(tokenizer, "image").save_pretrained(tmp_path / "encodes")
    given = arguments(world, tmp_path / "run", 1, "--model.tokenizers.image.path", tmp_path / "encodes")
    code, lines = cli_here("all_at_once", given, capsys)
    assert code != 0 and "needs a decoder or tokenizer for image" in lines[-1] and "only encodes" in lines[-1]
    assert not (tmp_path / "run").exists()


def test_everything_trains_and_the_tokenizers_do_not(trained, world):
    config = json.loads((trained / "config.json").read_text())
    assert config["tokenizers"]["image"]["source"]["path"] == str(world / "image")
    assert config["trained"]["stage"] == "all at once"
    assert config["language_model"]["source"] is None, "it is another one now"


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_same_losses_from_the_cache_split_and_resumed(world, tmp_path, dropout):
    shared = ["--loss.caption_dropout", dropout, "--data.pack_to=null", "--train.scheduler=constant"]

    def run(name, steps, *more):
        train_here("all_at_once", arguments(world, tmp_path / name, steps, *shared, *more))

    run("whole", 4)
    more = ["--data.cache_dir", tmp_path / "cache"]
    commands.run("cache-features", ["--stage", "all_at_once", *arguments(world, tmp_path, 4, *more)])
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {f"{key}_tokenizer" for key in ASKED}
    more += ["--train.batch_size=1", "--train.gradient_accumulation_steps=4"]
    run("split", 2, *more, "--train.save_steps=1")
    run("split", 4, *more)
    assert_same_losses(losses_of(tmp_path / "whole"), losses_of(tmp_path / "split"), relative=2e-3)


def test_lora(world, tmp_path):
    train_here("all_at_once", arguments(world, tmp_path / "run", 1, "--lora.r", 4))
    model = MultimodalModel.from_pretrained(tmp_path / "run/final")
    names = tensors_of(model)
    assert any(".lora_A." in name for name in names) and "signal_tokens.input_rows.audio" in names
    processor = MultimodalProcessor.from_pretrained(tmp_path / "run/final", model=model)
    talk = [{"role": "user", "content": "Draw it."}]
    batch = processor.apply_chat_template(talk, tokenize=True, add_generation_prompt=True)
    (answer,) = model.generate(**batch, max_new_tokens=20, require=["image"]).answers
    assert len(answer.images) == 1
