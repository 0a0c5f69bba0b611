"""Ridge initialisation: the closed form in float64, in one pass, and a first step that is the line's."""

import copy
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from training_utils import reset_accelerate, toy_data
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, LlamaConfig, LlamaForCausalLM

from anygpt import ModalDecoderModule, MultimodalModel, MultimodalProcessor, OutputProjector, OutputProjectorConfig
from anygpt.composition import lowest_layers
from anygpt.data.collation import Collator
from anygpt.data.dataset import ConversationDataset, DataSource
from anygpt.decoders.conditions import Condition
from anygpt.errors import InputError
from anygpt.losses.formulas import LossWeights, caption_alignment
from anygpt.toyworld.language import plain_caption
from anygpt.toyworld.world import SEEN
from anygpt.training.config import parse_config
from anygpt.training.loading import ridge_batches
from anygpt.training.ridge import (
    HOLD_BACK_EVERY,
    MAX_HELD_BACK,
    STRENGTHS,
    TOLERANCE,
    RidgeRegression,
    check_room,
    set_by_ridge,
)
from anygpt.training.setup import init_projectors
from anygpt.training.stages import LLM_DECODER
from anygpt.training.trainer import train

CAPTIONS = [plain_caption(thing) for thing in SEEN]  # 38


def naive_ridge(x, y, strength):
    """argmin ‖Y − XW − 1b‖² + λ‖W‖², by a column of ones that is not penalised: weight, bias."""
    x, y = x.double(), y.double()
    with_ones = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    penalty = strength * torch.eye(x.shape[1] + 1, dtype=torch.float64)
    penalty[-1, -1] = 0
    solution = torch.linalg.solve(with_ones.T @ with_ones + penalty, with_ones.T @ y)
    return solution[:-1].T, solution[-1]


def problem(samples=200, inputs=12, outputs=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, inputs, generator=generator) * torch.logspace(-1, 1, inputs) + 3
    y = x @ torch.randn(inputs, outputs, generator=generator) + torch.randn(samples, outputs, generator=generator) - 7
    return x, y


def fed(x, y, batch):
    fit = RidgeRegression(x.shape[1], y.shape[1])
    for start in range(0, len(x), batch):
        fit.add(x[start : start + batch], y[start : start + batch])
    return fit


# -------------------------------------------------------------------------------------------- the regression itself


@pytest.mark.parametrize("strength", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("batch", [1, 7, 200])
def test_solution_is_the_textbooks(strength, batch):
    x, y = problem()
    weight, bias, used = fed(x, y, batch).solve(strength)
    expected_weight, expected_bias = naive_ridge(x, y, strength)
    assert used == strength
    torch.testing.assert_close(weight, expected_weight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(bias, expected_bias, rtol=1e-8, atol=1e-8)


def test_fewer_samples_than_inputs():
    x, y = problem(samples=6)
    weight, bias, _ = fed(x, y, 4).solve(0.1)
    expected_weight, expected_bias = naive_ridge(x, y, 0.1)
    torch.testing.assert_close(weight, expected_weight, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(bias, expected_bias, rtol=1e-7, atol=1e-7)


def test_gain_multiplies_deviations_from_the_mean_output():
    x, y = (each.double() for each in problem())
    weight, bias, _ = fed(x, y, 64).solve(10.0, gain=1.5)
    plain_weight, plain_bias = naive_ridge(x, y, 10.0)
    plain = x @ plain_weight.T + plain_bias
    torch.testing.assert_close(x @ weight.T + bias, y.mean(0) + 1.5 * (plain - y.mean(0)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("batch", [7, 64])
def test_strength_is_about_the_best_one_for_the_samples_held_back_which_then_join_the_fit(batch):
    x, y = problem()
    fit = fed(x, y, batch)
    held = torch.cat([outputs for _, outputs in fit.held])
    back = (y.double()[:, None] == held[None]).all(-1).any(-1)
    assert 0 < back.sum() < len(y)
    centred = (x[~back] - x[~back].mean(dim=0)).double()
    scale = float(torch.linalg.eigvalsh(centred.T @ centred).mean())
    errors = {}
    for relative in STRENGTHS:
        weight, bias = naive_ridge(x[~back], y[~back], relative * scale)
        errors[relative * scale] = float((x[back].double() @ weight.T + bias - y[back]).square().sum())
    weight, bias, strength = fed(x, y, batch).solve()
    good = [strength for strength, error in errors.items() if error <= TOLERANCE * min(errors.values())]
    assert strength == pytest.approx(max(good), rel=1e-6)
    expected_weight, expected_bias = naive_ridge(x, y, strength)
    torch.testing.assert_close(weight, expected_weight, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(bias, expected_bias, rtol=1e-7, atol=1e-7)


def test_noise_calls_for_more_strength():
    x, y = problem(samples=60, inputs=40)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) * 100
    assert fed(x, y + noise, 10).solve()[2] > fed(x, y, 10).solve()[2]


def test_a_few_captions_do_not_make_a_map_that_explodes():
    """What is held back differs in what the others have nothing of, so every strength is as wrong about it."""
    x = (5 + 1e-3 * torch.eye(4, 8)).repeat(3, 1)
    for seed in range(5):
        y = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).repeat(3, 1)
        fit = fed(x, y, 4)
        if fit.held and fit.count:
            break
    assert fit.solve()[0].abs().max() < 0.1 * fit.solve(strength=1e-10)[0].abs().max()


def test_what_is_not_finite_is_refused():
    x, y = problem()
    y[3, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        fed(x, y, 50).solve()


def test_memory_does_not_grow_with_the_samples():
    def size(fit):
        tensors = [fit.xtx, fit.xty, fit.x_sum, fit.y_sum, *(t for pair in fit.held for t in pair)]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    x, y = torch.randn(2 * HOLD_BACK_EVERY * MAX_HELD_BACK, 3), torch.randn(2 * HOLD_BACK_EVERY * MAX_HELD_BACK, 2)
    fit = fed(x, y, 512)
    full = size(fit)
    assert sum(len(held) for held, _ in fit.held) == MAX_HELD_BACK
    for _ in range(3):
        fit.add(x, y)
    assert size(fit) == full and fit.count == 4 * len(x) - MAX_HELD_BACK


def test_samples_of_one_caption_are_held_back_together():
    x, y = torch.randn(400, 3), torch.randn(40, 2).repeat(10, 1)
    fit = RidgeRegression(3, 2)
    for start in range(0, 400, 16):
        fit.add(x[start : start + 16], y[start : start + 16])
    held = torch.cat([outputs for _, outputs in fit.held])
    assert 10 <= len(held) < 200 and len(held) % 10 == 0
    assert all((held == row).all(-1).sum() == 10 for row in held)
    alone = RidgeRegression(3, 2)
    alone.held = [(x.double(), y.double())]  # as if all that there was had been held back
    assert torch.isfinite(alone.solve()[0]).all()


def test_no_samples_are_refused():
    with pytest.raises(InputError, match="no samples"):
        RidgeRegression(3, 2).solve()


# ------------------------------------------------------------------------------------------------------- in the model


def build(parts, modality="image", kind="linear", hidden_layer=-1, **settings):
    """A model with one decoder, in eval mode, and its processor."""
    torch.manual_seed(0)
    decoder = ModalDecoderModule(parts.decoder(modality), num_signal_tokens=2, hidden_layer=hidden_layer)
    language_model = parts.language_model()
    sizes = decoder.projector_sizes(language_model.config.hidden_size)
    small = {"d_model": 32, "num_encoder_layers": 1, "num_decoder_layers": 1, "ffn_dim": 64}
    config = OutputProjectorConfig(projection_type=kind, **sizes | small | settings)
    decoder.projector = OutputProjector(config)
    model = MultimodalModel({}, language_model, {modality: decoder})
    return model.eval(), MultimodalProcessor({}, parts.tokenizer(), model=model)


def batches_of(model, processor, key, size=7):
    span = "".join(model.signal_tokens.names[key])
    for start in range(0, len(CAPTIONS), size):
        captions = CAPTIONS[start : start + size]
        texts = [f"Make {caption}. {span}" for caption in captions]
        targets = {key: {"captions": captions}}
        yield dict(processor(llm_inputs={"text": texts, "padding": True}, decoder_targets=targets))


def states_and_encodings(model, processor, key):
    """All `(38, N · H)` states and `(38, T · D)` encodings at once, float64."""
    states = [model.read_states(**batch)[key] for batch in batches_of(model, processor, key)]
    encodings = Condition.of(model.decoders[key].module.encode_text(CAPTIONS)).embeds
    return torch.cat(states).flatten(1).double(), encodings.flatten(1).double()


@pytest.mark.parametrize(("layer", "run"), [(0, 1), (1, 2), (2, 3), (3, 4), (4, 4), (-1, 4), (-2, 4), ("mix", 4)])
def test_layers_that_no_decoder_reads_do_not_run(parts, layer, run):
    model, processor = build(parts, hidden_layer=layer)
    batch = next(batches_of(model, processor, "image"))
    base = model.language_model.model
    assert len(base.layers) == 4
    calls = []
    hooks = [one.register_forward_hook(lambda *_, number=n: calls.append(number)) for n, one in enumerate(base.layers)]
    states = model.read_states(**batch)["image"]
    assert calls == list(range(run))
    calls.clear()
    with torch.no_grad():
        conditions = model(**batch).conditions["image"]
    assert calls == list(range(4))  # as before
    expected = model.decoders["image"].condition(states).embeds
    torch.testing.assert_close(expected, conditions, rtol=0, atol=0)
    [hook.remove() for hook in hooks]


def test_the_other_layers_run_and_are_seen_afterwards():
    """transformers hooks the layers that it finds at a model's first call, so these must be all."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    network = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=6, vocab_size=99)).eval()
    decoders = {"image": SimpleNamespace(hidden_layer=2)}
    ids = torch.arange(6)[None]
    with torch.no_grad():
        with lowest_layers(SimpleNamespace(language_model=network, decoders=decoders)):
            states = network(ids, output_hidden_states=True).hidden_states
        whole = network(ids, output_hidden_states=True).hidden_states
    assert len(states) == 4 and len(whole) == 7
    assert all(torch.equal(one, other) for one, other in zip(states[:3], whole[:3], strict=True))


def test_a_language_model_that_needs_its_number_of_layers_runs_whole():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    types = ["sliding_attention", "full_attention"] * 3
    config = Gemma3nTextConfig(
        **sizes,
        head_dim=8,
        vocab_size=99,
        vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=8,
        num_hidden_layers=6,
        layer_types=types,
        num_kv_shared_layers=2,
        laurel_rank=4,
        sliding_window=8,
        activation_sparsity_pattern=[0.0] * 6,
    )
    network = Gemma3nForCausalLM(config).eval()
    decoders = {"image": SimpleNamespace(hidden_layer=2)}
    with torch.no_grad(), lowest_layers(SimpleNamespace(language_model=network, decoders=decoders)):
        states = network(torch.arange(6)[None], output_hidden_states=True).hidden_states
    assert len(states) == 7


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_linear_projector_is_set_in_one_pass(parts, modality):
    model, processor = build(parts, modality)
    x, y = states_and_encodings(model, processor, modality)
    once = batches_of(model, processor, modality)  # a generator: a second pass would find nothing
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "projector" not in name}
    strength = set_by_ridge(model, [modality], once)[modality]
    assert next(once, None) is None
    weight, bias = naive_ridge(x, y, strength)
    line = model.decoders[modality].projector.line
    torch.testing.assert_close(line.weight.double(), weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(line.bias.double(), bias, rtol=1e-4, atol=1e-4)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_encodings_made_before_give_the_same_line(parts):
    model, processor = build(parts)
    other = copy.deepcopy(model)
    set_by_ridge(model, ["image"], batches_of(model, processor, "image"))
    batches = list(batches_of(other, processor, "image"))
    for batch in batches:
        captions = batch["decoder_targets"]["image"].pop("captions")
        batch["decoder_targets"]["image"]["conditions"] = other.decoders["image"].module.encode_text(captions)
    set_by_ridge(other, ["image"], batches)
    lines = [m.decoders["image"].projector.line for m in (model, other)]
    torch.testing.assert_close(lines[0].weight, lines[1].weight)


def test_a_transformer_starts_at_the_line(parts):
    """Its own output starts at zero, so the first step's alignment is the line's; and then it learns."""
    model, processor = build(parts, kind="transformer", linear_path=True)
    x, y = states_and_encodings(model, processor, "image")
    strength = set_by_ridge(model, ["image"], batches_of(model, processor, "image"))["image"]
    weight, bias = naive_ridge(x, y, strength)
    batch = next(batches_of(model, processor, "image"))
    model.loss_weights = LossWeights(nll=0, denoising=0, alignment_kind="mse")
    model.train_only(["image_output_projector"])
    rows = len(batch["input_ids"])
    expected = caption_alignment((x[:rows] @ weight.T + bias)[:, None], y[:rows, None], "mse").mean()
    loss = model(**batch, labels=batch["input_ids"]).loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    loss.backward()
    output = model.decoders["image"].projector.projection.output
    assert output.weight.abs().max() == 0 and output.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("kind", "settings"), [("mlp", {}), ("qformer", {}), ("transformer", {"linear_path": False})])
def test_projectors_without_a_line_are_refused(parts, kind, settings):
    model, processor = build(parts, kind=kind, **settings)
    with pytest.raises(InputError, match=rf"'image' output projector \({kind}\) has no linear path"):
        set_by_ridge(model, ["image"], batches_of(model, processor, "image"))


def test_training_mode_is_given_back(parts):
    model, processor = build(parts)
    model.train()
    set_by_ridge(model, ["image"], batches_of(model, processor, "image"))
    assert model.training


def test_stage_2_starts_at_the_line(tmp_path, capsys):
    """One update of next to no size after `train.projector_init=ridge`: its alignment is far below the constant's."""
    lines = []
    for index, caption in enumerate(CAPTIONS):
        (tmp_path / f"{index}.png").touch()  # never opened: only captions count
        medium = {"type": "image", "path": f"{index}.png", "caption": caption}
        user = {"role": "user", "content": [{"type": "text", "text": f"Make {caption}."}]}
        lines.append(json.dumps({"id": str(index), "messages": [user, {"role": "assistant", "content": [medium]}]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    small = {"d_model": 32, "num_encoder_layers": 1, "num_decoder_layers": 1, "ffn_dim": 64}
    arguments = {
        "run.output_dir": tmp_path / "run",
        "run.device": "cpu",
        "model.language_model.path": "zoo:language_model",
        "model.decoders": json.dumps({"image": {"path": "zoo:image_decoder", "projector": small}}),
        "data.train": json.dumps([{"path": str(tmp_path / "rows.jsonl")}]),
        "train.projector_init": "ridge",
        "train.signal_rows": "none",
        "train.batch_size": len(CAPTIONS),
        "train.max_steps": 1,
        "train.warmup_steps": 0,
        "train.learning_rate": 1e-12,
        "loss.denoising": 0,
        "loss.alignment_kind": "mse",
    }
    final = train(parse_config([f"--{name}={value}" for name, value in arguments.items()]), LLM_DECODER)
    said = capsys.readouterr().out
    assert "image output projector set by ridge regression" in said
    alignment = float(said.split("llm_decoder/alignment/image ")[1].split()[0])
    model = MultimodalModel.from_pretrained(final)
    assert model.decoders["image"].projector.config.linear_path
    encodings = model.decoders["image"].module.encode_text(CAPTIONS)
    constant = caption_alignment(encodings.mean(dim=0).expand_as(encodings), encodings, "mse").mean()
    assert alignment < 0.5 * constant
    arguments |= {"train.ridge_gain": 1e-6, "run.output_dir": tmp_path / "flat"}  # the mean of the captions for all
    train(parse_config([f"--{name}={value}" for name, value in arguments.items()]), LLM_DECODER)
    flat = float(capsys.readouterr().out.split("llm_decoder/alignment/image ")[1].split()[0])
    assert flat == pytest.approx(float(constant), rel=1e-3)


def test_more_captions_than_asked_for_are_drawn_from_all_files(tiny_model, tmp_path_factory, tmp_path):
    """Files are often of one media type each, one after another."""
    root = toy_data(tmp_path_factory)
    rows = (root / "stage2.jsonl").read_text().splitlines(keepends=True)
    kind = {row: json.loads(row)["messages"][1]["content"][-1]["type"] for row in rows}
    (tmp_path / "rows.jsonl").write_text("".join(sorted(rows, key=kind.get)))
    least = len(rows) - min(Counter(kind.values()).values()) + 1  # one of each kind at least
    sources = [DataSource(path=str(tmp_path / "rows.jsonl"), media_root=str(root))]
    config = parse_config(
        [
            *("--model.language_model.path=zoo:language_model", "--run.output_dir=x", "--data.train=[{path: x}]"),
            f"--train.ridge_captions={least}",
        ]
    )
    _model, processor = tiny_model((), ("image", "video", "audio"))
    reset_accelerate()
    batches = list(
        ridge_batches(ConversationDataset.from_files(sources), Collator(processor), config, Accelerator(cpu=True))
    )
    assert {key for batch in batches for key in batch["decoder_targets"]} == set(kind.values())
    assert sum(len(batch["input_ids"]) for batch in batches) == least


def test_matrices_that_do_not_fit_are_refused_before_anything_is_computed():
    check_room({"image": (64, 924)})
    with pytest.raises(InputError, match=r"image: 16,384 × 1,048,576\) take .* GiB, and .* are free; use fewer signal"):
        check_room({"image": (4 * 4096, 512 * 2048)})


def test_ridge_without_a_new_projector_is_said():
    config = parse_config(["--model.init_from=x", "--data.train=[{path: x}]", "--train.projector_init=ridge"])
    config.model.init_from = None
    model = SimpleNamespace(decoder_keys=())
    assert init_projectors(model, None, None, config, None) == [
        "train.projector_init=ridge set nothing: no output projector is new"
    ]
