"""A diffusers that lacks one pipeline: what needs it says so, and everything else goes on."""

import re
import subprocess
import sys
import textwrap

import pytest
from training_utils import REPOSITORY

from anygpt.decoders.pipelines import TESTED


def test_everything_else_works_without_one_pipeline(tmp_path):
    script = textwrap.dedent(
        """
        import importlib, pkgutil, sys
        import diffusers
        diffusers._class_to_module.pop("TextToVideoSDPipeline")
        assert not hasattr(diffusers, "TextToVideoSDPipeline")
        import torch
        import anygpt
        from anygpt import *
        for module in pkgutil.walk_packages(anygpt.__path__, "anygpt."):
            if module.name not in ("anygpt.__main__", "anygpt.toyworld.__main__", "anygpt.toyworld.parts"):
                importlib.import_module(module.name)  # stage 0 makes pipelines of all kinds: it needs them
        from anygpt import load_encoder_processor
        try:
            load_decoder("zoo:video_decoder")
            sys.exit("the clip decoder was loaded")
        except InputError as error:
            print(error)
        loaded = {key: load_decoder(f"zoo:{key}_decoder") for key in ("image", "audio")}
        decoders = {key: ModalDecoderModule(decoder, num_signal_tokens=2) for key, decoder in loaded.items()}
        model = MultimodalModel({}, load_language_model("zoo:language_model"), decoders)
        processor = MultimodalProcessor({}, load_tokenizer("zoo:language_model"), model=model)
        chat = [{"role": "user", "content": "Draw a red ring."}]
        batch = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        options = {"image": {"num_inference_steps": 1}}
        assert model.generate(**batch, max_new_tokens=4, require=["image"], decoder_kwargs=options).answers[0].images
        model.save_pretrained(sys.argv[1])
        MultimodalModel.from_pretrained(sys.argv[1])
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "saved")], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(
        r"video_decoder.*diffusers [\d.]+ has no TextToVideoSDPipeline; versions >=0.36,<0.43", done.stdout
    )


FAMILIES = ("SanaPipeline", "FluxPipeline", "WanPipeline", "LTXPipeline", "StableAudioPipeline", "AudioLDM2Pipeline")


@pytest.mark.slow
def test_any_newer_family_may_be_missing(tmp_path):
    """Each in a fork of one process, which has imported the libraries but nothing of ours."""
    script = textwrap.dedent(
        """
        import importlib, json, os, pathlib, pkgutil, sys
        import diffusers, peft, torch, transformers

        def without(name, folder):
            diffusers._class_to_module.pop(name)
            vars(diffusers).pop(name, None)
            assert not hasattr(diffusers, name)
            import anygpt
            for module in pkgutil.walk_packages(anygpt.__path__, "anygpt."):
                if not module.name.endswith("__main__") and module.name != "anygpt.toyworld.parts":
                    importlib.import_module(module.name)
            from anygpt import InputError, load_decoder
            folder.mkdir()
            (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
            try:
                load_decoder(folder)
                raise AssertionError(f"{name} was loaded")
            except InputError as error:
                print(error, flush=True)
            load_decoder("zoo:image_decoder").encode_text(["a red ring"])

        for name in sys.argv[2:]:
            child = os.fork()
            if child == 0:
                without(name, pathlib.Path(sys.argv[1], name))
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0, name
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *FAMILIES], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in FAMILIES:
        assert re.search(rf"diffusers [\d.]+ has no {name}; versions {re.escape(TESTED)} have it", done.stdout), name


def test_diffusers_is_bounded_to_what_was_tested():
    assert f'"diffusers{TESTED}"' in (REPOSITORY / "pyproject.toml").read_text()
