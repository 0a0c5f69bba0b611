"""The processor: placeholders, feature functions, arguments, targets and files."""

import functools
import operator

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from anygpt import InputError, ModalEncoderModule, MultimodalModel, MultimodalProcessor

WHISPER = {"sampling_rate": 16_000}


@pytest.fixture
def bare(parts):
    """`bare(funcs, …)`: a processor without a model, as the documentation builds it."""

    def make(functions=None, keys=("vision", "audio"), **options):
        makers = {"vision": "image", "image": "image", "audio": "audio", "video": "video"}
        processors = {key: parts.processor(makers[key]) for key in keys}
        return MultimodalProcessor(processors, parts.tokenizer(), num_feature_calculation_funcs=functions, **options)

    return make


def count(processor, batch, key):
    """How often a placeholder stands in each row."""
    return (batch["input_ids"] == processor.token_ids[key]).sum(dim=1).tolist()


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(parts):
    tokenizer = parts.tokenizer()
    tokenizer.pad_token = None
    batch = MultimodalProcessor({}, tokenizer)(llm_inputs={"text": ["a red ring", "a blue square and a ring"]})
    first, short = batch["attention_mask"].sum(dim=1).tolist(), int(batch["attention_mask"].sum(dim=1).min())
    assert short < max(first) and (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.eos_token_id).all()


# ------------------------------------------------------------------------------------------------ feature functions


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda *args, **kwargs: (224 // 16) ** 2 + 1, [394, 197]),
        (lambda inputs, outputs: np.int64(3), [6, 3]),
        (lambda inputs, outputs: [2, 3, 4], [5, 4]),
        (lambda inputs, outputs: [[2, 3], [4]], [5, 4]),
        (lambda inputs, outputs: torch.tensor([2, 3, 4]), [5, 4]),
        (lambda inputs, outputs: [torch.tensor([2, 3]), torch.tensor([4])], [5, 4]),
        (lambda inputs, outputs: [image.size[0] // 16 for image in inputs["images"]], [4, 2]),
        (lambda inputs, outputs: [len(pixels) for pixels in outputs["pixel_values"]], [6, 3]),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_every_form_that_a_feature_function_may_return(bare, media, function, expected, nested):
    processor = bare({"vision": function})
    images = [[media.image(0), media.image(1)], [media.image(2)]]
    images = images if nested else functools.reduce(operator.iadd, images, [])
    processor.injects = True
    batch = processor({"vision": {"images": images}}, {"text": ["<vision> and <vision>", "a <vision>"]})
    assert count(processor, batch, "vision") == expected
    assert batch["pixel_values"].shape == (3, 3, 32, 32)


def test_one_int_counts_inputs_and_not_what_the_processor_gives(bare, media):
    """A processor may pack its inputs (Qwen2-VL's gives patches): the first axis says nothing then."""
    processor = bare({"vision": lambda inputs, outputs: 4})
    inner = processor.encoder_processors["vision"]

    class Packing:
        def __call__(self, images, return_tensors=None):
            return {"pixel_values": inner(images, return_tensors="pt").pixel_values.flatten(0, 2)}

    processor.encoder_processors["vision"] = Packing()
    batch = processor({"vision": {"images": [media.image(0), media.image(1)]}}, {"text": "<vision> or <vision>"})
    assert count(processor, batch, "vision") == [8]


def test_both_spellings(parts):
    for name in ("num_feature_calculation_funcs", "num_features_calculation_funcs"):
        processor = MultimodalProcessor(
            {"vision": parts.processor("image")}, parts.tokenizer(), **{name: {"vision": lambda i, o: 2}}
        )
        assert processor.expand(["<vision>"], {"vision": [2]}) == ["<vision><vision>"]
        assert processor.count_features("vision", {}, {"pixel_values": torch.zeros(1, 3, 4, 4)}) == [2]
    with pytest.raises(InputError, match="feature function is given for"):
        MultimodalProcessor({}, parts.tokenizer(), num_feature_calculation_funcs={"vision": lambda i, o: 2})


def test_counts_are_automatic_and_right_for_the_zoo(tiny_model, media):
    """What the placeholders say is what the encoders give."""
    model, processor = tiny_model()
    batch = processor(
        {
            "image": {"images": [media.image(0)]},
            "video": {"videos": [media.video(0), media.video(1, frames=9)]},
            "audio": {"raw_speech": [media.audio(0)], **WHISPER},
        },
        {"text": ["<image>, <video>, <audio>, <video>"]},
    )
    assert {key: count(processor, batch, key) for key in processor.tokens} == {
        "image": [17],
        "video": [8],
        "audio": [50],
    }
    model(**batch)


def test_unknown_encoder_without_a_function_is_an_error(bare, media):
    with pytest.raises(
        InputError, match=r"how many features the 'vision' encoder gives.*num_feature_calculation_funcs"
    ):
        bare()({"vision": {"images": media.image()}}, {"text": "<vision>"})


# ------------------------------------------------------------------------------------------------ tokens


def test_tokens_are_registered_and_others_kept(parts):
    tokenizer = parts.tokenizer()
    before = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<own>"]})
    processors = {"vision": parts.processor("image"), "audio": parts.processor("audio")}
    processor = MultimodalProcessor(processors, tokenizer, predefined_tokens={"vision": "<image>"})
    assert processor.tokens == {"vision": "<image>", "audio": "<audio>"}
    for token in ("<image>", "<audio>", "<own>", "<|user|>"):
        assert tokenizer.tokenize(f"a{token}b").count(token) == 1
        assert tokenizer.decode(tokenizer(token)["input_ids"], skip_special_tokens=True) == ""
    assert tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"]) == before
    assert tokenizer.convert_tokens_to_ids("<vision>") == tokenizer.unk_token_id


def test_a_token_of_the_vocabulary_is_not_added_again(parts):
    tokenizer = parts.tokenizer()
    size = len(tokenizer)
    processor = MultimodalProcessor(
        {"vision": parts.processor("image")}, tokenizer, predefined_tokens={"vision": "<|user|>"}
    )
    assert len(tokenizer) == size and processor.token_ids == {"vision": tokenizer.convert_tokens_to_ids("<|user|>")}


def test_processors_share_nothing(parts, media):
    one = MultimodalProcessor(
        {"image": parts.processor("image")}, parts.tokenizer(), num_feature_calculation_funcs={"image": lambda i, o: 2}
    )
    two = MultimodalProcessor({"image": parts.processor("image")}, parts.tokenizer())
    assert two.num_feature_funcs == {} and one.num_feature_funcs is not two.num_feature_funcs
    with pytest.raises(InputError, match="how many features"):
        two({"image": {"images": media.image()}}, {"text": "<image>"})


def test_model_is_told_the_ids(tiny_model):
    model, processor = tiny_model()
    assert model.token_ids == processor.token_ids and len(set(model.token_ids.values())) == 3
    assert model.signal_tokens.ids == processor.signal_token_ids
    names = processor.llm_tokenizer.convert_ids_to_tokens(model.signal_tokens.ids["image"])
    assert names == ["[IMG0]", "[IMG1]", "[IMG2]", "[IMG3]"]
    ids = processor.llm_tokenizer("a[VID0][VID1][VID2]b")["input_ids"]
    assert ids[1:4] == model.signal_tokens.ids["video"]


def test_processor_must_fit_the_model(tiny_model, parts):
    model, _ = tiny_model(("image",), ())
    with pytest.raises(InputError, match=r"\['image'\], but processors are given for \['audio'\]"):
        MultimodalProcessor({"audio": parts.processor("audio")}, parts.tokenizer(), model=model)


# ------------------------------------------------------------------------------------------------ a batch


@pytest.mark.parametrize(
    ("text", "images", "parts_of_message"),
    [
        (["<image> <image>", "b"], [[0], [1]], ["row 0", "2", "1"]),
        (["<image>", "b"], [[0], [1]], ["row 1", "0", "1"]),
        (["<image>", "<image>"], [0], ["2 <image>", "row 0: 1, row 1: 1", "1 inputs"]),
        (["a"], [0, 1], ["0 <image>", "2 inputs"]),
        (["<image>"], None, ["1 <image>", "0 inputs"]),
    ],
)
def test_too_many_or_too_few_placeholders(tiny_model, media, text, images, parts_of_message):
    _, processor = tiny_model(("image",), ())

    def load(item):
        return [load(i) for i in item] if isinstance(item, list) else media.image(item)

    inputs = {} if images is None else {"image": {"images": load(images)}}
    with pytest.raises(ValueError) as error:
        processor(inputs, {"text": text})
    for part in ("'image'", *parts_of_message):
        assert part in str(error.value)


def test_one_medium_a_list_and_a_list_a_row(tiny_model, media):
    _, processor = tiny_model(("image", "video", "audio"), ())
    for images, videos, audios in (
        (media.image(0), media.video(0), media.audio(0)),
        ([media.image(0)], [media.video(0)], [media.audio(0)]),
        ([[media.image(0)]], [[media.video(0)]], [[media.audio(0)]]),
    ):
        batch = processor(
            {"image": {"images": images}, "video": {"videos": videos}, "audio": {"raw_speech": audios, **WHISPER}},
            {"text": ["<image><video><audio>"]},
        )
        assert batch["pixel_values"].shape == (1, 3, 32, 32)
        assert batch["pixel_values_videos"].shape == (1, 4, 3, 32, 32)
        assert batch["input_features"].shape == (1, 80, 100)
        assert batch["input_ids"].shape == (1, 17 + 4 + 50)


def test_kwargs_go_to_every_processor_that_takes_them(tiny_model, media):
    _, processor = tiny_model(("image", "video", "audio"), ())
    inputs = {
        "image": {"images": media.image(0)},
        "video": {"videos": [media.video(0)]},
        "audio": {"raw_speech": media.audio(0)},
    }
    text = {"text": ["<image><video><audio>"]}
    batch = processor(inputs, text, sampling_rate=16_000, do_rescale=False, return_attention_mask=False)
    plain = processor(inputs, text, sampling_rate=16_000)
    assert "attention_mask" in plain and "attention_mask" not in batch
    assert batch["pixel_values"].max() > 100 > plain["pixel_values"].max()
    assert batch["pixel_values_videos"].max() > 100, "the frames' processor takes it too"
    with pytest.raises(ValueError, match="sampling rate"):
        processor(inputs, text, sampling_rate=8_000)
    own = processor({"image": {"images": media.image(0), "do_rescale": True}}, {"text": "<image>"}, do_rescale=False)
    assert own["pixel_values"].max() < 100, "what is given for one processor comes first"


def test_return_tensors(tiny_model, media):
    _, processor = tiny_model(("image",), ())
    inputs, text = {"image": {"images": media.image()}}, {"text": ["<image>"]}
    assert isinstance(processor(inputs, text)["input_ids"], torch.Tensor)
    batch = processor(inputs, text, return_tensors="np")
    assert isinstance(batch["input_ids"], np.ndarray) and isinstance(batch["pixel_values"], np.ndarray)


def test_two_encoders_with_the_same_argument(parts, media):
    small = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    encoders = {
        "vision": ModalEncoderModule(parts.encoder("image"), modality="image"),
        "other": ModalEncoderModule(CLIPVisionModel(small)),
    }
    model = MultimodalModel(encoders, parts.language_model()).eval()
    processors = {"vision": parts.processor("image"), "other": parts.processor("image")}
    processor = MultimodalProcessor(processors, parts.tokenizer(), model=model)
    batch = processor(
        {"vision": {"images": [media.image(0)]}, "other": {"images": [media.image(1), media.image(2)]}},
        {"text": ["<vision> <other> <other>"]},
    )
    assert batch["vision.pixel_values"].shape[0] == 1 and batch["other.pixel_values"].shape[0] == 2
    assert count(processor, batch, "vision") == [17] and count(processor, batch, "other") == [10]
    model(**batch)
    only = processor({"other": {"images": [media.image(1)]}}, {"text": ["<other>"]})
    model(**only)
    assert "other.pixel_values" in only


def test_unknown_inputs_are_refused(tiny_model, media):
    _, processor = tiny_model(("image",), ("image",))
    with pytest.raises(InputError, match=r"\['smell'\], which no encoder reads"):
        processor({"smell": {}}, {"text": "a"})
    with pytest.raises(InputError, match="targets for 'audio'; the decoders are"):
        processor({}, {"text": "a"}, decoder_targets={"audio": {"captions": ["a"]}})
    with pytest.raises(InputError, match=r"keys \['image'\]; expected 'captions' and 'images'"):
        processor({}, {"text": "a"}, decoder_targets={"image": {"image": [media.image()]}})
    with pytest.raises(InputError, match="2 captions but 1 images"):
        processor({}, {"text": "a"}, decoder_targets={"image": {"captions": ["a", "b"], "images": [media.image()]}})


def test_decoder_targets(tiny_model, media):
    model, processor = tiny_model((), ("image", "video", "audio"))
    targets = {
        "image": {"captions": ["one", "two"], "images": [media.image(0), media.image(1)]},
        "video": {"videos": [media.video(0)]},
        "audio": {"captions": ["beep"], "audios": [(media.audio(0), 16_000)]},
    }
    spans = {key: "".join(names) for key, names in processor.signal_tokens.items()}
    text = spans["image"] + spans["audio"] + spans["image"] + spans["video"]
    batch = processor(llm_inputs={"text": [text]}, decoder_targets=targets)
    given = batch["decoder_targets"]
    assert given["image"]["media"].shape == (2, 3, 32, 32) and given["image"]["captions"] == ["one", "two"]
    assert given["video"]["media"].dim() == 5 and set(given["video"]) == {"media"}
    assert given["audio"]["media"].shape[:2] == (1, 1)
    losses = model(**batch, labels=batch["input_ids"]).losses
    assert losses["llm_decoder/alignment/image"].count == 2 and losses["llm_decoder/denoising/video"].count == 1
