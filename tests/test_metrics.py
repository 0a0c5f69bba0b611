"""Each metric against an independent one, closed forms and naive formulas; and that it moves the right way."""

from __future__ import annotations

import itertools
import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
from evaluation_utils import clip, picture, sound, write_grounding_dino
from PIL import Image, ImageFilter
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import AutoTokenizer, BertModel, CLIPModel

from anygpt import InputError
from anygpt.data.grammar import CATEGORIES, COLOURS, compose
from anygpt.data.schema import ContentPart, Message, Sample
from anygpt.evaluation.metrics import METRICS, base
from anygpt.evaluation.metrics.base import Batch, Item, bootstrap_interval
from anygpt.evaluation.metrics.composition import CompositionScore, is_composed, overlap, related
from anygpt.evaluation.metrics.features import PretrainedNetwork
from anygpt.evaluation.metrics.text import normalize_answer, vqa_accuracy, words_of
from anygpt.evaluation.rows import Row
from anygpt.media.types import MEDIA, read_media


def row(references=(), **options):
    prompt = Sample("0", (Message("user", (ContentPart("text", "What is this?"),)),), "here")
    return Row("0", prompt, tuple(references), **options)


class Vectors:
    """A network whose features are what it is given."""

    def of_media(self, media):
        return torch.tensor(np.stack(media))


class Features(Batch):
    """A batch of features without media."""

    def __init__(self, answers, targets):
        super().__init__([None] * len(answers))
        self.features = lambda network, role, modality, num_frames=None: torch.as_tensor(
            answers if role == "answer" else targets
        )


def distance_of(metric, answers, targets, size=16):
    for start in range(0, len(answers), size):
        metric.update(Features(answers[start : start + size], targets[start : start + size]))
    return metric.compute()[""]


# ---- distances


def gaussians(number=4000, width=6, seed=0):
    """Samples whose mean and covariance are exactly what is asked for."""
    random_state = np.random.default_rng(seed)
    found = []
    for _ in range(2):
        x = random_state.standard_normal((number, width))
        x -= x.mean(0)
        x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
        scale, mean = random_state.uniform(0.5, 2.0, width), random_state.standard_normal(width)
        found.append((x * scale + mean, mean, scale))
    return found


@pytest.mark.parametrize("size", [1, 16, 4000])
def test_frechet_distance_of_known_gaussians(size):
    (x, mean, scale), (y, other_mean, other_scale) = gaussians()
    expected = ((mean - other_mean) ** 2).sum() + ((scale - other_scale) ** 2).sum()
    found = distance_of(base.Frechet(Vectors(), "image"), x, y, size)
    assert found["value"] == pytest.approx(expected, rel=1e-6) and found["n"] == 4000 and "note" not in found


def test_fid_and_kid_are_those_of_torchmetrics():
    generator = np.random.default_rng(1)
    x, y = generator.standard_normal((60, 8)), generator.standard_normal((60, 8)) * 1.3 + 0.2
    identity = torch.nn.Identity()
    identity.num_features = 8
    fid = FrechetInceptionDistance(feature=identity)
    kid = KernelInceptionDistance(feature=identity, subsets=1, subset_size=60)
    for metric in (fid, kid):
        metric.update(torch.as_tensor(y), real=True)
        metric.update(torch.as_tensor(x), real=False)
    assert distance_of(base.Frechet(Vectors(), "image"), x, y)["value"] == pytest.approx(float(fid.compute()))
    assert distance_of(base.Kid(Vectors(), "image"), x, y)["value"] == pytest.approx(float(kid.compute()[0]))


@pytest.mark.parametrize("ends", [(20, 40, 50), (20, 40), (20, 41)])
def test_kid_is_the_mean_of_its_blocks(ends):
    generator = np.random.default_rng(2)
    x, y = generator.standard_normal((2, ends[-1], 4))

    def unbiased(a, b):
        kernel = lambda u, v: (u @ v / 4 + 1) ** 3  # noqa: E731
        pairs = list(itertools.permutations(range(len(a)), 2))
        inside = sum(kernel(a[i], a[j]) + kernel(b[i], b[j]) for i, j in pairs) / len(pairs)
        return inside - 2 * np.mean([[kernel(u, v) for u in a] for v in b])

    spans = list(itertools.pairwise((0, *ends)))
    blocks = [block for i, j in spans for block in [unbiased(x[i:j], y[i:j])] * (j - i)]  # one a sample
    found = distance_of(base.Kid(Vectors(), "image", subset_size=20), x, y, size=16)
    assert found["value"] == pytest.approx(np.mean(blocks)) and found["std"] == pytest.approx(np.std(blocks))
    assert found["n"] == ends[-1]
    with pytest.raises(InputError, match="subset_size is 1; expected at least 2"):
        base.Kid(Vectors(), "image", subset_size=1)


def test_cmmd_is_the_naive_one(monkeypatch):
    monkeypatch.setattr(base, "BLOCK", 7)
    generator = np.random.default_rng(3)
    x, y = generator.standard_normal((2, 30, 5))
    u, v = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))

    def kernel(a, b):
        return np.mean([[np.exp(-((p - q) ** 2).sum() / 200) for p in a] for q in b])

    expected = 1000 * (kernel(u, u) + kernel(v, v) - 2 * kernel(u, v))
    assert distance_of(base.Cmmd(Vectors(), "image"), x, y)["value"] == pytest.approx(expected, rel=1e-9)


def test_too_few_samples_are_said():
    x, y = np.random.default_rng(4).standard_normal((2, 5, 8))
    found = distance_of(base.Frechet(Vectors(), "image"), x, y)
    assert "singular" in found["note"] and "at least 9 samples" in found["note"]
    for cls in (base.Frechet, base.Kid):
        with pytest.raises(InputError, match="at least two"):
            distance_of(cls(Vectors(), "image"), x[:1], y[:1])


@pytest.mark.parametrize("cls", [base.Frechet, base.Kid, base.Cmmd])
def test_memory_does_not_grow_with_the_samples(cls):
    generator = np.random.default_rng(5)

    def peak(number):
        metric = cls(Vectors(), "image")
        tracemalloc.start()
        for _ in range(number // 100):
            x, y = generator.standard_normal((2, 100, 64))
            metric.update(Features(x, y))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, sum(t.numel() for t in getattr(metric, "waiting", None) or [])

    few, many = peak(1_000), peak(20_000)
    assert many[0] < few[0] + 200_000 and many[1] <= 2 * 1000 * 64


# ---- words

CAPTIONS = [
    ("a man riding a horse on the beach", ["a man rides a horse along the beach", "a person on a horse by the sea"]),
    ("two dogs are playing", ["two dogs play in the grass.", "A pair of dogs playing with a ball"]),
    ("a red bus", ["a double-decker bus on a city street", "the red bus doesn't stop"]),
    ("a cat", ["a cat sleeping on a sofa", "the cat's asleep"]),
]


def caption_value(kind, pairs):
    metric = METRICS[kind].make()
    metric.update(Batch([Item(row(references), said, {}) for said, references in pairs]))
    return metric.compute()


def test_caption_metrics_are_those_of_pycocoevalcap():
    references = {i: [words_of(said) for said in all_said] for i, (_, all_said) in enumerate(CAPTIONS)}
    answers = {i: [words_of(said)] for i, (said, _) in enumerate(CAPTIONS)}
    bleu, _ = Bleu(4).compute_score(references, answers, verbose=0)
    found = caption_value("bleu", CAPTIONS)
    assert [found[f"_{n}"]["value"] for n in (1, 2, 3, 4)] == pytest.approx(bleu)
    for kind, scorer in (("rouge_l", Rouge()), ("cider", Cider())):
        value = caption_value(kind, CAPTIONS)[""]
        assert value["value"] == pytest.approx(scorer.compute_score(references, answers)[0])
        assert value["interval"][0] <= value["value"] <= value["interval"][1]


@pytest.mark.parametrize("rows", [1, 3])
def test_captions_that_all_rows_share_have_no_cider(rows):
    found = caption_value("cider", [("a red ring", ["a red ring", "one ring"])] * rows)[""]
    assert found["value"] is None and found["n"] == rows and "the same references" in found["note"]


def test_no_words_are_not_right():
    for kind in ("rouge_l", "exact_match"):
        assert [caption_value(kind, [(said, ["?!"])])[""]["value"] for said in ("", "?!")] == [0.0, 1.0]


@pytest.mark.parametrize("kind", ["bleu", "rouge_l", "cider"])
def test_captions_of_other_pictures_are_worse(kind):
    pairs = [(references[0], references) for _, references in CAPTIONS]
    shares, values = (0, 2, 4), []
    for share in shares:  # so many get another's caption
        said = [pairs[(i + 1) % share][0] if i < share else pairs[i][0] for i in range(4)]
        found = caption_value(kind, [(s, references) for s, (_, references) in zip(said, pairs, strict=True)])
        values.append(next(iter(found.values()))["value"])
    assert values[0] > values[1] > values[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's t-shirt doesn't fit.", "a man 's t-shirt does n't fit"),
        ('He said: "stop!" (twice), then left...', "he said stop twice then left"),
        ("It costs $3.50, or 1,000 yen", "it costs $ 3.50 or 1,000 yen"),
        ("She doesn’t like the cafe\u0301.", "she does n't like the café"),
        ("हिन्दी में किताब", "हिन्दी में किताब"),
        ("?!", "?!"),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


VQA_ANSWERS = [
    ("Yes", "yes"), ("no.", "no"), ("The dog", "dog"), ("a cat", "cat"), ("an apple", "apple"), ("two", "2"),
    ("Ten dogs", "10 dogs"), ("none", "0"), ("zero", "0"), ("eleven", "eleven"), ("dont", "don't"), ("isnt", "isn't"),
    ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("t-shirt", "t shirt"), ("red/blue", "red blue"),
    ("red / blue", "red blue"), ("yes, it is", "yes it is"), ("1,000", "1000"), ("3.5", "3.5"), ("U.S.", "us"),
    ("what?", "what"), ("(left)", "left"), ("  on   the\ttable\n", "on table"), ("red and white", "red and white"),
    ("wheres", "where's"), ("\"stop\"", "stop"), ("$5", "$5"), ("6:30", "6:30"), ("oclock", "o'clock"),
    ("The", "the"), ("(A)", "a"), ("?!", "?!"), ("", ""), ("Cafe\u0301", "café"), ("don’t", "don't"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "normal"), VQA_ANSWERS)
def test_vqa_answers_are_normalised(answer, normal):
    assert normalize_answer(answer) == normal


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy(same, accuracy):
    assert vqa_accuracy("The dog.", ["dog"] * same + ["cat"] * (10 - same)) == pytest.approx(accuracy)
    assert vqa_accuracy("dog", ["a dog"]) == 1.0


def test_bootstrap_interval():
    values = np.random.default_rng(0).standard_normal(400)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1) and low < values.mean() < high


# ---- networks


@pytest.fixture(scope="module")
def network(networks):
    return lambda name, modality, **options: PretrainedNetwork(str(networks / name), modality, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`(kind, medium) -> path`."""
    folder, numbers = tmp_path_factory.mktemp("media"), itertools.count()

    def write(kind, content, rate=None):
        path = folder / f"{next(numbers)}{MEDIA[kind].suffixes[0]}"
        MEDIA[kind].write(path, content, rate)
        return path

    return write


def items(kind, answers, **options):
    return [Item(row(**{k: {kind: v[i]} for k, v in options.items()}), "", {kind: a}) for i, a in enumerate(answers)]


def test_clip_score_is_that_of_torchmetrics(networks, network, files):
    torchmetrics_score = pytest.importorskip("torchmetrics.functional.multimodal").clip_score
    pictures, captions = [picture(i) for i in range(5)], [f"a red ring {i}" for i in range(5)]

    class Tensors(CLIPModel):  # transformers 5 gives outputs where torchmetrics 1.9 still takes tensors
        def get_image_features(self, *args):
            return super().get_image_features(*args).pooler_output

        def get_text_features(self, *args):
            return super().get_text_features(*args).pooler_output

    model = Tensors.from_pretrained(networks / "clip")
    images = network("clip", "image").processor
    tokenizer = AutoTokenizer.from_pretrained(networks / "clip")

    class Processor:  # transformers' own wants torchvision
        def __call__(self, text=None, images=None, **kwargs):
            if images is not None:
                return self.images([Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images], return_tensors="pt")
            return tokenizer(text, return_tensors="pt", padding=True)

    Processor.images = staticmethod(images)
    tensors = [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures]
    paths, found = [files("image", p) for p in pictures], []
    for words in ("a red ring", "blue", "what is it", "two green squares that move left"):
        captions = [f"{words} {i}" for i in range(5)]
        expected = float(torchmetrics_score(tensors, captions, lambda: (model, Processor())))
        metric = METRICS["clip_score"].make(network("clip", "image"), "image")
        metric.update(Batch(items("image", paths, captions=captions)))
        # torchmetrics gives 0 where the mean is below
        assert max(metric.compute()[""]["value"], 0) == pytest.approx(expected, abs=1e-3)
        found.append(expected)
    assert max(found) > 0


def test_retrieval_is_the_naive_one(networks, network):
    tokenizer = AutoTokenizer.from_pretrained(networks / "bert")
    names = ["a red ring", "blue", "two green squares", "a cross", "what is it", "a red circle", "white"]
    said = ["a red ring", "a blue one", "green squares", "nothing", "what", "a circle that is red", "a red ring"]
    encoder = BertModel.from_pretrained(networks / "bert").eval()

    def of(text):
        with torch.no_grad():
            states = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double()
        return states.mean(0) / states.mean(0).norm()

    known = torch.stack([of(name) for name in names])
    order = [(known @ of(text)).argsort(descending=True).tolist() for text in said]
    metric = METRICS["retrieval"].make(network("bert", "text"), "text")
    for part in (slice(0, 4), slice(4, 7)):
        metric.update(Batch([Item(row([name]), text, {}) for name, text in zip(names[part], said[part], strict=True)]))
    found = metric.compute()
    for k in (1, 5):
        assert found[f"_{k}"]["value"] == pytest.approx(np.mean([i in places[:k] for i, places in enumerate(order)]))
    assert found["_1"]["value"] < found["_5"]["value"]


def test_retrieval_of_media_is_the_naive_one(network, files):
    pictures = [picture(i) for i in range(7)]
    targets = [files("image", one) for one in pictures]
    answers = [files("image", pictures[i].filter(ImageFilter.GaussianBlur(2 * i))) for i in range(7)]
    known, made = (
        torch.cat([network("clip", "image").of_media([read_media("image", one)]) for one in places])
        for places in (targets, answers)
    )
    order = made.double() / made.norm(dim=1, keepdim=True) @ (known / known.norm(dim=1, keepdim=True)).double().T
    order = order.argsort(dim=1, descending=True).tolist()
    metric = METRICS["media_retrieval"].make(network("clip", "image"), "image")
    for part in (slice(0, 4), slice(4, 7)):
        metric.update(Batch(items("image", answers[part], targets=targets[part])))
    found = metric.compute()
    for k in (1, 5):
        assert found[f"_{k}"]["value"] == pytest.approx(np.mean([i in places[:k] for i, places in enumerate(order)]))
    assert 0 < found["_1"]["value"] < 1
    # Answers without a picture are wrong, and their true pictures stay among those that may be found.
    metric = METRICS["media_retrieval"].make(network("clip", "image"), "image")
    asked = items("image", answers, targets=targets)
    metric.update(Batch([Item(one.row, "", one.media if i < 2 else {}) for i, one in enumerate(asked)]))
    found = metric.compute()["_1"]
    assert found["n"] == 7 and found["value"] == np.mean([i == order[i][0] and i < 2 for i in range(7)]) > 0


def score_of(make, kind, answers, size=16, **options):
    metric = make()
    found = items(kind, answers, **options)
    for start in range(0, len(found), size):
        metric.update(Batch(found[start : start + size]))
    return metric.compute()[""]["value"]


def test_similarity_of_pictures_falls_with_blur(network, files):
    pictures = [picture(i, 40) for i in range(4)]
    sources = [files("image", p) for p in pictures]
    for name in ("clip", "dino"):
        make = partial(METRICS["clip_i"].make, network(name, "image"), "image")
        values = []
        for radius in (0, 3, 12):
            answers = [files("image", p.filter(ImageFilter.GaussianBlur(radius))) for p in pictures]
            values.append(score_of(make, "image", answers, sources=sources))
        assert values[0] == pytest.approx(100, abs=1e-3) and values[0] > values[1] > values[2]
        assert score_of(make, "image", answers, size=1, sources=sources) == pytest.approx(values[2], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "kind", "frames"), [("dino", "image", False), ("videomae", "video", False), ("clip", "video", True)]
)
def test_distances_grow_with_noise(name, kind, frames, network, files):
    generator = np.random.default_rng(0)
    originals = [np.asarray(picture(i)) if kind == "image" else clip(i) for i in range(12)]
    write = lambda x: files(kind, Image.fromarray(x) if kind == "image" else x, 8)  # noqa: E731
    targets, values = [write(x) for x in originals], []
    for level in (0, 40, 160):
        noisy = [np.clip(x + level * generator.standard_normal(x.shape), 0, 255).astype(np.uint8) for x in originals]
        metric = base.Frechet(network(name, kind), kind, by_frame=frames)
        metric.update(Batch(items(kind, [write(x) for x in noisy], targets=targets)))
        values.append(metric.compute()[""]["value"])
    assert values[0] == pytest.approx(0, abs=1e-3) and values[0] < values[1] < values[2]


def test_sounds_drift_apart_with_noise(network, files):
    generator = np.random.default_rng(0)
    write = lambda x: files("audio", np.clip(x, -1, 1), 16_000)  # noqa: E731
    originals = [sound(i) for i in range(12)]
    targets, found = [write(x) for x in originals], []
    classifier = network("ast", "audio", classify=True)
    for level in (0, 0.002, 0.02):
        answers = [write(x + level * generator.standard_normal(x.shape)) for x in originals]
        fad = base.Frechet(network("clap", "audio"), "audio")
        fad.update(Batch(items("audio", answers, targets=targets)))
        kl = score_of(partial(METRICS["kl"].make, classifier, "audio"), "audio", answers, targets=targets)
        found.append((fad.compute()[""]["value"], kl))
    for values in zip(*found, strict=True):
        assert values[0] == pytest.approx(0, abs=1e-3) and values[0] < values[1] < values[2]


def test_label_divergence_is_the_formula(network, files):
    classifier = network("ast", "audio", classify=True)
    pair = [files("audio", sound(i), 16_000) for i in (1, 5)]
    p, q = classifier.of_media([read_media("audio", path) for path in pair]).double().softmax(-1)
    found = score_of(partial(METRICS["kl"].make, classifier, "audio"), "audio", [pair[1]], targets=[pair[0]])
    assert found == pytest.approx(float((p * (p / q).log()).sum()))


def test_clap_score_and_long_sounds(network, files):
    """CLAP's extractor takes a random part of a long sound; ours is the same each time."""
    clap = network("clap", "audio")
    sounds = [files("audio", sound(i, 2.5), 16_000) for i in range(3)]
    make = partial(METRICS["clap_score"].make, clap, "audio")
    values = [score_of(make, "audio", sounds, size, captions=["a horn"] * 3) for size in (16, 1)]
    media, texts = clap.of_media([read_media("audio", path) for path in sounds]), clap.of_texts(["a horn"])
    assert values[0] == pytest.approx(100 * float(torch.cosine_similarity(media, texts).mean()), abs=1e-4)
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_clipsim_and_frame_consistency(network, files):
    clips = [clip(i) for i in range(3)]
    paths, captions = [files("video", x, 8) for x in clips], ["a red ring moving left"] * 3
    images = network("clip", "image")
    read = [read_media("video", path).frames for path in paths]
    frames = [images.of_media([Image.fromarray(f) for f in x]) for x in read]
    sims = [100 * torch.cosine_similarity(f, images.of_texts(captions[:1])).mean() for f in frames]
    make = partial(METRICS["clipsim"].make, network("clip", "video"), "video")
    assert score_of(make, "video", paths, captions=captions) == pytest.approx(float(np.mean(sims)), abs=1e-3)
    make = partial(METRICS["frame_consistency"].make, network("clip", "video"), "video")
    steady = score_of(make, "video", paths)
    assert steady == pytest.approx(
        float(np.mean([100 * torch.cosine_similarity(f[1:], f[:-1]).mean() for f in frames])), abs=1e-3
    )
    shuffled = [files("video", np.stack([clip(10 * i + j, 1)[0] for j in range(6)]), 8) for i in range(3)]
    assert score_of(make, "video", shuffled) < steady


def test_networks_that_are_not_there(network, networks, tmp_path):
    with pytest.raises(InputError, match="hf download nobody/nothing"):
        PretrainedNetwork("nobody/nothing", "image")
    with pytest.raises(InputError, match="reads no text"):
        network("dino", "image").of_texts(["a"])


# ---- compositions


def test_prompts_of_compositions():
    wishes = compose(20, seed=0)
    assert wishes == compose(20, seed=0) and wishes != compose(20, seed=1)
    assert len({name for name, _, _ in wishes}) == 20 * len(CATEGORIES)
    for _, text, expected in wishes:
        assert all(thing["name"][:3] in text for thing in expected["things"])
        assert all(thing["colour"] is None or thing["colour"] in text for thing in expected["things"])
        assert (expected["relation"] is None) == (expected["category"] != "position")
        assert (expected["things"][0]["count"] > 1) == (expected["category"] == "counting")


def drawn(expected):
    """A picture as asked, and the boxes that a perfect detector finds."""
    image, found = Image.new("RGB", (100, 100), "grey"), {}
    spots = {"left of": [(5, 40), (70, 40)], "right of": [(70, 40), (5, 40)], "above": [(40, 5), (40, 70)]}
    places = iter(spots.get(expected["relation"], [(40, 70), (40, 5), (5, 5), (70, 70)]))
    for thing in expected["things"]:
        for _ in range(thing["count"]):
            x, y = next(places)
            box = (x, y, x + 20, y + 20)
            image.paste(thing["colour"] or "white", box)
            found.setdefault(thing["name"], []).append(box)
    return image, found


def colour_of(crop, name):
    names = {Image.new("RGB", (1, 1), colour).getpixel((0, 0)): colour for colour in COLOURS}
    return names.get(crop.getpixel((10, 10)), "none")


def test_compositions_are_judged():
    """What was asked is right; one thing fewer, one more where it is counted, or another colour or place is wrong."""
    for _, _, expected in compose(5, seed=0):
        image, found = drawn(expected)
        assert is_composed(expected, found, image, colour_of)
        name = expected["things"][0]["name"]
        assert not is_composed(expected, found | {name: found[name][1:]}, image, colour_of)
        more = found | {name: [*found[name], (0, 0, 5, 5)]}
        assert is_composed(expected, more, image, colour_of) == (expected["category"] != "counting")
        if expected["things"][0]["colour"]:
            assert not is_composed(expected, found, Image.new("RGB", (100, 100), "cyan"), colour_of)
        if expected["relation"]:
            first, second = (thing["name"] for thing in expected["things"])
            swapped = {first: found[second], second: found[first]}
            assert not is_composed(expected, swapped, image, colour_of)


def test_boxes():
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1 and overlap((0, 0, 4, 4), (5, 5, 9, 9)) == 0
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert related((0, 0, 10, 10), (20, 0, 30, 10), "left of") and not related(
        (0, 0, 10, 10), (1, 0, 11, 10), "left of"
    )


def test_composition_score(network, networks, files, monkeypatch):
    """With a detector that finds everything, and CLIP's colours."""
    wishes = [wish for wish in compose(3, seed=0) if wish[2]["category"] in ("two_objects", "counting")]
    perfect = []
    rows = []
    for _, text, expected in wishes:
        image, found = drawn(expected)
        path = files("image", image)
        perfect.append(found)
        rows.append(Item(row(captions={"image": text}, expected=expected), "", {"image": path}))
    monkeypatch.setattr(CompositionScore, "detect", lambda self, image, names: perfect.pop(0))
    metric = CompositionScore(network("clip", "image"), "image", detector=str(networks / "owlvit"))
    metric.update(Batch(rows))
    found = metric.compute()
    assert found[""]["value"] == 1.0 and found["_counting"]["n"] == 3
    assert metric.colour_of(Image.new("RGB", (20, 20), "red"), "cat") in COLOURS


def test_grounding_dino_judges(network, tmp_path):
    """The boxes of its own processor, of each name by itself, without the full stop that it reads after a name."""
    folder = write_grounding_dino(tmp_path / "dino")
    metric = CompositionScore(network("clip", "image"), "image", detector=str(folder), threshold=0.3)
    model, image = metric.detector.model, picture(0, 96)
    found = metric.detect(image, ["cat", "dog"])
    assert set(found) <= {"cat", "dog"} and found
    for name, boxes in found.items():
        inputs = AutoTokenizer.from_pretrained(folder)(f"{name}.", return_tensors="pt")
        pixels = metric.detector.image_processor(images=image, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs, **pixels)
        scores, centres = output.logits[0].sigmoid().amax(-1), output.pred_boxes[0]
        x, y, width, height = (float(value) * 96 for value in centres[scores.argmax()])
        best = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        assert boxes[0] == pytest.approx([min(max(value, 0), 96) for value in best], abs=1)
        assert all(0 <= left < right <= 96 and 0 <= top < bottom <= 96 for left, top, right, bottom in boxes)
