"""`scripts/trace_shapes.py` on the tiny configs: every hop of the figure, in order, with what really flows."""

import importlib

import pytest
from training_utils import REPOSITORY

from anygpt import commands
from anygpt.toyworld.datasets import write_dataset

CONFIGS = REPOSITORY / "configs" / "tiny"


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("anygpt.commands.trace_shapes")


@pytest.fixture
def run(script, capsys):
    def rows(*arguments):
        script.main([str(argument) for argument in arguments])
        lines = capsys.readouterr().out.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("hop "))
        assert lines[start].split()[:5] == ["hop", "tensor", "shape", "dtype", "device"]
        starts = [lines[start].index(name) for name in ("tensor", "shape", "dtype", "device")]
        found, hop = {}, None
        for line in lines[start + 2 :]:
            cells = [line[a:b].strip() for a, b in zip([0, *starts], [*starts, None], strict=True)]
            hop = cells[0] or hop
            found.setdefault(hop, {}).setdefault(cells[1], cells[2:])
        return found

    return rows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("final")
    model, processor = tiny_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_stage_1_on_its_data(run, tmp_path):
    data = write_dataset(tmp_path, "stage1", 6, seed=0)
    hops = run(CONFIGS / "stage1.yaml", "--data.train", f"[{{path: {data}}}]")
    assert list(hops) == [
        "processor",
        *(f"{key} {part}" for key in ("image", "video", "audio") for part in ("encoder", "projector")),
        "token embeddings",
        "merge",
        "language model",
        "losses",
    ]
    assert hops["image encoder"]["output.last_hidden_state"][:3] == ["(1, 17, 96)", "float32", "cpu"]
    assert hops["video projector"]["features"][0] == "(1, 34, 128)"
    assert hops["processor"]["labels"][1] == "int64"


@pytest.mark.parametrize("config", ["stage2.yaml", "stage3.yaml"])
def test_the_other_stages_with_made_up_media(run, checkpoint, config):
    arguments = ["--model.init_from", checkpoint, "--data.train", "[{path: nothing.jsonl}]", "--loss.denoising", "1"]
    if config == "stage2.yaml":  # that names its parts, which must be those of init_from
        arguments[1] = "null"
    hops = run(CONFIGS / config, *arguments)
    for key, condition, latents in (
        ("image", "(1, 16, 64)", "(1, 8, 4, 4)"),
        ("video", "(1, 16, 48)", "(1, 8, 8, 4, 4)"),
        ("audio", "(1, 1, 32)", "(1, 8, 8, 8)"),
    ):
        projector, decoder = hops[f"{key} output projector"], hops[f"{key} decoder"]
        assert projector["projected.embeds"][0] == projector["condition.embeds"][0] == condition
        assert decoder["encoding of captions"][0] == condition
        if key != "video" or config == "stage2.yaml":  # the checkpoint's clips have the pipeline's own 16 frames
            assert decoder["latents of targets"][0] == decoder["noisy latents"][0] == latents
            assert decoder["prediction.sample"][0] == latents
    order = list(hops)
    assert order.index("language model") < order.index("signal tokens") < order.index("image output projector")
    assert order.index("audio output projector") < order.index("image decoder") and order[-1] == "losses"


def test_codes_on_their_data(run, tmp_path):
    data = write_dataset(tmp_path, "stage1", 6, seed=0)
    hops = run(CONFIGS / "all_at_once.yaml", "--data.train", f"[{{path: {data}}}]", "--data.cache_dir", "null")
    assert {"input_ids", "image.media", "video.media", "audio.media"} <= set(hops["processor"])
    assert hops["losses"]["sum.encoder_llm/nll"][0] == "()"


def test_watching_leaves_the_model_as_it_was(script, tiny_model):
    model, processor = tiny_model(("image",), ("image",))
    before = set(vars(model)), {name: len(m._forward_hooks) for name, m in model.named_modules()}
    script.trace(model, script.make_batch(model, processor, []))
    assert before == (set(vars(model)), {name: len(m._forward_hooks) for name, m in model.named_modules()})


def test_mistakes_are_one_line(capsys, tmp_path):
    data = write_dataset(tmp_path, "stage2", 3, seed=0)
    assert commands.run("trace-shapes", [str(CONFIGS / "stage1.yaml"), f"--data.train=[{{path: {data}}}]"]) == 2
    assert f"no row of {data}" in capsys.readouterr().err
    assert commands.run("trace-shapes", ["nothing.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: --config 'nothing.yaml'")
