"""Every encoder family with Llama: composed, forward, backward and generate, features counted by the processor."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from conftest import enlarge
from tiny_parts import CLIP, ENCODERS, LANGUAGE_MODELS, LLAMA, VISION

from anygpt import InputError, ModalEncoderModule, MultimodalModel, MultimodalProcessor, load_encoder
from anygpt.encoders import FAMILIES, VideoEncoder
from anygpt.encoders.projector import MultimodalProjector, MultimodalProjectorConfig
from anygpt.parts.source import Source


def by_label(part):
    return part.label


def compose(encoder, language_model, tokenizer, **options):
    """A seeded model with one encoder under its modality's key, and its processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MultimodalModel(
            {encoder.modality: ModalEncoderModule(enlarge(encoder.build(), 2.0))},
            enlarge(language_model.build()),
            **options,
        ).eval()
    return model, MultimodalProcessor({encoder.modality: encoder.build_processor()}, tokenizer, model=model)


def make_batch(encoder, processor, seeds=(0, 1, 2), rows=("<M> and <M> say", "then <M>", "nothing")):
    """A batch whose first row has two media, whose second has one, whose third has none."""
    media = [encoder.media(seed) for seed in seeds]
    name = processor.media_argument(encoder.modality)
    texts = [row.replace("<M>", f"<{encoder.modality}>") for row in rows]
    return processor({encoder.modality: {name: media}}, {"text": texts})


@pytest.fixture
def tokenizer(parts):
    return parts.tokenizer()


def assert_trains_and_answers(encoder, model, processor):
    batch = make_batch(encoder, processor)
    output = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    output.loss.backward()
    for part in (f"{encoder.modality}_encoder", f"{encoder.modality}_projector"):
        reached = [p.grad for p in model.part_parameters(part) if p.grad is not None]
        assert reached and all(grad.isfinite().all() for grad in reached)
        assert any(bool(grad.any()) for grad in reached)
    answers = model.generate(**batch, max_new_tokens=3).sequences
    assert answers.shape == (3, 3)


@pytest.mark.parametrize("encoder", ENCODERS, ids=by_label)
def test_encoder_with_llama(encoder, tokenizer):
    model, processor = compose(encoder, LLAMA, tokenizer)
    assert_trains_and_answers(encoder, model, processor)


@pytest.mark.parametrize("seeds", [(0, 1, 2), (2, 1, 0)], ids=["longest", "shortest"])
@pytest.mark.parametrize("encoder", ENCODERS, ids=by_label)
def test_media_matter_and_neighbours_do_not(encoder, seeds, tokenizer):
    model, processor = compose(encoder, LLAMA, tokenizer)
    batch = make_batch(encoder, processor, seeds)
    alone = make_batch(encoder, processor, seeds=seeds[2:], rows=("then <M>",))
    other = make_batch(encoder, processor, seeds=(*seeds[:2], seeds[0]))
    with torch.no_grad():
        row = model(**batch).logits[1][batch["attention_mask"][1].bool()]
        expected = model(**alone).logits[0][alone["attention_mask"][0].bool()]
        changed = model(**other).logits[1][other["attention_mask"][1].bool()]
    torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
    assert (row[-1] - changed[-1]).abs().max() > 1e-3


def test_long_sounds_of_phi_do_not_depend_on_their_neighbours(tokenizer):
    """Above 500 states its attention is in chunks, of which the last is padded."""
    encoder = next(one for one in ENCODERS if one.label == "Phi-4 audio")
    model, processor = compose(encoder, LLAMA, tokenizer)
    sounds = [np.random.default_rng(i).standard_normal(16000 * s).astype(np.float32) for i, s in enumerate((42, 45, 1))]
    name = processor.media_argument("audio")

    def encode(media):
        batch = processor({"audio": {name: media}}, {"text": ["<audio>"] * len(media)})
        inputs = {key.removeprefix("audio."): value for key, value in batch.items()}
        with torch.no_grad():
            return model.audio_encoder.encode({k: v for k, v in inputs.items() if k in model.audio_encoder.input_names})

    for together, sound in zip(encode(sounds), sounds, strict=True):
        torch.testing.assert_close(together, encode([sound])[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("encoder", ENCODERS, ids=by_label)
def test_processor_counts_features_after_saving_too(encoder, tokenizer, tmp_path):
    _, processor = compose(encoder, LLAMA, tokenizer)
    processor.save_pretrained(tmp_path)
    batch, again = (make_batch(encoder, p) for p in (processor, MultimodalProcessor.from_pretrained(tmp_path)))
    assert batch["input_ids"].tolist() == again["input_ids"].tolist()


@pytest.mark.parametrize("projection_type", ["qformer", "merger", "pooled"])
def test_counts_follow_the_projector(projection_type, tokenizer):
    model, processor = compose(CLIP, LLAMA, tokenizer, init_projector_type=projection_type)
    batch = make_batch(CLIP, processor)
    per_image = model.image_encoder.projector.config.features_after(5)
    assert int((batch["input_ids"] == model.token_ids["image"]).sum()) == 3 * per_image
    if projection_type != "merger":
        model(**batch)


@pytest.mark.parametrize("projection_type", ["linear", "mlp", "pooled", "qformer"])
def test_features_of_each_input_are_as_good_as_the_input(projection_type, tokenizer):
    model, processor = compose(CLIP, LLAMA, tokenizer, init_projector_type=projection_type)
    inputs = {name.removeprefix("image."): value for name, value in make_batch(CLIP, processor).items()}
    inputs = {name: value for name, value in inputs.items() if name in model.image_encoder.input_names}
    with torch.no_grad():
        features, direct = model.image_encoder.encode(inputs), model.image_encoder(inputs)
        again = model.image_encoder({"features": features})
    torch.testing.assert_close(torch.stack(list(again)), direct)


def test_pooled_is_the_mean_through_a_line():
    projector = MultimodalProjector(MultimodalProjectorConfig(in_features=3, out_features=4, projection_type="pooled"))
    features, line = torch.randn(2, 5, 3), projector.projection.linear
    expected = features.double().sum(dim=1) / 5 @ line.weight.double().T + line.bias.double()
    torch.testing.assert_close(projector(features).double(), expected[:, None], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"features of shape \(items, n, 3\), not \(5, 3\)"):
        projector(features[0])


@pytest.mark.slow
@pytest.mark.parametrize("language_model", LANGUAGE_MODELS, ids=by_label)
@pytest.mark.parametrize("encoder", ENCODERS, ids=by_label)
def test_full_product(encoder, language_model, tokenizer):
    model, processor = compose(encoder, language_model, tokenizer)
    assert_trains_and_answers(encoder, model, processor)


def encoder_by(label):
    return next(encoder for encoder in ENCODERS if encoder.label == label)


@pytest.mark.parametrize("label", ["SigLIP2", "Pixtral", "Qwen2-VL vision", "Phi-4 audio"])
def test_features_of_different_number_can_be_prepended(label, tokenizer):
    encoder = encoder_by(label)
    model, processor = compose(encoder, LLAMA, tokenizer)
    model.set_token_ids(None)
    name = processor.media_argument(encoder.modality)
    media = [[encoder.media(0), encoder.media(1)], [encoder.media(2)]]
    processor.injects = False
    batch = processor({encoder.modality: {name: media}}, {"text": ["both", "one"]})
    alone = processor({encoder.modality: {name: media[1:]}}, {"text": ["one"]})
    with torch.no_grad():
        found, expected = model(**batch), model(**alone)
    row = found.logits[1][found.attention_mask[1].bool()]
    torch.testing.assert_close(row, expected.logits[0][expected.attention_mask[0].bool()], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "model, text",
    [
        (
            lambda: transformers.CLIPModel(
                transformers.CLIPConfig(
                    vision_config=VISION,
                    text_config={**VISION, "vocab_size": 10, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
                )
            ),
            "CLIPModel reads input_ids, so it is no encoder of media",
        ),
        (
            lambda: transformers.WhisperModel(encoder_by("Whisper").config().__class__(
                d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=10, pad_token_id=0, bos_token_id=0, eos_token_id=0,
                decoder_start_token_id=0,
            )),
            "WhisperModel reads decoder_input_ids",
        ),
        (LLAMA.build, "LlamaForCausalLM reads input_ids"),
    ],
    ids=["CLIPModel", "WhisperModel", "Llama"],
)  # fmt: skip
def test_models_that_are_no_encoders_are_refused(model, text):
    with pytest.raises(InputError, match=text):
        ModalEncoderModule(model())


@pytest.mark.parametrize("label", ["Pixtral", "Qwen2-VL vision", "SigLIP2", "VideoMAE", "Whisper"])
def test_frame_by_frame_needs_images_of_one_size(label):
    with pytest.raises(InputError, match="cannot run frame by frame"):
        VideoEncoder(encoder_by(label).build())


@pytest.mark.parametrize("label", ["CLIP", "EfficientNet"])
def test_frames_give_one_feature_or_all(label):
    tiny = dataclasses.replace(encoder_by(label), modality="video", num_frames=3)
    pooled = tiny.build().eval()
    every = VideoEncoder(pooled.image_encoder, tiny.num_frames, pool_frames=False)
    inputs = tiny.build_processor()([tiny.media(0), tiny.media(1)])
    with torch.no_grad():
        one, all_of_them = (encoder(**inputs).last_hidden_state for encoder in (pooled, every))
    count = FAMILIES[every.config.model_type].count
    assert count(pooled.config, inputs) == [one.shape[1]] * 2 == [tiny.num_frames] * 2
    assert one.shape[-1] == all_of_them.shape[-1] == pooled.config.hidden_size
    assert count(every.config, inputs) == [all_of_them.shape[1]] * 2 and all_of_them.shape[1] > one.shape[1]
    torch.testing.assert_close(all_of_them.unflatten(1, (tiny.num_frames, -1)).mean(dim=2), one)


def test_a_saved_video_encoder_keeps_all_features(tmp_path):
    encoder = load_encoder(Source("zoo:image_encoder", num_frames=2, pool_frames=False), "video")
    MultimodalModel({"video": ModalEncoderModule(encoder)}, LLAMA.build()).save_pretrained(tmp_path)
    loaded = MultimodalModel.from_pretrained(tmp_path).encoders["video"].module
    assert loaded.config.pool_frames is False and loaded.config.num_frames == 2


@pytest.mark.parametrize("kind", ["qformer", "pooled"])
def test_some_projectors_need_inputs_of_one_size(kind, tokenizer):
    with pytest.raises(InputError, match=f"a {kind} projector needs inputs of one size, but 'pixtral' gives"):
        compose(encoder_by("Pixtral"), LLAMA, tokenizer, init_projector_type=kind)
