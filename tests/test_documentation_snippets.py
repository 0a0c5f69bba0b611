"""The snippets of Cornstarch's documentation, as a reader would type them, on tiny local checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import enlarge
from peft import LoraConfig, TaskType, get_peft_model
from PIL import Image
from tiny_parts import TEXT, VISION
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextConfig, LlavaNextModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from anygpt import ModalEncoderModule, MultimodalModel, MultimodalProcessor, MultimodalProjector
from anygpt import MultimodalProjectorConfig as ProjectorConfig

SIZE = 16


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders in place of the documentation's hub ids."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**TEXT)),
        "mistral": MistralForCausalLM(MistralConfig(**TEXT)),
        "clip": CLIPVisionModel(CLIPVisionConfig(**VISION)),
        "siglip": SiglipVisionModel(SiglipVisionConfig(**VISION)),
        "vit": ViTModel(ViTConfig(**VISION)),
        "whisper": WhisperEncoder(
            WhisperConfig(
                d_model=16,
                encoder_layers=1,
                encoder_attention_heads=2,
                encoder_ffn_dim=16,
                num_mel_bins=8,
                max_source_positions=50,
            )
        ),
    }
    for name, model in models.items():
        enlarge(model).save_pretrained(folder / name)
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
        folder / "clip"
    )
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder / "whisper")
    return folder


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def test_creating_a_multimodal_llm(checkpoints):
    llm = LlamaForCausalLM.from_pretrained(checkpoints / "llama")
    vision_encoder = ViTModel.from_pretrained(checkpoints / "vit")

    mllm = MultimodalModel(
        encoders={
            "vision": ModalEncoderModule(vision_encoder),
        },
        language_model=llm,
    )
    assert isinstance(mllm, nn.Module)
    assert mllm.language_model is llm
    assert mllm.vision_encoder.module is vision_encoder
    assert isinstance(mllm.vision_encoder.projector, MultimodalProjector)
    assert mllm.encoders["vision"] is mllm.vision_encoder


def test_wrapping_a_projector_module(checkpoints):
    my_encoder_module = CLIPVisionModel.from_pretrained(checkpoints / "clip")
    my_projector_module = nn.Linear(16, 32)
    your_config = ProjectorConfig(encoder_config=my_encoder_module.config, text_config=LlamaConfig(**TEXT))

    wrapped_projector_module = MultimodalProjector(your_config, my_projector_module)
    encoder = ModalEncoderModule(module=my_encoder_module, projector=wrapped_projector_module)
    mllm = MultimodalModel({"vision": encoder}, LlamaForCausalLM.from_pretrained(checkpoints / "llama"))
    assert mllm.vision_encoder.projector.projection is my_projector_module


def test_lazy_projectors(checkpoints):
    my_encoder_module = CLIPVisionModel.from_pretrained(checkpoints / "clip")
    encoder = ModalEncoderModule(module=my_encoder_module)
    # which is equivalent to
    encoder = ModalEncoderModule(module=my_encoder_module, projector=None)
    assert encoder.projector is None
    llm = LlamaForCausalLM.from_pretrained(checkpoints / "llama")
    MultimodalModel(encoders={"vision": encoder}, language_model=llm, init_projector_type="mlp", init_activation="relu")
    first, activation, second = encoder.projector.projection
    assert (type(first), type(activation), type(second)) == (nn.Linear, nn.ReLU, nn.Linear)


def test_order_of_callbacks(checkpoints):
    seen = []

    def preprocess_vision_callback(inputs: dict) -> dict:
        seen.append("preprocess")
        return inputs

    def postprocess_vision_callback(inputs, output):
        seen.append("module")
        return output

    def postprocess_projector_callback(inputs, output):
        seen.append("projector")
        assert output[0].shape == (1, 5, 32)
        return output

    vision_encoder = CLIPVisionModel.from_pretrained(checkpoints / "clip")
    llm = LlamaForCausalLM.from_pretrained(checkpoints / "llama")
    vision_projector = MultimodalProjector(ProjectorConfig(vision_encoder.config, llm.config))
    encoder = ModalEncoderModule(
        model=vision_encoder,
        projector=vision_projector,
        preprocess_callback=preprocess_vision_callback,
        postprocess_module_callback=postprocess_vision_callback,
        postprocess_projector_callback=postprocess_projector_callback,
    )
    mllm = MultimodalModel({"vision": encoder}, llm)
    mllm(input_ids=torch.tensor([[5, 6]]), pixel_values=torch.randn(1, 3, SIZE, SIZE))
    assert seen == ["preprocess", "module", "projector"]


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("vision, language", [("clip", "mistral"), ("siglip", "llama")])
def test_llava_next_with_any_encoder_and_any_llm(checkpoints, vision, language, return_dict):
    pinpoints, image_size = [[16, 32], [32, 16], [32, 32]], (30, 30)
    native = LlavaNextModel(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**VISION),
            text_config=LlamaConfig(**TEXT),
            image_grid_pinpoints=pinpoints,
        )
    )
    pack_image_features, image_newline = native.pack_image_features, native.image_newline
    image_sizes = torch.tensor([image_size])

    def postprocess_vision_callback(inputs: dict, output: BaseModelOutput | tuple) -> BaseModelOutput | tuple:
        # the `default` strategy: without the class token, which only CLIP has
        features = output[0][:, 1:] if vision == "clip" else output[0]
        if isinstance(output, ModelOutput):
            output.last_hidden_state = features
            return output
        return (features, *output[1:])

    def postprocess_projector_callback(
        inputs: dict,
        output: BaseModelOutput | tuple,
        vision_feature_select_strategy: str | None = None,
    ) -> BaseModelOutput | tuple:
        pixel_values = inputs.get("pixel_values", None)  # noqa: SIM910

        if pixel_values is not None and pixel_values.size(0) > 0:
            image_features = output[0]
            image_features, _ = pack_image_features(
                [image_features],
                image_sizes,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_newline=image_newline,
            )

        if isinstance(output, ModelOutput):
            output.last_hidden_state = image_features
        else:
            output = (image_features,) + output[1:]  # noqa: RUF005

        return output

    classes = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
    encoder = classes[vision].from_pretrained(checkpoints / vision, return_dict=return_dict)
    llms = {"mistral": MistralForCausalLM, "llama": LlamaForCausalLM}

    mllm = MultimodalModel(
        encoders={
            "vision": ModalEncoderModule(
                model=encoder,
                postprocess_module_callback=postprocess_vision_callback,
                postprocess_projector_callback=postprocess_projector_callback,
            )
        },
        language_model=llms[language].from_pretrained(checkpoints / language),
    )
    mllm.set_token_ids({"vision": 100})
    count = 4 + 4 * 5  # the whole image, and four rows of four with a newline each
    input_ids = torch.tensor([[5, *[100] * count, 6]])
    output = mllm(input_ids=input_ids, pixel_values=torch.randn(5, 3, SIZE, SIZE), labels=input_ids)
    output.loss.backward()
    assert image_newline.grad.any()


def test_peft(checkpoints):
    llm = LlamaForCausalLM.from_pretrained(checkpoints / "llama")
    peft_config = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False)
    llm = get_peft_model(llm, peft_config)
    clip = CLIPVisionModel.from_pretrained(checkpoints / "clip")
    mllm = MultimodalModel({"vision": ModalEncoderModule(clip)}, language_model=llm)
    ids = torch.tensor([[5, 6, 7]])
    mllm(input_ids=ids, pixel_values=torch.randn(1, 3, SIZE, SIZE), labels=ids).loss.backward()
    assert {n for n, p in llm.named_parameters() if p.grad is not None} == {
        n for n, p in llm.named_parameters() if "lora_" in n
    }


def test_training_and_freezing(checkpoints):
    mllm = MultimodalModel(
        encoders={
            "vision": ModalEncoderModule(CLIPVisionModel.from_pretrained(checkpoints / "clip")),
        },
        language_model=LlamaForCausalLM.from_pretrained(checkpoints / "llama"),
    )

    mllm.train("vision_encoder", mode=False)
    mllm.train("vision_projector", mode=True)
    mllm.train("language_model", mode=False)

    ids = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, SIZE, SIZE), "labels": ids}
    output = mllm(**inputs)
    loss = output.loss
    loss.backward()
    assert {n for n, p in mllm.named_parameters() if p.grad is not None} == {
        f"vision_encoder.projector.projection.{n}" for n in ("weight", "bias")
    }
    with pytest.raises(ValueError, match="there is no part 'non_existing_encoder'; the parts are vision_encoder"):
        mllm.train("non_existing_encoder", mode=False)


def vision_and_audio(checkpoints):
    return MultimodalModel(
        encoders={
            "vision": ModalEncoderModule(CLIPVisionModel.from_pretrained(checkpoints / "clip"), modality="image"),
            "audio": ModalEncoderModule(WhisperEncoder.from_pretrained(checkpoints / "whisper")),
        },
        language_model=LlamaForCausalLM.from_pretrained(checkpoints / "llama"),
    )


def test_injecting(checkpoints):
    mllm = vision_and_audio(checkpoints)
    vision_token_id, audio_token_id = 200, 201
    mllm.set_token_ids(
        {
            "vision": vision_token_id,
            "audio": audio_token_id,
        }
    )
    ids = torch.tensor([[1, 33, 77, 104, 200, 200, 200, 200, 200, 44, 48, 69]])
    assert mllm(input_ids=ids, pixel_values=torch.randn(1, 3, SIZE, SIZE)).logits.shape[1] == 12
    with pytest.raises(ValueError, match="'vision': the batch has 4 placeholder tokens but 5 features"):
        mllm(input_ids=ids[:, 1:].masked_fill(torch.arange(11) == 4, 9), pixel_values=torch.randn(1, 3, SIZE, SIZE))


@pytest.mark.parametrize("argument", ["num_feature_calculation_funcs", "num_features_calculation_funcs"])
def test_processor_with_feature_functions(checkpoints, parts, argument):
    functions = {
        "vision": lambda *args, **kwargs: (SIZE // 8) ** 2 + 1,
        "audio": lambda *args, **kwargs: 50,
    }
    mm_processor = MultimodalProcessor(
        encoder_processors={
            "vision": CLIPImageProcessor.from_pretrained(checkpoints / "clip"),
            "audio": WhisperFeatureExtractor.from_pretrained(checkpoints / "whisper"),
        },
        llm_tokenizer=parts.tokenizer(),
        **{argument: functions},
    )
    inputs = mm_processor(
        encoder_inputs={"vision": {"images": picture()}, "audio": {"raw_speech": np.zeros(800, np.float32)}},
        llm_inputs={"text": "<vision><audio> what?"},
        sampling_rate=16_000,
    )
    ids = inputs["input_ids"]
    assert [(ids == mm_processor.token_ids[key]).sum() for key in ("vision", "audio")] == [5, 50]


def test_tokens_are_registered(checkpoints, parts):
    processors = {
        "vision": CLIPImageProcessor.from_pretrained(checkpoints / "clip"),
        "audio": WhisperFeatureExtractor.from_pretrained(checkpoints / "whisper"),
    }
    mllm = vision_and_audio(checkpoints)
    mm_processor = MultimodalProcessor(
        encoder_processors=processors,
        llm_tokenizer=parts.tokenizer(),
        model=mllm,
        predefined_tokens={"vision": "<image>"},
    )
    ids = mm_processor.llm_tokenizer.convert_tokens_to_ids(["<image>", "<audio>"])
    assert {"<image>", "<audio>"} <= set(mm_processor.llm_tokenizer.all_special_tokens)
    assert mllm.token_ids == dict(zip(("vision", "audio"), ids, strict=True))
    batch = mm_processor({"vision": {"images": [picture()]}}, {"text": ["<image> what?"]}, return_tensors="pt")
    assert mllm(**batch).logits.isfinite().all()
