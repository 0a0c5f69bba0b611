"""Compositions that go to the hub and come back, and what transformers' users expect of saving and loading."""

from __future__ import annotations

import base64
import json
import os
import shutil
import stat
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from anygpt import InputError, MultimodalModel, MultimodalProcessor, load_language_model
from anygpt.parts.manifest import write_manifest

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def composed(tiny_model):
    """A model that reads and makes images, and its processor."""
    return tiny_model(("image",), ("image",))


def batch_of(processor):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    return processor({"image": {"images": [picture]}}, {"text": ["see <image>"]})


def assert_same_tensors(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def hub_cache(folder, content):
    """A cache as `huggingface_hub` keeps it, made by hand."""
    repository = folder / "models--someone--composed"
    shutil.copytree(content, repository / "snapshots" / SHA)
    for name in ("refs/main", "refs/v1"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text(SHA)
    return folder


def test_by_id_and_revision(composed, tmp_path):
    model, processor = composed
    model.save_pretrained(tmp_path / "saved", standalone=True)
    processor.save_pretrained(tmp_path / "saved")
    cache = hub_cache(tmp_path / "cache", tmp_path / "saved")
    for where in ({}, {"revision": "v1"}, {"revision": SHA, "token": None}):
        again = MultimodalModel.from_pretrained("someone/composed", cache_dir=cache, **where)
        other = MultimodalProcessor.from_pretrained("someone/composed", model=again, cache_dir=cache, **where)
        assert_same_tensors(model, again)
        assert batch_of(other)["input_ids"].tolist() == batch_of(processor)["input_ids"].tolist()
    for name in ("someone/nothing", tmp_path / "nowhere", "./nowhere"):
        for cls in (MultimodalModel, MultimodalProcessor):
            with pytest.raises(InputError, match="does not exist"):
                cls.from_pretrained(name)


def test_standalone_needs_nothing_else(composed, parts, tmp_path):
    model, _ = composed
    model.save_pretrained(tmp_path, standalone=True)
    config = json.loads((tmp_path / "config.json").read_text())
    entries = [config["language_model"], *config["encoders"].values(), *config["decoders"].values()]
    assert all(entry["source"] is None for entry in entries)
    assert str(parts.folder) not in (tmp_path / "config.json").read_text()
    assert_same_tensors(model, MultimodalModel.from_pretrained(tmp_path))


def test_shards_and_permissions(composed, tmp_path):
    model, _ = composed
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path, standalone=True, max_shard_size="20KB")
    finally:
        os.umask(before)
    for folder in (tmp_path, tmp_path / "parts/language_model", tmp_path / "parts/image_decoder/unet"):
        assert len(list(folder.glob("*-0000*.safetensors"))) > 1, folder
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o640}
    assert_same_tensors(model, MultimodalModel.from_pretrained(tmp_path))


def test_unknown_arguments_are_errors(composed, tmp_path):
    model, processor = composed
    for one in (model, processor):
        with pytest.raises(InputError, match="save_pretrained has no argument 'max_shard'"):
            one.save_pretrained(tmp_path, max_shard="1GB")
    for push in (lambda **more: model.save_pretrained(tmp_path / "none", push_to_hub=True, **more), model.push_to_hub):
        with pytest.raises(InputError, match="has no argument 'comit_message'"):
            push(**({"repo_id": "someone/one"} | {"comit_message": "a"}))
    for size in ("abc", "-1GB", None):
        with pytest.raises(InputError, match=r"max_shard_size is .*; expected bytes, or a size"):
            model.save_pretrained(tmp_path / "none", max_shard_size=size)
    assert not (tmp_path / "none").exists()
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="from_pretrained has no argument 'projection'"):
        MultimodalModel.from_pretrained(tmp_path, projection={})


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files needs."""

    files: ClassVar = {}

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.answer({"url": f"{huggingface_hub.constants.ENDPOINT}/someone/composed"})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"{huggingface_hub.constants.ENDPOINT}/someone/composed/commit/1"
            self.answer({"commitUrl": url, "commitOid": SHA, "pullRequestUrl": None})
        elif self.path.endswith("/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        else:
            self.answer({}, 404)

    def do_GET(self):
        self.answer({"error": "not found"}, 404)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    Hub.files = {}
    yield Hub
    server.shutdown()


def test_what_is_pushed_loads(composed, hub, tmp_path):
    model, processor = composed
    model.config.trained = {"stage": "stage3", "updates": 7, "parts": ["image_projector"], "losses": {"loss": 1.25}}
    address = model.push_to_hub("someone/composed", token="hf_x")
    processor.push_to_hub("someone/composed", token="hf_x")
    model.config.trained = None
    assert address.endswith("/commit/1")
    for name, content in hub.files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert_same_tensors(model, MultimodalModel.from_pretrained(tmp_path))  # parts from this machine's folders are in it
    assert batch_of(MultimodalProcessor.from_pretrained(tmp_path))["input_ids"].tolist()
    card = (tmp_path / "README.md").read_text()
    for said in (
        "pipeline_tag: any-to-any",
        "| language_model | LlamaForCausalLM | this repository",
        "Trained in stage3 for 7 updates: image_projector. At the end: loss 1.25.",
        'MultimodalModel.from_pretrained("someone/composed")',
    ):
        assert said in card


def test_pushing_while_saving(composed, hub, tmp_path):
    model, _ = composed
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="someone/composed", token="hf_x")
    assert "config.json" in hub.files and "model.safetensors" in hub.files


# ------------------------------------------------------------------------------------------ what can be saved loads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(dtype, tiny_model, tmp_path):
    model, _ = tiny_model(("image", "video"), ("image",))
    model.to(dtype).save_pretrained(tmp_path)
    assert_same_tensors(model, MultimodalModel.from_pretrained(tmp_path))


def test_several_dtypes_in_one_part(tiny_model, parts, tmp_path):
    llm = get_peft_model(parts.language_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model, _ = tiny_model(("image",), ("image",), language_model=llm)
    model.half()
    llm.get_base_model().model.norm.float()
    model.image_decoder.module.vae.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same_tensors(model, MultimodalModel.from_pretrained(tmp_path))


def test_text_without_a_saved_processor(composed, tmp_path):
    model, processor = composed
    model.save_pretrained(tmp_path)
    batch = batch_of(processor)
    again = MultimodalModel.from_pretrained(tmp_path).generate(**batch, max_new_tokens=4)
    assert again.text == model.generate(**batch, max_new_tokens=4).text and again.text[0]


def test_text_of_a_model_that_never_had_a_processor(parts, tmp_path):
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 4}
    MultimodalModel({}, load_language_model("zoo:language_model")).save_pretrained(tmp_path / "with a source")
    assert MultimodalModel.from_pretrained(tmp_path / "with a source").generate(**batch).text[0]
    MultimodalModel({}, parts.language_model()).save_pretrained(tmp_path / "alone", standalone=True)
    output = MultimodalModel.from_pretrained(tmp_path / "alone").generate(**batch)
    assert output.sequences.shape == (1, 4)
    with pytest.raises(InputError, match="the model has no tokenizer: build MultimodalProcessor"):
        print(output.text)
    with pytest.raises(InputError, match=r"no saved processor: there is no processor_config\.json"):
        MultimodalProcessor.from_pretrained(tmp_path / "alone")


def change(path, function):
    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("file", ["model.safetensors", "adapters/language_model/adapter_model.safetensors",
                                  "parts/image_encoder/model.safetensors"])  # fmt: skip
def test_what_is_no_number_is_refused_by_name(file, tiny_model, parts, tmp_path):
    llm = get_peft_model(parts.language_model(), LoraConfig(target_modules=["q_proj"]))
    model, _ = tiny_model(("image",), ("image",), language_model=llm)
    model.save_pretrained(tmp_path, standalone=True)
    name = next(n for n, t in load_file(tmp_path / file).items() if t.dim() > 1)
    whole = (tmp_path / file).read_bytes()
    for value in (float("nan"), float("inf")):
        change(tmp_path / file, lambda t, value=value: t[name].view(-1)[:1].fill_(value))
        with pytest.raises(InputError, match=rf"not finite: .*{name}"):
            MultimodalModel.from_pretrained(tmp_path)
        (tmp_path / file).write_bytes(whole)
    change(tmp_path / file, lambda t: t.update({name: t[name].long()}))
    with pytest.raises(InputError, match=rf"{name}"):
        MultimodalModel.from_pretrained(tmp_path)


def test_a_manifest_is_looked_at(composed, tmp_path):
    model, processor = composed
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    write_manifest(tmp_path)
    MultimodalModel.from_pretrained(tmp_path)
    change(tmp_path / "model.safetensors", lambda tensors: next(iter(tensors.values())).mul_(2))
    for cls in (MultimodalModel, MultimodalProcessor):
        with pytest.raises(InputError, match=r"changed since it was written: model\.safetensors has other content"):
            cls.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # written anew, it fits itself again
    MultimodalModel.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------- transformers' habits


def test_habits_of_from_pretrained(composed, tmp_path):
    model, _ = composed
    model.save_pretrained(tmp_path)
    again, info = MultimodalModel.from_pretrained(tmp_path, device_map="cpu", output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    assert_same_tensors(model, again)
    for options in ({"torch_dtype": torch.bfloat16}, {"dtype": "bfloat16"}):
        half = MultimodalModel.from_pretrained(tmp_path, **options, device_map="auto")
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for options, text in (
        ({"device_map": {"a": 0, "b": 1}}, "device_map is"),
        ({"dtype": "float17"}, "dtype is 'float17'"),
    ):
        with pytest.raises(InputError, match=text):
            MultimodalModel.from_pretrained(tmp_path, **options)


def test_habits_of_models(composed):
    model, _ = composed
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with pytest.raises(InputError, match="the language model's matrices stay as they are"):
        model.resize_token_embeddings(10)
