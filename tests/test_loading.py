"""Parts from files as the hub has them: a report of every tensor, kinds of files, and what a user may get wrong."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import CLIP, LANGUAGE_MODELS, LLAMA
from tiny_pipelines import audioldm, stable_diffusion, stable_diffusion_3, zeroscope
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from whole_models import WHOLE_MODELS

from anygpt import InputError, StableDiffusionDecoder, load_decoder, load_encoder, load_language_model, load_tokenizer


@pytest.fixture
def llama(tmp_path):
    """A saved Llama."""
    LLAMA.build().save_pretrained(tmp_path)
    return tmp_path


def change(folder, function, file="model.safetensors"):
    tensors = load_file(folder / file)
    function(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", LANGUAGE_MODELS, ids=lambda part: part.label)
def test_language_models_are_their_checkpoints(part, tmp_path):
    model = part.build()
    model.save_pretrained(tmp_path)
    found = load_language_model(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, found[name]), name
    stored = sorted(load_file(tmp_path / "model.safetensors"))
    for name in (stored[0], stored[len(stored) // 2], stored[-1]):
        lost = {}
        change(tmp_path, lambda tensors, name=name, lost=lost: lost.update({name: tensors.pop(name)}))
        with pytest.raises(InputError, match="Nothing is filled with random numbers"):
            load_language_model(tmp_path)
        change(tmp_path, lambda tensors, lost=lost: tensors.update(lost))


def test_a_base_model_gets_no_random_head(tmp_path):
    LlamaModel(LLAMA.config()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is not what a LlamaForCausalLM needs: it lacks lm_head\.weight"):
        load_language_model(tmp_path)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_float8_weights_are_floating_point(tmp_path, kind, dtype):
    """As transformers reads them: into the dtype that is asked for, or the config's."""
    LlamaForCausalLM(LLAMA.config()).save_pretrained(tmp_path)
    file, settings = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = {name: t.to(kind) if "proj" in name else t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if "dtype" not in k}))
    model = load_language_model(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_tied_head_need_not_be_stored(tmp_path):
    config = LlamaConfig(**{**LLAMA.config().to_dict(), "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_language_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_computed_buffers_of_older_checkpoints_are_no_fault(llama, tmp_path_factory):
    change(
        llama, lambda t: t.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)})
    )
    stored, loaded = load_file(llama / "model.safetensors"), load_language_model(llama).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items() if "inv_freq" not in name)
    folder = tmp_path_factory.mktemp("clip")
    CLIP.build().save_pretrained(folder)
    change(folder, lambda t: t.update({"embeddings.position_ids": torch.arange(5)[None]}))
    load_encoder(folder, "image")


def test_left_over_and_other_shapes_and_integers_are_named(llama):
    change(llama, lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}))
    with pytest.raises(InputError, match=r"has left over model\.layers\.7\.mlp\.up_proj\.weight"):
        load_language_model(llama)
    change(llama, lambda t: t.pop("model.layers.7.mlp.up_proj.weight"))
    change(llama, lambda t: t.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(InputError, match=r"in another shape model\.norm\.weight \(7,\), expected \(32,\)"):
        load_language_model(llama)
    change(llama, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}))
    with pytest.raises(InputError, match=r"has as integers model\.norm\.weight"):
        load_language_model(llama)


@pytest.mark.parametrize(
    ("suffix", "said"),
    [("lora_A.default.weight", "inside: merge its adapter"), ("_weight_qdata", "undo torchao's quantisation")],
)
def test_networks_saved_with_adapters_inside_or_quantised_are_named(llama, tmp_path, suffix, said):
    change(llama, lambda t: t.update({f"model.layers.0.mlp.up_proj.{suffix}": torch.ones(2, 2)}))
    stable_diffusion().save_pretrained(tmp_path)
    more = {f"conv_in.{suffix}": torch.ones(2, 2)}
    change(tmp_path / "unet", lambda t: t.update(more), "diffusion_pytorch_model.safetensors")
    for load_part, path in ((load_language_model, llama), (load_decoder, tmp_path)):
        with pytest.raises(InputError, match=said):
            load_part(path)


def test_adapters_in_other_parts_of_a_whole_model_are_not_its_encoders(tmp_path):
    next(one for one in WHOLE_MODELS if one.label == "CLIP").build().save_pretrained(tmp_path)
    layer = "model.encoder.layers.0.mlp.fc1.lora_A.default.weight"
    change(tmp_path, lambda t: t.update({f"text_{layer}": torch.ones(2, 2)}))
    load_encoder(tmp_path, "image")
    change(tmp_path, lambda t: t.update({f"vision_{layer}": torch.ones(2, 2)}))
    with pytest.raises(InputError, match="merge its adapter"):
        load_encoder(tmp_path, "image")


def test_many_faults_are_counted(llama):
    change(llama, lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n])
    with pytest.raises(InputError, match=r"it lacks model\.layers\.1\.\S+, .* and 4 more"):
        load_language_model(llama)


PIPELINES = {"image": stable_diffusion, "video": zeroscope, "audio": audioldm, "image, SD 3": stable_diffusion_3}


def test_a_network_that_is_saved_twice_is_checked_as_diffusers_reads_it(tmp_path):
    """Beside a whole file, an index whose shard lacks a tensor: diffusers reads the shard."""
    next(iter(PIPELINES.values()))().save_pretrained(tmp_path)
    (file,) = (tmp_path / "unet").glob("*.safetensors")
    tensors = load_file(file)
    lost, shard = sorted(tensors)[0], "diffusion_pytorch_model-00001-of-00001.safetensors"
    kept = {name: tensor for name, tensor in tensors.items() if name != lost}
    save_file(kept, file.with_name(shard), metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(kept, shard)}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"it lacks {lost}"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_every_network_of_a_pipeline_is_its_checkpoint(make, tmp_path):
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path)
    for name, network in pipeline.components.items():
        if not isinstance(network, torch.nn.Module):
            continue
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, decoder.get_submodule(name).state_dict()[key]), f"{name}.{key}"
        (file,) = (tmp_path / name).glob("*.safetensors")
        stored = sorted(load_file(file))
        for lost in (stored[0], stored[len(stored) // 2]):
            kept = load_file(file)
            save_file({n: t for n, t in kept.items() if n != lost}, file, metadata={"format": "pt"})
            with pytest.raises(InputError, match=f"{name}/{file.name} is not what a .* it lacks {lost}"):
                load_decoder(tmp_path)
            save_file(kept | {"stray": torch.ones(1)}, file, metadata={"format": "pt"})
            with pytest.raises(InputError, match=f"{name}/{file.name} is not what a .* it has left over stray"):
                load_decoder(tmp_path)
            save_file(kept, file, metadata={"format": "pt"})


# ----------------------------------------------------------------------------------------------- files of other kinds


def as_pickle(folder, name="pytorch_model.bin"):
    """The weights of a folder as a pickle alone."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / name)
    return tensors


@pytest.mark.parametrize("name", ["pytorch_model.bin", "imagebind_huge.pth", "weights.pt"])
def test_pickled_tensors_are_read_where_asked_for(name, llama, caplog):
    tensors = as_pickle(llama, name)
    with pytest.raises(InputError, match="set weights: any") as refusal:
        load_language_model(llama)
    assert str(llama) in str(refusal.value)
    model = load_language_model(llama, weights="any")
    assert all(torch.equal(model.state_dict()[n], t) for n, t in tensors.items())
    load_language_model(llama, weights="any")
    assert caplog.text.count("weights_only=True") == 1


def test_pickled_shards(llama, tmp_path):
    tensors = load_file(llama / "model.safetensors")
    names = sorted(tensors)
    (llama / "model.safetensors").unlink()
    shards = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for shard, held in shards.items():
        torch.save({n: tensors[n] for n in held}, llama / shard)
    index = {"weight_map": {n: shard for shard, held in shards.items() for n in held}}
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model = load_language_model(llama, weights="any")
    assert all(torch.equal(model.state_dict()[n], t) for n, t in tensors.items())


class Bomb:
    """A pickle that would leave a file behind."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_code_in_a_pickle_never_runs(old, llama, tmp_path_factory):
    tensors, target = as_pickle(llama), tmp_path_factory.mktemp("bomb") / "ran"
    torch.save(tensors | {"x": Bomb(target)}, llama / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    with pytest.raises(InputError, match=r"pytorch_model\.bin is refused: .*code"):
        load_language_model(llama, weights="any")
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(InputError, match=r"pytorch_model\.bin is refused"):
        load_language_model(llama, weights="any")
    assert not target.exists()


def test_a_pipeline_of_bin_files_only(tmp_path):
    pipeline = zeroscope()
    pipeline.save_pretrained(tmp_path)
    for name in ("unet", "vae"):
        (file,) = (tmp_path / name).glob("*.safetensors")
        torch.save(load_file(file), tmp_path / name / "diffusion_pytorch_model.bin")
        file.unlink()
    with pytest.raises(InputError, match=r"has its weights as diffusion_pytorch_model\.bin only.* weights: any"):
        load_decoder(tmp_path)
    decoder = load_decoder(tmp_path, weights="any")
    for key, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, decoder.unet.state_dict()[key])


def test_variants_and_subfolders(tmp_path, caplog):
    pipeline = stable_diffusion()
    pipeline.to(torch.float16).save_pretrained(tmp_path / "models/sd", variant="fp16")
    with pytest.raises(InputError, match=r"has no weights.* it has \S+\.fp16\.safetensors, so set the variant"):
        load_decoder(tmp_path, subfolder="models/sd")
    decoder = load_decoder(tmp_path, subfolder="models/sd", variant="fp16", dtype="float16")
    assert torch.equal(decoder.unet.state_dict()["conv_in.weight"], pipeline.unet.conv_in.weight)
    assert decoder.vae.dtype == decoder.text_encoder.dtype == torch.float16
    LLAMA.build().save_pretrained(tmp_path / "text/llama")
    load_language_model(tmp_path, subfolder="text/llama", variant="fp16")
    assert "has no files of variant 'fp16'; those without a variant are read" in caplog.text


def test_shards_of_safetensors(llama):
    model = LLAMA.build()
    model.save_pretrained(llama, max_shard_size="40KB")
    (llama / "model.safetensors").unlink(missing_ok=True)
    assert len(list(llama.glob("model-*.safetensors"))) > 2
    found = load_language_model(llama).state_dict()
    assert all(torch.equal(found[n], t) for n, t in model.state_dict().items())
    last = sorted(llama.glob("model-*.safetensors"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"{last.name} cannot be read as safetensors: it is cut off"):
        load_language_model(llama)
    last.unlink()
    with pytest.raises(InputError, match=rf"index\.json names the shard {last.name}, which is not there"):
        load_language_model(llama)


# -------------------------------------------------------------------------------------------------------- tokenizers


def sentencepiece_model(path, model_type="bpe"):
    """A tiny sentencepiece model, as Llama's and T5's repositories hold it."""
    import sentencepiece

    text = path.parent / "corpus.txt"
    text.write_text("\n".join(f"a red circle number {n} and a blue square" for n in range(50)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(path.with_suffix("")), vocab_size=30, model_type=model_type, pad_id=3
    )
    return path


@pytest.mark.parametrize(
    "file, kind, settings",
    [
        ("tokenizer.model", "bpe", {"tokenizer_class": "LlamaTokenizer"}),
        ("spiece.model", "unigram", {"tokenizer_class": "T5Tokenizer", "extra_ids": 4}),
    ],
)
def test_tokenizers_of_sentencepiece_alone(file, kind, settings, tmp_path):
    sentencepiece_model(tmp_path / file, kind)
    (tmp_path / "corpus.txt").unlink()
    for vocab in tmp_path.glob("*.vocab"):
        vocab.unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    model_type = settings["tokenizer_class"].removesuffix("Tokenizer").lower()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer("a red circle", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids).strip() == "a red circle" and len(ids) > 3


# ---------------------------------------------------------------------------------------------------------- mistakes


def mistake(llama, name):
    """One thing that is wrong with a folder, and what is said of it."""
    config = json.loads((llama / "config.json").read_text())
    if name == "another library's":
        (llama / "config.json").write_text(json.dumps({"architecture": "resnet50", "num_classes": 10}))
        return r"config\.json names no model_type"
    if name == "no config":
        (llama / "config.json").unlink()
        return r"has no config\.json"
    if name == "a config of another class":
        (llama / "config.json").write_text(json.dumps({"model_type": "vit"}))
        return "a 'vit' model is no causal language model"
    if name == "another model's weights":
        (llama / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
        return r"it lacks model\.layers\.2"
    if name == "a damaged config":
        (llama / "config.json").write_text('{"model_type": ')
        return r"config\.json is damaged"
    if name == "weights of another format":
        (llama / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
        return r"model\.safetensors cannot be read as safetensors"
    if name.startswith("an adapter"):
        (llama / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
        if name == "an adapter alone":
            (llama / "config.json").unlink()
        return r"holds a PEFT adapter of 'some/base', .* merge"
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    ["another library's", "no config", "a config of another class", "another model's weights", "a damaged config",
     "weights of another format", "an adapter alone", "an adapter beside the model"],
)  # fmt: skip
def test_mistakes_are_one_line(name, llama):
    text = mistake(llama, name)
    with pytest.raises(InputError, match=text) as refusal:
        load_language_model(llama)
    assert "\n" not in str(refusal.value) and str(llama) in str(refusal.value)


def index(folder, names, shard):
    """An index of shards that puts the tensors `names` into one."""
    entries = dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": entries}))


def test_an_index_is_not_believed(llama):
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(tensors, llama / "a.bin")
    index(llama, tensors, "a.bin")
    with pytest.raises(
        InputError, match=r"index\.json names the shard 'a\.bin', which is no \.safetensors file beside"
    ):
        load_language_model(llama)
    index(llama, [], "")
    with pytest.raises(InputError, match=r"index\.json names no tensor of this network"):
        load_language_model(llama)


def test_a_tensor_that_is_there_twice(tmp_path):
    CLIP.build().save_pretrained(tmp_path)
    change(tmp_path, lambda t: t.update({"vision_model.post_layernorm.weight": torch.zeros(16)}))
    with pytest.raises(InputError, match=r"it has twice vision_model\.post_layernorm\.weight"):
        load_encoder(tmp_path, "image")


@pytest.mark.parametrize(
    "values",
    [{"hidden_size": "x"}, {"num_attention_heads": 3}, {"hidden_act": "nope"}, {"dtype": "floatt"}, {"patch_size": 0}],
    ids=str,
)
def test_values_that_no_model_has(values, tmp_path):
    CLIP.build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(
        InputError, match=r"config\.json is damaged, or has a value that no model can be built from"
    ) as e:
        load_encoder(tmp_path, "image")
    assert "\n" not in str(e.value)


def test_options_of_other_parts_are_not_dropped(llama):
    for options in ({"num_frames": 3}, {"drop_cls": True}, {"processor": {}}):
        with pytest.raises(InputError, match=f"a part has no option '{next(iter(options))}'"):
            load_language_model(llama, **options)
    with pytest.raises(InputError, match="is a file; name the folder that it is in"):
        load_language_model(llama / "model.safetensors")


@pytest.mark.parametrize(
    "content", [b"\x80\x02U", b"\x80c.", b"h\x05.", {1: torch.ones(2)}, {"a": torch.eye(2).to_sparse()}]
)
def test_pickles_of_other_things(content, llama):
    (llama / "model.safetensors").unlink()
    path = llama / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=r"pytorch_model\.bin (is refused|holds other things than dense tensors)") as e:
        load_language_model(llama, weights="any")
    assert "\n" not in str(e.value)


def test_a_tokenizer_without_a_vocabulary(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for kind in ("LlamaTokenizer", "T5Tokenizer"):  # built of special tokens alone by the library
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        with pytest.raises(InputError, match=r"has no tokenizer\.json, tokenizer\.model or other file with a vocab"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match=r"tokenizer\.model is no sentencepiece model"):
        load_tokenizer(tmp_path)


def test_faults_of_a_pipeline_name_the_file(tmp_path):
    stable_diffusion().save_pretrained(tmp_path)
    weights, index = "unet/diffusion_pytorch_model.safetensors", tmp_path / "model_index.json"
    right, entries = load_file(tmp_path / weights), json.loads(index.read_text())
    for tensor, text in ((torch.ones(3, 3), "in another shape"), (right["conv_in.bias"].long(), "as integers")):
        save_file(right | {"conv_in.bias": tensor}, tmp_path / weights, metadata={"format": "pt"})
        with pytest.raises(InputError, match=rf"{weights} is not what a \S+ needs: it has {text} conv_in\.bias"):
            load_decoder(tmp_path)
    save_file(right, tmp_path / weights, metadata={"format": "pt"})
    for option in ({"attn_implementation": "sdpa"}, {"gguf_file": "a"}, {"num_frames": 3}):
        with pytest.raises(InputError, match=f"{next(iter(option))}.* leave it out"):
            load_decoder(tmp_path, **option)
    (tmp_path / "unet/adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="unet holds a PEFT adapter"):
        load_decoder(tmp_path)
    (tmp_path / "unet/adapter_config.json").unlink()
    for entry, text in ((["diffusers"], "expected a library and a class"), ([None, None], "neither a unet nor")):
        index.write_text(json.dumps(entries | {"unet": entry}))
        with pytest.raises(InputError, match=rf"model_index\.json .*{text}"):
            load_decoder(tmp_path)
    index.write_text(json.dumps(entries))
    (tmp_path / "tokenizer").rename(tmp_path / "gone")
    with pytest.raises(InputError, match=r"tokenizer has no tokenizer\.json"):
        load_decoder(tmp_path)


def test_arguments_of_a_decoder_are_taken_or_refused(parts):
    folder = parts.folder / "image_decoder"
    for options in ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"dtype": torch.bfloat16}):
        assert StableDiffusionDecoder.from_pretrained(folder, **options).dtype == torch.bfloat16
    for options, text in (
        ({"hieght": 64}, "no argument 'hieght'"),
        ({"dtype": "half-size"}, "dtype 'half-size' of part"),
    ):
        with pytest.raises(InputError, match=text):
            StableDiffusionDecoder.from_pretrained(folder, **options)


def test_an_id_that_is_not_there():
    for load in (load_language_model, load_decoder, lambda path: load_encoder(path, "image"), load_tokenizer):
        with pytest.raises(
            InputError, match=r"cannot load the .* 'nobody/nothing'.*there is no such folder"
        ) as refusal:
            load("nobody/nothing")
        assert "\n" not in str(refusal.value)


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: gated, or not there."""

    def do_HEAD(self):
        gated = "/someone/gated" in self.path
        self.send_response(403 if gated else 401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "no")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


REFUSED = """
import sys, anygpt
for name in sys.argv[1:]:
    try:
        anygpt.load_language_model(name)
    except anygpt.InputError as error:
        print(error)
"""


def test_what_the_hub_refuses(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", REFUSED, "someone/gated", "someone/nothing"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    server.shutdown()
    gated, nothing = done.stdout.splitlines()
    assert "'someone/gated' is gated: accept its terms at http" in gated
    assert "no 'someone/nothing' at the hub, or it is private" in nothing
