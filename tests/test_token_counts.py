"""Placeholders that our processor writes, against those of the model's own processor, for 50 random image sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_parity_vlm import llava, llava_next, qwen2_vl
from tiny_parts import PATCH, SIZE, TEXT, VISION
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from anygpt import ModalEncoderModule, MultimodalModel, MultimodalProcessor

TOKEN = "<image>"
_SQUARE = {"height": SIZE, "width": SIZE}


def images(count=50):
    random = np.random.default_rng(0)
    # thin ones are the hard ones: what is cut off as padding is rounded
    for height, width in random.integers(12, 200, (count, 2)):
        yield Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _native_llava(image_processor, tokenizer):
    return transformers.LlavaProcessor(
        image_processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token=TOKEN,
    )  # fmt: skip


def _native_llava_next(image_processor, tokenizer):
    return transformers.LlavaNextProcessor(
        image_processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token=TOKEN,
    )  # fmt: skip


def _pixtral_model():
    config = transformers.PixtralVisionConfig(**VISION | {"image_size": 64, "head_dim": 8})
    encoder = ModalEncoderModule(transformers.PixtralVisionModel(config))
    return MultimodalModel({"image": encoder}, transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)))


CASES = {
    "llava": (
        lambda: MultimodalModel.from_pretrained_multimodal_model(llava()[0]),
        lambda: CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=_SQUARE),
        _native_llava,
    ),
    "llava_next": (
        lambda: MultimodalModel.from_pretrained_multimodal_model(llava_next()[0]),
        lambda: LlavaNextImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size=_SQUARE, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]]
        ),
        _native_llava_next,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_as_many_as_the_models_own_processor(case, parts):
    build, image_processor, build_native = CASES[case]
    tokenizer = parts.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [TOKEN]}, replace_extra_special_tokens=False)
    native = build_native(image_processor(), tokenizer)
    model = build().eval()
    ours = MultimodalProcessor({"image": image_processor()}, parts.tokenizer(), model=model)
    found, seen = set(), []
    for image in images():
        batch = ours({"image": {"images": [image]}}, {"text": f"{TOKEN} here"})
        count = int((batch["input_ids"] == ours.token_ids["image"]).sum())
        expected = native(text=f"{TOKEN} here", images=image, return_tensors="pt")["input_ids"]
        assert count == int((expected == native.tokenizer.convert_tokens_to_ids(TOKEN)).sum()), image.size
        found.add(count)
        seen.append(batch)
    assert len(found) > 1 or case == "llava"
    with torch.no_grad():  # and the encoder gives that many
        for batch in seen[:10]:
            assert model(**batch).logits.isfinite().all()


def test_as_many_as_qwen2_vls_image_processor(parts):
    options = {"patch_size": 4, "min_pixels": 64, "max_pixels": 1024, "merge_size": 2, "temporal_patch_size": 2}
    model = MultimodalModel.from_pretrained_multimodal_model(qwen2_vl()[0]).eval()
    native = Qwen2VLImageProcessorPil(**options)
    ours = MultimodalProcessor({"image": Qwen2VLImageProcessorPil(**options)}, parts.tokenizer(), model=model)
    for image in images():
        batch = ours({"image": {"images": [image]}}, {"text": f"{TOKEN} here"})
        count = int((batch["input_ids"] == ours.token_ids["image"]).sum())
        assert count == native.get_number_of_image_patches(image.height, image.width, {}) // 4, image.size
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()


def test_as_many_as_pixtrals_image_processor(parts):
    """`PixtralProcessor` itself needs torchvision; it writes one token a patch of the sizes that its PIL part gives."""
    options = {"size": {"longest_edge": 64}, "patch_size": PATCH}
    model = _pixtral_model().eval()
    ours = MultimodalProcessor({"image": PixtralImageProcessorPil(**options)}, parts.tokenizer(), model=model)
    for image in images():
        batch = ours({"image": {"images": [image]}}, {"text": f"{TOKEN} here"})
        count = int((batch["input_ids"] == ours.token_ids["image"]).sum())
        height, width = PixtralImageProcessorPil(**options)(images=image)["image_sizes"][0]
        assert count == (height // PATCH) * (width // PATCH), image.size
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()
