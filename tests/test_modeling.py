"""The composition: the documented constructor forms, callbacks, inputs, and what gets gradients."""

import pytest
import torch
from conftest import SIGNAL_TOKENS
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from anygpt import (
    InputError,
    ModalDecoderModule,
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProjector,
    MultimodalProjectorConfig,
)

IDS = torch.tensor([[30, 31, 32, 33]])


def pixels(*shape, seed=0):
    return torch.randn(*shape or (1, 3, 32, 32), generator=torch.Generator().manual_seed(seed))


def lora(model, **options):
    targets = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**targets | options))


@pytest.fixture
def clip(parts):
    return parts.encoder("image")


@pytest.fixture
def llm(parts):
    return parts.language_model()


# ------------------------------------------------------------------------------------------------ construction


def test_documented_architecture(clip, llm, parts):
    model = MultimodalModel(
        encoders={
            "vision": ModalEncoderModule(clip),
            "audio": ModalEncoderModule(module=parts.encoder("audio"), projector=None),
            "whatever": ModalEncoderModule(model=parts.encoder("image"), modality="image"),
        },
        language_model=llm,
    )
    assert isinstance(model, nn.Module)
    assert list(model.encoders) == ["vision", "audio", "whatever"] and model.decoders == {}
    assert model.vision_encoder.module is clip and model.language_model is llm
    assert isinstance(model.audio_encoder.projector, MultimodalProjector)
    assert [encoder.modality for encoder in model.encoders.values()] == ["vision", "audio", "image"]
    names = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)), "a tensor is registered twice"


def test_model_and_module_are_one_argument(clip):
    assert ModalEncoderModule(model=clip).module is ModalEncoderModule(module=clip).module
    with pytest.raises(InputError, match="give either model= or module="):
        ModalEncoderModule(clip, module=clip)
    with pytest.raises(InputError, match="give either model= or module="):
        ModalEncoderModule()


def test_projector_is_lazy_and_takes_its_sizes_from_both_sides(clip, llm):
    encoder = ModalEncoderModule(clip)
    assert encoder.projector is None
    MultimodalModel({"image": encoder}, llm)
    assert isinstance(encoder.projector.projection, nn.Linear)
    assert (encoder.projector.projection.in_features, encoder.projector.projection.out_features) == (96, 128)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "gelu_pytorch_tanh", "quick_gelu", "relu2", "laplace"])
def test_mlp_projector_with_any_activation(clip, llm, activation):
    model = MultimodalModel(
        {"image": ModalEncoderModule(clip)}, llm, init_projector_type="mlp", init_activation=activation
    )
    first, middle, last = model.image_encoder.projector.projection
    assert (first.in_features, first.out_features, last.in_features, last.out_features) == (96, 128, 128, 128)
    x = torch.randn(2, 5, 96)
    torch.testing.assert_close(model.image_encoder.projector(x), last(middle(first(x))))
    assert not isinstance(middle, nn.Linear)


def test_qformer_projector_gives_its_own_number_of_features():
    config = MultimodalProjectorConfig(
        in_features=96, out_features=128, projection_type="qformer", num_query_tokens=5, num_hidden_layers=1
    )
    projector = MultimodalProjector(config)
    assert projector(torch.randn(2, 17, 96)).shape == (2, 5, 128)
    assert torch.pdist(projector.projection.queries[0]).min() > 0


def test_projector_wraps_a_module_of_ones_own(clip, llm):
    own = nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 128, bias=False))
    wrapped = MultimodalProjector(MultimodalProjectorConfig(clip.config, llm.config), own)
    model = MultimodalModel({"image": ModalEncoderModule(module=clip, projector=wrapped)}, llm).eval()
    features = clip(pixels()).last_hidden_state
    torch.testing.assert_close(model.encode({"pixel_values": pixels()})["image"], own(features))


@pytest.mark.parametrize(("sizes", "message"), [((96, 100), "100.*128"), ((32, 128), "96.*32")])
def test_size_mismatch_names_both_sizes(clip, llm, sizes, message):
    projector = MultimodalProjector(MultimodalProjectorConfig(in_features=sizes[0], out_features=sizes[1]))
    with pytest.raises(ValueError, match=message):
        MultimodalModel({"image": ModalEncoderModule(clip, projector)}, llm)


def test_unknown_kinds_are_refused(clip, llm, parts):
    with pytest.raises(InputError, match="unknown projector type 'conv'"):
        MultimodalModel({"image": ModalEncoderModule(clip)}, llm, init_projector_type="conv")
    with pytest.raises(InputError, match="unknown activation 'gelo'"):
        MultimodalProjectorConfig(activation="gelo")
    with pytest.raises(InputError, match="AutoModelForCausalLM"):
        MultimodalModel({}, llm.model)
    with pytest.raises(InputError, match="takes a DiffusionDecoder"):
        ModalDecoderModule(parts.decoder("image").pipeline)


# ---------------------------------------------------------------------------------------------------- callbacks


@pytest.mark.parametrize("kind", ["ModelOutput", "tuple"])
def test_callbacks_run_in_order_on_both_kinds_of_output(clip, llm, kind):
    seen = []

    def preprocess(inputs):
        seen.append(("preprocess", sorted(inputs)))
        return inputs | {"pixel_values": inputs["pixel_values"] * 2}

    def after_module(inputs, output):
        seen.append(("module", sorted(inputs), type(output).__name__, output[0].shape[-1]))
        assert torch.equal(inputs["pixel_values"], pixels() * 2)
        return (output[0][:, 1:],) if kind == "tuple" else BaseModelOutput(last_hidden_state=output[0][:, 1:])

    def after_projector(inputs, output):
        seen.append(("projector", sorted(inputs), type(output).__name__, output[0].shape[-1]))
        if kind == "tuple":
            return (output[0] + 1, *output[1:])
        output.last_hidden_state = output.last_hidden_state + 1
        return output

    encoder = ModalEncoderModule(
        model=clip,
        projector=None,
        additional_args=["image_sizes"],
        preprocess_callback=preprocess,
        postprocess_module_callback=after_module,
        postprocess_projector_callback=after_projector,
    )
    model = MultimodalModel({"image": encoder}, llm).eval()
    features = model.encode({"pixel_values": pixels(), "image_sizes": torch.tensor([[32, 32]])})["image"]
    expected = encoder.projector.projection(clip(pixels() * 2).last_hidden_state[:, 1:]) + 1
    torch.testing.assert_close(features, expected)
    both = ["image_sizes", "pixel_values"]
    output = "tuple" if kind == "tuple" else "BaseModelOutput"
    assert seen == [
        ("preprocess", both),
        ("module", both, "BaseModelOutputWithPooling", 96),
        ("projector", both, output, 128),
    ]


def test_packed_features_from_a_callback_are_injected(clip, llm):
    """As LLaVA-NeXT's packing does: inputs with different numbers of features, one after the other."""

    def pack(inputs, output):
        return (torch.cat([output[0][0, :3], output[0][1, :5]]),)

    model = MultimodalModel({"image": ModalEncoderModule(clip, postprocess_projector_callback=pack)}, llm).eval()
    model.set_token_ids({"image": 9})
    ids = torch.tensor([[9, 9, 9, 40, 41], [9, 9, 9, 9, 9]])
    assert model(ids, pixel_values=pixels(2, 3, 32, 32)).logits.shape[:2] == (2, 5)


def test_llm_callback_changes_what_the_language_model_gets(clip, llm):
    def callback(input_ids, position_ids, pixel_values):
        assert input_ids.shape == position_ids.shape and pixel_values is not None
        return {"position_ids": position_ids + 5 * (position_ids > 2)}

    encoders = {"image": ModalEncoderModule(clip)}
    torch.manual_seed(0)
    model = MultimodalModel(encoders, llm, preprocess_llm_callback=callback).eval()
    changed = model(IDS, pixel_values=pixels()).logits
    model.preprocess_llm_callback = None
    plain = model(IDS, pixel_values=pixels()).logits
    assert changed.shape == plain.shape and not torch.allclose(changed, plain, atol=1e-3)


# ------------------------------------------------------------------------------------------------- inputs, gradients


def test_peft_wrapped_parts_are_not_silently_text_only(parts):
    """A PEFT wrapper's forward is (*args, **kwargs): names have to be read behind it."""
    encoder = ModalEncoderModule(lora(parts.encoder("image")))
    assert "pixel_values" in encoder.input_names
    model = MultimodalModel({"image": encoder}, lora(parts.language_model(), task_type="CAUSAL_LM")).eval()
    model.set_token_ids({"image": 9})
    ids = torch.tensor([[*[9] * 17, 40, 41, 42]])
    one, two = (model(ids, pixel_values=pixels(seed=seed)).logits[0, -1] for seed in (0, 1))
    assert not torch.allclose(one, two, atol=1e-4)
    model.train_only(["image_encoder", "language_model"])
    model(ids, labels=ids, pixel_values=pixels()).loss.backward()
    for name in model.trainable_names():
        gradient = model.get_parameter(name).grad
        # the last CLIP layer's pooling is not used, and nothing else may be left out
        assert gradient is not None and gradient.abs().sum() > 0, name


def test_inputs_go_to_the_encoder_that_takes_them(clip, llm, parts):
    encoders = {
        "vision": ModalEncoderModule(clip),
        "second": ModalEncoderModule(parts.encoder("image")),
        "audio": ModalEncoderModule(parts.encoder("audio")),
    }
    model = MultimodalModel(encoders, llm).eval()
    sound = torch.randn(1, 80, 100)
    features = model.encode({"second.pixel_values": pixels(), "input_features": sound, "vision.pixel_values": None})
    assert {key: tuple(value.shape) for key, value in features.items()} == {
        "second": (1, 17, 128),
        "audio": (1, 50, 128),
    }
    with pytest.raises(ValueError, match=r"'pixel_values' could go to 'vision' or 'second'.*'vision.pixel_values'"):
        model(IDS, pixel_values=pixels())
    with pytest.raises(ValueError, match=r"no encoder takes the input 'pixels'.*audio: .*input_features"):
        model(IDS, pixels=pixels())
    with pytest.raises(ValueError, match=r"no encoder takes the input 'audio.pixel_values'"):
        model(IDS, **{"audio.pixel_values": pixels()})
    model.set_token_ids({"vision": 9})
    with pytest.raises(ValueError, match=r"'audio'.*dropped"):
        model(IDS, input_features=sound)


def test_token_ids_are_checked_and_can_be_taken_back(tiny_model):
    model, _ = tiny_model(("image", "audio"), ())
    with pytest.raises(ValueError, match=r"\['vision'\]; the encoders are \['image', 'audio'\]"):
        model.set_token_ids({"vision": 1})
    with pytest.raises(ValueError, match="a placeholder token of its own"):
        model.set_token_ids({"image": 1, "audio": 1})
    model.set_token_ids(None)
    assert model(IDS, pixel_values=pixels()).logits.shape[1] == 17 + IDS.shape[1]


def test_logits_are_computed_only_where_labels_are(tiny_model):
    model, _ = tiny_model((), ())
    shapes = []
    handle = model.language_model.lm_head.register_forward_hook(lambda m, args, out: shapes.append(args[0].shape))
    labels = torch.tensor([[-100, -100, 32, 33]])
    short = model(IDS, labels=labels)
    full = model(IDS, labels=labels, return_logits=True)
    plain = model(IDS)
    handle.remove()
    assert short.logits is None and short.hidden_states.shape == (1, 4, 128)
    assert [tuple(shape[:2]) for shape in shapes] == [(1, 2), (1, 4), (1, 4)]
    assert full.logits.shape == plain.logits.shape and plain.loss is None
    torch.testing.assert_close(short.loss, full.loss)
    expected = nn.functional.cross_entropy(full.logits[0, 1:3], torch.tensor([32, 33]))
    torch.testing.assert_close(short.loss, expected)


def span_ids(model, key="image"):
    return torch.tensor([[30, 31, *model.signal_tokens.ids[key], 32]])


@pytest.mark.parametrize(("rows", "graph"), [("both", True), ("output", False), ("none", False)])
def test_no_graph_through_a_frozen_trunk(tiny_model, rows, graph):
    model, _ = tiny_model(("image",), ("image",))
    model.train_only(["image_output_projector"])
    model.signal_tokens.output_rows["image"].requires_grad_(rows != "none")
    model.signal_tokens.input_rows["image"].requires_grad_(rows == "both")
    ids = span_ids(model)
    output = model(ids, labels=ids, decoder_targets={"image": {"captions": ["a red ring"]}})
    assert output.hidden_states.requires_grad is graph
    output.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == set(model.trainable_names())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("hidden_layer", [-1, -2, 2, 0, "mix"])
@pytest.mark.parametrize("kind", ["linear", "mlp", "transformer", "qformer"])
def test_conditions_from_any_layer_through_any_projector(tiny_model, kind, hidden_layer):
    if kind != "linear" and hidden_layer in (-2, 0):
        pytest.skip("enough with one projector")
    model, _ = tiny_model((), ("image",), hidden_layer=hidden_layer, init_output_projector_type=kind)
    ids = span_ids(model)
    with torch.no_grad():
        condition = model(ids).conditions["image"]
        with model.signal_tokens.attached(model.language_model) as tap:
            embeds = model.language_model.get_input_embeddings()(ids)
            states = model.language_model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
        assert torch.equal(states[-1], tap.hidden)
        read = torch.stack(states).mean(dim=0) if hidden_layer == "mix" else states[hidden_layer]
        expected = model.image_decoder.projector((read + embeds)[:, 2 : 2 + SIGNAL_TOKENS["image"]]).embeds
    assert condition.shape == (1, *model.image_decoder.module.condition_shape)
    torch.testing.assert_close(condition, expected, rtol=1e-4, atol=1e-5)
    assert torch.pdist(condition[0]).min() > 0, "condition tokens must differ"


def test_hidden_layer_must_exist(tiny_model):
    for layer in (5, -6, "last"):
        with pytest.raises(InputError, match="hidden_layer"):
            tiny_model((), ("image",), hidden_layer=layer)
