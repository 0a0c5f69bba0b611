"""Decoders that are quantised, whose VAEs work on tiles, or whose weights wait on the CPU."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import tiny_pipelines
import torch
from decoder_families import CAPTIONS, FAMILIES
from training_utils import run_forked

from anygpt import (
    ModalDecoderModule,
    MultimodalModel,
    MultimodalProcessor,
    StableDiffusionDecoder,
    load_decoder,
    load_language_model,
)
from anygpt.decoders import Condition, DiffusionDecoder
from anygpt.decoders.pipelines import is_hooked
from anygpt.errors import InputError, warn_once
from anygpt.model.language_models import load_tokenizer
from anygpt.parts.files import shapes_only
from anygpt.parts.manifest import stored_tensors
from anygpt.training.check import check, report
from anygpt.training.config import parse_config
from anygpt.training.memory import measure_part
from anygpt.training.stages import LLM_DECODER, prepare_stage

INT8 = {"quant_backend": "torchao", "quant_kwargs": {"quant_type": "Int8WeightOnlyConfig"}}
TEXT = {"sd": ["text_encoder"], "flux-dev": ["text_encoder", "text_encoder_2"]}


def all_of(name):
    """Text encoders, too."""
    return INT8 | {"components_to_quantize": ["unet" if name == "sd" else "transformer", *TEXT.get(name, TEXT["sd"])]}


LANGUAGE_MODEL = "zoo:language_model"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of tiny pipelines, each written once."""
    folder, made = tmp_path_factory.mktemp("pipelines"), {}

    def write(name):
        if name not in made:
            pipeline = tiny_pipelines.stable_diffusion() if name == "sd" else FAMILIES[name].decoder()
            pipeline.save_pretrained(folder / name)
            made[name] = folder / name
        return made[name]

    return write


def compose(decoder):
    module = ModalDecoderModule(decoder, num_signal_tokens=2)
    language_model = load_language_model(LANGUAGE_MODEL)
    model = MultimodalModel({}, language_model, {"thing": module}, init_output_projector_type="linear").eval()
    return model, MultimodalProcessor({}, load_tokenizer(LANGUAGE_MODEL), model=model)


def settings(tmp_path, decoder, **more):
    rows = tmp_path / "rows.jsonl"
    (tmp_path / "a.png").touch()
    answer = {"role": "assistant", "content": [{"type": "image", "path": "a.png", "caption": "a red ring"}]}
    asked = {"role": "user", "content": [{"type": "text", "text": "Make a red ring."}]}
    rows.write_text(json.dumps({"id": "0", "messages": [asked, answer]}) + "\n")
    arguments = {
        "run.output_dir": str(tmp_path / "run"),
        "run.device": "cpu",
        "model.language_model.path": LANGUAGE_MODEL,
        "model.decoders": json.dumps({"image": {"projector": {"projection_type": "linear"}} | decoder}),
        "data.train": json.dumps([{"path": str(rows)}]),
    } | more
    return parse_config([f"--{name}={value}" for name, value in arguments.items()])


# ------------------------------------------------------------------------------------------------------ quantised


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("sana", "wan", "stable-audio")]


@pytest.mark.parametrize("name", ["sd", "flux-dev", *SLOW])
def test_an_int8_decoder_is_almost_the_same(name, folders):
    pytest.importorskip("torchao")
    plain, quantised = load_decoder(folders(name)), load_decoder(folders(name), quantization_config=all_of(name))
    assert set(quantised.quantized) == set(all_of(name)["components_to_quantize"])
    whole, small = (sum(t.nbytes for p in x.parameters() for t in stored_tensors(p)) for x in (plain, quantised))
    assert small < 0.9 * whole
    condition = Condition.of(plain.encode_text(CAPTIONS))
    shape = (3, 4, 8, 8) if name == "sd" else (3, *FAMILIES[name].latents)
    latents, losses, grads = torch.randn(shape, generator=torch.Generator().manual_seed(0)), [], []
    for decoder in (plain, quantised):
        embeds = condition.embeds.clone().requires_grad_()
        draw = torch.Generator().manual_seed(1)
        losses.append(
            decoder.denoising_loss(Condition(embeds, condition.pooled, condition.mask), latents, generator=draw)
        )
        losses[-1].sum().backward()
        grads.append(embeds.grad)
        assert all(parameter.grad is None for parameter in decoder.parameters())
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=1e-3)
    assert (grads[1] - grads[0]).norm() < 0.1 * grads[0].norm() and not torch.equal(*grads)
    encoded = Condition.of(quantised.encode_text(CAPTIONS)).embeds
    assert 0 < (encoded - condition.embeds).norm() < 0.1 * condition.embeds.norm()


SCRIPT = """
import sys
import numpy as np
from anygpt import MultimodalModel, MultimodalProcessor
model = MultimodalModel.from_pretrained(sys.argv[1])
decoder = model.decoders["thing"].module
assert decoder.quantized == ["unet"] and decoder.vae.use_tiling and decoder.offload == "model", decoder.quantized
processor = MultimodalProcessor.from_pretrained(sys.argv[1], model=model)
options = {"thing": {"num_inference_steps": 1, "seed": 3}}
answer = model.generate(
    **processor(llm_inputs={"text": ["a red ring"]}), max_new_tokens=4, require=["thing"], decoder_kwargs=options
).answers[0]
np.save(sys.argv[2], np.asarray(answer.images[0]))
"""


def test_options_are_saved_and_applied_again_in_a_new_process(tmp_path, folders):
    pytest.importorskip("torchao")
    one = INT8 | {"components_to_quantize": ["unet"]}
    options = {"dtype": "bfloat16", "quantization_config": one, "vae_tiling": True, "offload": "model"}
    model, processor = compose(load_decoder(folders("sd"), **options))
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    source = json.loads((tmp_path / "saved/config.json").read_text())["decoders"]["thing"]["source"]
    assert source == {"path": str(folders("sd")), **options}
    assert not (tmp_path / "saved/parts").exists()
    batch, chosen = processor(llm_inputs={"text": ["a red ring"]}), {"thing": {"num_inference_steps": 1, "seed": 3}}
    answer = model.generate(**batch, max_new_tokens=4, require=["thing"], decoder_kwargs=chosen).answers[0]
    done = run_forked("-c", SCRIPT, tmp_path / "saved", tmp_path / "made.npy")
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_array_equal(np.load(tmp_path / "made.npy"), np.asarray(answer.images[0]))
    with pytest.raises(InputError, match=r"the unet of this .* are quantised, and only a reference"):
        model.save_pretrained(tmp_path / "whole", standalone=True)


@pytest.mark.parametrize("name", ["sd", "flux-dev"])
def test_the_plan_counts_the_bytes_of_quantised_weights(name, folders):
    pytest.importorskip("torchao")
    for config in (None, all_of(name), INT8 | {"components_to_quantize": "text_encoder"}):
        loaded = compose(load_decoder(folders(name), quantization_config=config))[0]
        with shapes_only():
            outline = compose(load_decoder(folders(name), quantization_config=config))[0]
        held, planned = (measure_part(model, "thing_decoder").bytes_by_dtype for model in (loaded, outline))
        assert held == planned and ("int8" in planned) == (config is not None)


def test_check_knows_what_a_decoder_saves(folders, tmp_path):
    pytest.importorskip("torchao")
    plain = {"path": str(folders("sd"))}
    totals = {}
    for label, options in {
        "plain": {},
        "int8": {"quantization_config": INT8},
        "model": {"offload": "model"},
        "group": {"offload": "group"},
    }.items():
        found = check(settings(tmp_path, plain | options, **{"loss.denoising": 0}), LLM_DECODER)
        assert not found.faults and found.plan.activations
        part = next(part for part in found.plan.parts if part.part == "image_decoder")
        totals[label] = found.plan.total
        lines = report(found, settings(tmp_path, plain | options))
        assert ("of image_decoder that wait on the CPU (offload)" in lines) == (label in ("model", "group"))
        assert ("int8" in lines) == (label == "int8") and (part.waiting > 0) == (label in ("model", "group"))
    assert totals["group"] < totals["model"] < totals["plain"] and totals["int8"] < totals["plain"]
    found = check(settings(tmp_path, plain | {"quantization_config": INT8}), LLM_DECODER)
    assert not found.plan.left_out  # forward and backward through the quantised denoiser


def test_a_quantised_denoiser_trains_an_adapter_alone(folders, tmp_path):
    pytest.importorskip("torchao")
    model, _ = compose(load_decoder(folders("sd"), quantization_config=INT8))
    with pytest.raises(InputError, match=r"the unet .* is quantised and cannot be trained: train an adapter"):
        model.train("thing_decoder")
    names = prepare_stage(model, LLM_DECODER, settings(tmp_path, {"path": "x"}, **{"train.parts": "[thing_denoiser]"}))
    assert names and all("lora_" in name for name in names)
    module = model.decoders["thing"].module
    condition = torch.randn(2, *module.condition_shape)
    module.denoising_loss(condition, torch.randn(2, 4, 8, 8)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(names)


def test_a_network_that_the_library_cannot_quantise_is_named(folders):
    pytest.importorskip("torchao")
    with pytest.raises(InputError, match="text_encoder, a ClapModel, cannot be quantised; name others in"):
        load_decoder(folders("audioldm2"), quantization_config=INT8 | {"components_to_quantize": ["text_encoder"]})
    decoder = load_decoder(folders("audioldm2"), quantization_config=INT8)
    assert decoder.quantized == ["unet"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"load_in_8bit": True}, "expected a mapping of quant_backend, quant_kwargs, components_to_quantize"),
        (
            {"quant_backend": "fbgemm"},
            "quant_backend of quantization_config is 'fbgemm'; expected torchao, bitsandbytes",
        ),
        ({"quant_backend": "bitsandbytes_4bit"}, "needs the package bitsandbytes, which is not installed"),
        (INT8 | {"components_to_quantize": ["transformer"]}, "names 'transformer'; expected some of .*unet"),
        (INT8 | {"components_to_quantize": 5}, "names 5; expected some of .*unet"),
        (INT8 | {"components_to_quantize": [["unet"]]}, "names .'unet'.; expected some of .*unet"),
        (INT8 | {"components_to_quantize": []}, "names ..; expected some of .*unet"),
        (INT8 | {"quant_backend": ["torchao"]}, "quant_backend of quantization_config is .'torchao'."),
        (
            {"quant_backend": "torchao", "quant_kwargs": {"quant_type": "Int7"}},
            "'Int7' is none of .*Int8Weight",
        ),
        ({"quant_backend": "torchao", "quant_kwargs": {}}, "missing 1 required positional argument: 'quant_type'"),
        ({"quant_backend": "torchao", "quant_kwargs": {"quant_type": "Int8WeightOnlyConfig", "x": 1}}, "argument 'x'"),
    ],
)
def test_a_quantization_config_that_does_not_apply_is_refused(config, message, folders):
    if config.get("quant_backend") == "torchao":
        pytest.importorskip("torchao")
    with pytest.raises(InputError, match=f"cannot load the decoder '.*/sd': .*{message}"):
        load_decoder(folders("sd"), quantization_config=config)


# -------------------------------------------------------------------------------------------------- tiles and slices


@pytest.mark.parametrize("name", ["sd", "sana", "wan", "ltx"])
def test_a_vae_on_tiles_is_almost_the_same_and_on_slices_the_same(name, folders, monkeypatch):
    sizes = {"sd": {"height": 80, "width": 64}, "sana": {"height": 96, "width": 64}}
    sizes |= {"wan": {"height": 64, "width": 48}, "ltx": {"height": 64, "width": 96}}
    tiles = {"tile_sample_min_height": 32, "tile_sample_min_width": 32}
    tiles |= {"tile_sample_stride_height": 24, "tile_sample_stride_width": 24}
    made = []
    for options in ({}, {"vae_tiling": True}, {"vae_slicing": True}):
        decoder = load_decoder(folders(name), **options)
        for attribute, size in tiles.items():
            if hasattr(decoder.vae, attribute):
                setattr(decoder.vae, attribute, size)
                setattr(decoder.vae, attribute.replace("sample", "latent"), size // 2)  # SANA's, of 2 pixels a latent
        method = "tiled_decode" if hasattr(decoder.vae, "tiled_decode") else "_tiled_decode"
        tiled_decode = Mock(side_effect=getattr(decoder.vae, method))
        monkeypatch.setattr(decoder.vae, method, tiled_decode)
        draw = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        media = decoder.sample(decoder.encode_text(CAPTIONS[:2]), num_inference_steps=1, generator=draw, **sizes[name])
        made.append(np.stack([np.asarray(x) for x in media]).astype(float))
        assert tiled_decode.called == ("vae_tiling" in options)
    whole, tiled, sliced = made
    assert np.abs(tiled - whole).mean() < 0.1 * 255 and tiled.shape == whole.shape and (tiled != whole).any()
    np.testing.assert_allclose(sliced, whole, atol=1)


def test_a_pipeline_keeps_what_it_was_set_to():
    pipeline = tiny_pipelines.stable_diffusion()
    pipeline.vae.enable_tiling()
    assert StableDiffusionDecoder(pipeline).vae.use_tiling
    assert not StableDiffusionDecoder(pipeline, vae_tiling=False).vae.use_tiling


# ----------------------------------------------------------------------------------------------------------- offload


def test_settings_stay_with_a_decoder_that_is_saved_whole(tmp_path):
    decoder = StableDiffusionDecoder(tiny_pipelines.stable_diffusion(), vae_slicing=True, offload="group")
    model, _ = compose(decoder)
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path).decoders["thing"].module
    assert again.vae.use_slicing and again.offload == "group" and not again.vae.use_tiling
    assert DiffusionDecoder.from_pretrained(tmp_path / "parts/thing_decoder", offload="model").offload == "model"


def test_a_later_stage_may_save_memory_otherwise(folders, tmp_path):
    from anygpt.training.setup import build

    first = settings(tmp_path, {"path": str(folders("sd")), "vae_tiling": True})
    model, processor = build(first)
    model.save_pretrained(tmp_path / "final")
    processor.save_pretrained(tmp_path / "final")
    decoder = {"path": str(folders("sd")), "offload": "model", "vae_tiling": False}
    again, _ = build(settings(tmp_path, decoder, **{"model.init_from": str(tmp_path / "final")}))
    module = again.decoders["image"].module
    assert module.offload == "model" and not module.vae.use_tiling
    again.save_pretrained(tmp_path / "next")
    source = json.loads((tmp_path / "next/config.json").read_text())["decoders"]["image"]["source"]
    assert source["offload"] == "model" and source["vae_tiling"] is False


def test_offloading_is_said_to_do_nothing_without_an_accelerator(caplog):
    warn_once.cache_clear()
    decoder = StableDiffusionDecoder(tiny_pipelines.stable_diffusion(), offload="group")
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    assert "offload: group does nothing without an accelerator" in caplog.text
    assert not is_hooked(decoder.to("cpu").pipeline)


@pytest.mark.parametrize("kind", ["model", "group"])
def test_weights_stay_where_they_are_when_an_offloaded_decoder_moves(monkeypatch, kind):
    decoder = StableDiffusionDecoder(tiny_pipelines.stable_diffusion(), offload=kind)
    started = Mock()
    monkeypatch.setattr(decoder.pipeline, f"enable_{'model_cpu' if kind == 'model' else 'group'}_offload", started)
    elsewhere = torch.device("cuda", 1)  # which this machine may not have
    decoder._apply(lambda tensor: SimpleNamespace(device=elsewhere, to=lambda device: tensor.double().to(device)))
    assert elsewhere in (*started.call_args.args, *started.call_args.kwargs.values())
    assert {(p.device.type, p.dtype) for p in decoder.parameters()} == {("cpu", torch.float64)}


def test_groups_make_the_same_media_and_refuse_gradients(tmp_path):
    made = []
    for kind in (None, "group"):
        decoder = StableDiffusionDecoder(tiny_pipelines.stable_diffusion(), offload=kind)
        if kind:
            decoder.pipeline.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        condition = decoder.encode_text(CAPTIONS)
        draw = [torch.Generator().manual_seed(seed) for seed in range(3)]
        made.append([np.asarray(x) for x in decoder.sample(condition, num_inference_steps=1, generator=draw)])
        with torch.no_grad():
            assert decoder.denoising_loss(condition, torch.randn(3, 4, 8, 8)).shape == (3,)
    np.testing.assert_array_equal(*made)
    with pytest.raises(InputError, match=r"offload: group drops each layer's weights.*use offload: model"):
        decoder.denoising_loss(condition, torch.randn(3, 4, 8, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="weights can wait on the CPU only with an accelerator")
@pytest.mark.parametrize("kind", ["model", "group"])
def test_offloaded_on_an_accelerator(kind):
    model, processor = compose(StableDiffusionDecoder(tiny_pipelines.stable_diffusion(), offload=kind))
    model.to("cuda")
    decoder = model.decoders["thing"].module
    assert decoder.device.type == "cuda" and {p.device.type for p in decoder.parameters()} == {"cpu"}
    batch = processor(llm_inputs={"text": ["a red ring"]}).to("cuda")
    assert model.generate(**batch, max_new_tokens=4, require=["thing"]).answers[0].images
    if kind == "model":
        condition = torch.randn(2, *decoder.condition_shape, device="cuda", requires_grad=True)
        decoder.denoising_loss(condition, torch.randn(2, 4, 8, 8)).sum().backward()
        assert condition.grad.isfinite().all()


def test_options_with_other_values_are_refused(folders):
    for options, message in (
        ({"vae_tiling": "yes"}, "vae_tiling of a StableDiffusionPipeline is 'yes'; expected true or false"),
        ({"vae_slicing": 2}, "vae_slicing of a StableDiffusionPipeline is 2; expected true or false"),
        ({"offload": "disk"}, "offload of a StableDiffusionPipeline is 'disk'; expected model or group"),
        ({"vae_slicng": True}, "a part has no option 'vae_slicng'"),
    ):
        with pytest.raises(InputError, match=message):
            load_decoder(folders("sd"), **options)
    pipeline = tiny_pipelines.stable_diffusion()
    del pipeline.vae.use_tiling
    with pytest.raises(InputError, match="vae_tiling is set, but the vae is a AutoencoderKL, which cannot do it"):
        StableDiffusionDecoder(pipeline, vae_tiling=True)
    model, _ = compose(load_decoder(folders("sd"), offload="model"))
    with pytest.raises(InputError, match="thing_decoder cannot train while its weights are offloaded"):
        model.train("thing_decoder")
