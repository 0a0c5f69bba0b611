"""A saved composition comes back in another process, strictly, and nothing in it is pickled."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import enlarge
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_parts import VISION
from torch import nn
from transformers import LlamaForCausalLM, ViTConfig, ViTForImageClassification

from anygpt import (
    InputError,
    ModalDecoderModule,
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProcessor,
    MultimodalProjector,
    MultimodalProjectorConfig,
    decoders,
    load_decoder,
    load_encoder,
)
from anygpt.encoders.callbacks import LlavaCallbacks, LlavaNextCallbacks
from anygpt.model.parts import import_class

IN_NEW_PROCESS = """
import sys, torch
from safetensors.torch import load_file, save_file
from anygpt import MultimodalModel, MultimodalProcessor
model = MultimodalModel.from_pretrained(sys.argv[1])
processor = MultimodalProcessor.from_pretrained(sys.argv[1], model=model)
batch = load_file(sys.argv[2])
assert processor.token_ids == model.token_ids and processor.signal_token_ids == model.signal_tokens.ids
with torch.no_grad():
    output = model(**batch)
save_file({"logits": output.logits, **output.conditions}, sys.argv[3])
"""


def run_in_new_process(folder, batch, tmp_path):
    tensors = {key: tensor.contiguous() for key, tensor in batch.items() if key != "references"}
    save_file(tensors, tmp_path / "batch.safetensors")
    result = tmp_path / "result.safetensors"
    command = [sys.executable, "-c", IN_NEW_PROCESS, folder, tmp_path / "batch.safetensors", result]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(result)


def lora(model, factor=1.0):
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return enlarge_adapter(wrapped, factor)


def enlarge_adapter(wrapped, factor):
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.mul_(factor)
    return wrapped


def small(tiny_model, parts, **options):
    return tiny_model(("image",), ("image",), **{"language_model": parts.language_model(lively=False)} | options)


def outputs(model, batch):
    with torch.no_grad():
        output = model(**batch)
    return {"logits": output.logits, **output.conditions}


def make_batch(processor, media):
    spans = "".join("".join(names) for names in processor.signal_tokens.values())
    image = {"image": {"images": [media.image(0)]}} if "image" in processor.tokens else {}
    return processor(image, {"text": ["<image> goes to " * bool(image) + "this " + spans]})


def assert_same(one, other):
    assert set(one) == set(other)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, msg=name)


def test_round_trip_in_a_new_process(tiny_model, parts, media, tmp_path):
    """Every kind of part at once: sourced, without a source, changed since, with an adapter; all modalities."""
    model, processor = tiny_model(
        ("video", "audio", "image"), language_model=lora(parts.language_model(), 3.0), hidden_layer="mix"
    )
    enlarge(model.video_encoder.module, 1.5)  # trained since it was loaded
    enlarge(model.audio_decoder.module.text_encoder, 1.5)
    with torch.no_grad():
        for name, tensor in model.own_tensors().items():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    batch = make_batch(processor, media)
    assert_same(run_in_new_process(folder, batch, tmp_path), outputs(model, batch))
    assert sorted(p.name for p in (folder / "parts").iterdir()) == ["audio_decoder", "language_model", "video_encoder"]
    assert [p.name for p in (folder / "adapters").iterdir()] == ["language_model"]
    endings = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert not endings & {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz"}
    assert list(MultimodalModel.from_pretrained(folder).encoders) == ["video", "audio", "image"]


def test_frozen_parts_are_not_copied(tiny_model, parts, tmp_path):
    model, _processor = small(tiny_model, parts)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "parts").exists()
    stored = load_file(tmp_path / "model.safetensors")
    assert all(n.split(".")[1] == "projector" or n.startswith("signal_tokens.") for n in stored)
    assert {n for n in stored if n.startswith("signal_tokens")} == {
        "signal_tokens.input_rows.image",
        "signal_tokens.output_rows.image",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["encoders"]["image"]["source"]["path"] == str(parts.folder / "image_encoder")
    assert config["language_model"]["source"]["path"] == str(parts.folder / "language_model")


def test_a_decoder_that_was_set_otherwise_is_saved_whole(parts, tmp_path):
    """Its tensors are those of its source, but not its sizes, its waveforms' normalization or its noise schedule."""

    def again(decoder):
        key, folder = decoder.modality, tmp_path / str(len(list(tmp_path.iterdir())))
        modules = {key: ModalDecoderModule(decoder, num_signal_tokens=2)}
        model = MultimodalModel({}, parts.language_model(lively=False), modules)
        model.save_pretrained(folder)
        return MultimodalModel.from_pretrained(folder).decoders[key].module, (folder / "parts").exists()

    made = decoders.StableDiffusionDecoder.from_pretrained(parts.folder / "image_decoder", height=64)
    assert again(made)[0].height == 64
    made = decoders.AudioLDMDecoder.from_pretrained(parts.folder / "audio_decoder", normalize_waveform=False)
    assert again(made)[0].normalize_waveform is False
    for load in (decoders.StableDiffusionDecoder.from_pretrained, load_decoder):
        made = load(parts.folder / "image_decoder")
        assert not again(made)[1]
        kind = "epsilon" if made.schedule.kind == "v_prediction" else "v_prediction"
        scheduler = made.pipeline.scheduler
        made.pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=kind)
        assert again(made)[0].schedule.kind == kind


def test_a_trained_encoder_without_a_part_that_its_family_may_lack(parts, tmp_path):
    ViTForImageClassification(ViTConfig(**VISION)).save_pretrained(tmp_path / "vit")
    encoder = load_encoder(tmp_path / "vit", "image")
    enlarge(encoder, 1.5)
    MultimodalModel({"image": ModalEncoderModule(encoder)}, parts.language_model()).save_pretrained(tmp_path / "model")
    found = MultimodalModel.from_pretrained(tmp_path / "model").image_encoder.module
    assert_same(found.state_dict(), encoder.state_dict())


def test_adapters_that_a_checkpoint_cannot_hold_are_refused(parts):
    for name, options, text in (("mine", {}, "adapters mine;"), ("default", {"trainable_token_indices": [3]}, "token")):
        adapted = get_peft_model(parts.language_model(), LoraConfig(target_modules=["q_proj"], **options), name)
        with pytest.raises(InputError, match=text):
            MultimodalModel({}, adapted)


def test_a_tokenizer_never_runs_its_checkpoints_code(tiny_model, parts, tmp_path, monkeypatch):
    model, processor = small(tiny_model, parts)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (MultimodalModel.from_pretrained, MultimodalProcessor.from_pretrained):
        with pytest.raises(InputError, match="tokenizer"):
            load(tmp_path)


def test_saving_twice_into_one_folder_leaves_nothing_stale(tiny_model, parts, media, tmp_path):
    model, processor = small(tiny_model, parts)
    model.save_pretrained(tmp_path)
    enlarge(model.image_encoder.module, 1.2)
    model.save_pretrained(tmp_path)
    batch = make_batch(processor, media)
    again = MultimodalModel.from_pretrained(tmp_path)
    assert_same(outputs(again, batch), outputs(model, batch))
    second = tmp_path / "second"
    again.save_pretrained(second)
    assert (second / "parts" / "image_encoder").is_dir(), "what was saved whole has no source afterwards either"
    shutil.rmtree(tmp_path / "parts")
    assert_same(outputs(MultimodalModel.from_pretrained(second), batch), outputs(model, batch))


def test_adapters_are_in_pefts_own_format(tiny_model, parts, media, tmp_path):
    base = parts.language_model(lively=False)
    model, processor = small(tiny_model, parts, language_model=lora(base, 5.0))
    model.save_pretrained(tmp_path)
    adapter = tmp_path / "adapters" / "language_model"
    assert sorted(p.name for p in adapter.iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    alone = PeftModel.from_pretrained(parts.language_model(lively=False), adapter).eval()
    ids = torch.tensor([[30, 31, 32]])
    with torch.no_grad():
        torch.testing.assert_close(alone(ids).logits, model.language_model(input_ids=ids).logits, rtol=0, atol=0)
    again = MultimodalModel.from_pretrained(tmp_path)
    assert_same(outputs(again, make_batch(processor, media)), outputs(model, make_batch(processor, media)))
    again.train_only(["language_model"])
    assert again.trainable_names() and all(".lora_" in name for name in again.trainable_names())
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file)
    with pytest.raises(InputError, match=f"missing: .*{gone.split('.')[-2]}"):
        MultimodalModel.from_pretrained(tmp_path)


def test_encoder_with_an_adapter(tiny_model, parts, media, tmp_path):
    clip = lora(parts.encoder("image"), 2.0)
    model = MultimodalModel({"image": ModalEncoderModule(clip)}, parts.language_model(lively=False)).eval()
    processor = MultimodalProcessor({"image": parts.processor("image")}, parts.tokenizer(), model=model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "parts").exists()
    again = MultimodalModel.from_pretrained(tmp_path)
    assert_same(outputs(again, make_batch(processor, media)), outputs(model, make_batch(processor, media)))


def test_changed_source_is_refused(parts, tmp_path):
    source = tmp_path / "llm"
    parts.language_model(lively=False).save_pretrained(source)
    model = MultimodalModel({}, LlamaForCausalLM.from_pretrained(source))
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "parts").exists(), "a part loaded by transformers has a source too"
    MultimodalModel.from_pretrained(tmp_path / "saved")
    enlarge(LlamaForCausalLM.from_pretrained(source), 1.01).save_pretrained(source)
    with pytest.raises(InputError, match=r"language_model at .*llm.* is not the one"):
        MultimodalModel.from_pretrained(tmp_path / "saved")
    shutil.rmtree(source)
    with pytest.raises(InputError, match="cannot load the language model"):
        MultimodalModel.from_pretrained(tmp_path / "saved")


def test_part_changed_between_loading_and_composing_is_saved_whole(parts, tmp_path):
    """As after `resize_token_embeddings` or `merge_and_unload`: its name still says where it once came from."""
    source = tmp_path / "llm"
    parts.language_model(lively=False).save_pretrained(source)
    llm = enlarge(LlamaForCausalLM.from_pretrained(source), 2.0).eval()
    model = MultimodalModel({}, llm).eval()
    model.save_pretrained(tmp_path / "saved")
    again = MultimodalModel.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[30, 31, 32]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("image_encoder.projector.projection.bias"),
            r"missing: image_encoder\.projector\.projection\.bias",
        ),
        (lambda t: t.update({"new.weight": torch.zeros(2)}), r"unexpected: new\.weight"),
        (
            lambda t: t.update({"signal_tokens.input_rows.image": torch.zeros(3, 128)}),
            r"of another shape: signal_tokens\.input_rows\.image is \(3, 128\), expected \(4, 128\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tiny_model, parts, tmp_path, change, message):
    small(tiny_model, parts)[0].save_pretrained(tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(InputError, match=message):
        MultimodalModel.from_pretrained(tmp_path)


def test_wrong_folders(tiny_model, parts, tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist; expected a run's final"):
        MultimodalModel.from_pretrained(tmp_path / "nowhere")
    parts.language_model().save_pretrained(tmp_path / "llm")
    with pytest.raises(InputError, match="describes a 'llama' model"):
        MultimodalModel.from_pretrained(tmp_path / "llm")
    small(tiny_model, parts)[0].save_pretrained(tmp_path / "good")
    (tmp_path / "good" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        MultimodalModel.from_pretrained(tmp_path / "good")
    (tmp_path / "good" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no weights: expected model\.safetensors"):
        MultimodalModel.from_pretrained(tmp_path / "good")
    (tmp_path / "good" / "config.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        MultimodalModel.from_pretrained(tmp_path / "good")


def test_config_cannot_name_any_class(tiny_model, parts, tmp_path):
    small(tiny_model, parts)[0].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["language_model"]["class"] = "subprocess.Popen"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"subprocess\.Popen"):
        MultimodalModel.from_pretrained(tmp_path)


def test_own_projection_modules_have_to_be_given_again(parts, tmp_path):
    def own():
        return nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 128))

    projector = MultimodalProjector(MultimodalProjectorConfig(in_features=96, out_features=128), own())
    llm = parts.language_model(lively=False)
    model = MultimodalModel({"image": ModalEncoderModule(parts.encoder("image"), projector)}, llm).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"image_encoder\.projector\.projection\.1\.weight"):
        MultimodalModel.from_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path, projections={"image_projector": own()})
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.encode({"pixel_values": pixels})["image"], model.encode({"pixel_values": pixels})["image"])


def test_callbacks_are_never_lost_in_silence(parts, tmp_path):
    """They cannot be saved: loading without giving them again is an error, not another model."""

    def callback(inputs, output):
        return (output[0][:, 1:],)

    encoder = ModalEncoderModule(parts.encoder("image"), postprocess_projector_callback=callback)
    model = MultimodalModel(
        {"image": encoder}, parts.language_model(lively=False), preprocess_llm_callback=lambda input_ids: {}
    ).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"image_encoder.*postprocess_projector_callback"):
        MultimodalModel.from_pretrained(tmp_path)
    callbacks = {"image_encoder": {"postprocess_projector_callback": callback}}
    with pytest.raises(InputError, match="preprocess_llm_callback"):
        MultimodalModel.from_pretrained(tmp_path, callbacks=callbacks)
    again = MultimodalModel.from_pretrained(tmp_path, callbacks=callbacks, preprocess_llm_callback=lambda input_ids: {})
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.encode({"pixel_values": pixels})["image"], model.encode({"pixel_values": pixels})["image"])


def test_a_checkpoint_that_names_a_module_of_before_the_move():
    assert import_class("anygpt.encoders.selection.LlavaCallbacks") is LlavaCallbacks
    assert import_class("anygpt.model.vlm.llava.LlavaNextCallbacks") is LlavaNextCallbacks
    for name, cls in {
        "sdxl.StableDiffusionXLDecoder": decoders.StableDiffusionXLDecoder,
        "sd3.StableDiffusion3Decoder": decoders.StableDiffusion3Decoder,
        "zeroscope.ZeroscopeDecoder": decoders.ZeroscopeDecoder,
        "ltx.LTXDecoder": decoders.LTXDecoder,
        "wan.WanDecoder": decoders.WanDecoder,
        "audioldm2.AudioLDM2Decoder": decoders.AudioLDM2Decoder,
    }.items():
        assert import_class(f"anygpt.decoders.{name}") is cls


def test_llava_next_counts_features_without_its_parameter():
    """Which FSDP2 shards, and which the processes that prepare data must not touch."""
    settings = {"grid_pinpoints": [[64, 64], [32, 64]], "tile_size": 32, "patch_size": 8, "hidden_size": 4}
    callbacks = LlavaNextCallbacks(**settings)
    found = callbacks.count(None, {"image_sizes": [[64, 64], [20, 64]]})
    tiles = [torch.zeros(callbacks.num_tiles(size), 16, 4) for size in ([64, 64], [20, 64])]
    assert found == [len(callbacks.pack(tile, size)) for tile, size in zip(tiles, [(64, 64), (20, 64)], strict=True)]
    callbacks.image_newline = None
    assert callbacks.count(None, {"image_sizes": [[64, 64], [20, 64]]}) == found
