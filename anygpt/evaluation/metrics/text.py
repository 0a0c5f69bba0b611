"""Metrics of text answers: captions with pycocoevalcap, questions by VQA's rules."""

import re
import unicodedata
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from torch import Tensor

from anygpt.evaluation.metrics.base import Batch, Metric, Value, mean_value

_CLITICS = re.compile(r"(n't|'(?:s|m|re|ve|ll|d))(?!\w)")
# combining marks, and the joiners beside them: parts of words that `\w` lacks
_MARKS = "\u200c\u200d" + "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] == "M")
_WORD = rf"\w[\w{_MARKS}]*"
_WORDS = re.compile(rf"n't|'(?:s|m|re|ve|ll|d)(?!\w)|\d+(?:[.,]\d+)+|{_WORD}(?:[-/]{_WORD})*|[^\w\s]")
_DROPPED = set("'\"`()[]{}.?!,:;-–—…“”‘’")


def _plain(text: str) -> str:
    """Composed characters, and typewriter apostrophes."""
    return unicodedata.normalize("NFC", text).replace("’", "'")


def words_of(text: str) -> str:
    """Lower-case words separated by spaces, tokenized as in the Penn Treebank, without punctuation beside words.

    `doesn't` is two words, `t-shirt` one. On plain captions it agrees with pycocoevalcap's Java tokenizer.
    """
    spaced = _CLITICS.sub(r" \1", _plain(text).lower())
    return " ".join(word for word in _WORDS.findall(spaced) if word not in _DROPPED) or text.strip()


class CaptionMetric(Metric):
    """BLEU-1 to 4 (corpus level), ROUGE-L or CIDEr-D (means) over all answers and their references.

    Keeps the words of all answers, since CIDEr-D weights them by document frequency.
    """

    def __init__(self, *arguments: Any, scorer: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.scorer = scorer
        self.answers: dict[int, list[str]] = {}
        self.references: dict[int, list[str]] = {}

    def update(self, batch: Batch) -> None:
        for number, item in enumerate(batch.items, len(self.answers)):
            self.answers[number] = [words_of(item.text)]
            self.references[number] = [words_of(said) for said in item.row.references]

    def compute(self) -> dict[str, Value]:
        scorer = self.scorer()
        if isinstance(scorer, Bleu):
            found, _ = scorer.compute_score(self.references, self.answers, verbose=0)
            return {f"_{n}": {"value": float(x), "n": len(self.answers)} for n, x in enumerate(found, 1)}
        if isinstance(scorer, Cider) and len({frozenset(said) for said in self.references.values()}) == 1:
            note = "CIDEr weights words by the rows whose references lack them, and all rows have the same references"
            return {"": {"value": None, "n": len(self.answers), "note": note}}
        return {"": mean_value(scorer.compute_score(self.references, self.answers)[1])}


class Retrieval(Metric):
    """R@1 and R@5: how often what is right is among the 1 or 5 closest to the answer, by cosine of a network's
    features, out of what is right in all rows: a row's first reference, or its true medium. An answer without the
    medium is wrong, and so is one that is as close to something else.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.answers: list[Tensor] = []
        self.references: dict[str, Tensor] = {}
        self.right: list[str] = []

    def update(self, batch: Batch) -> None:
        right = [str(item.find("target", self.modality)) for item in batch.items]
        features = self.features(batch, "target")
        made = [i for i, item in enumerate(batch.items) if item.find("answer", self.modality) is not None]
        answers = torch.full_like(features, torch.nan)
        if made:
            answers[made] = self.features(Batch([batch.items[i] for i in made]), "answer").to(features)
        self.answers.append(answers)
        self.references |= dict(zip(right, features, strict=True))
        self.right += right

    def compute(self) -> dict[str, Value]:
        names = list(self.references)
        known = F.normalize(torch.stack(list(self.references.values())), dim=-1)
        scores = F.normalize(torch.cat(self.answers), dim=-1) @ known.T
        own = scores.gather(1, torch.tensor([names.index(name) for name in self.right], device=scores.device)[:, None])
        closer = (~(scores < own)).sum(1) - 1  # of NaN, all are
        return {f"_{k}": mean_value((closer < k).tolist()) for k in (1, 5)}


# ------------------------------------------------------------------------------------------------------------ questions

_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't ow's'at 'twas shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_APOSTROPHES = {
    short: word
    for word in _CONTRACTIONS.split()
    for short in chain([word.replace("'", "")], (word[: m.start()] + word[m.end() :] for m in re.finditer("'", word)))
}
_NUMBERS = ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = dict(zip(_NUMBERS, ["0", *map(str, range(11))], strict=True))
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalize_answer(text: str) -> str:
    """Normalize an answer as VQA's evaluation does (arXiv 1505.00468).

    Lower case, numbers as digits, no articles, contractions with apostrophes, punctuation removed or made a space;
    articles or punctuation alone are kept, since nothing would be left to compare.
    """
    text = " ".join(_plain(text).split())
    tight = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if tight or f"{mark} " in text or f" {mark}" in text else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [_APOSTROPHES.get(word, word) for word in (_DIGITS.get(word, word) for word in out.lower().split())]
    return " ".join([word for word in words if word not in _ARTICLES] or words) or text


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Mean of min(matching annotators / 3, 1) over all leave-one-out subsets; plain equality for one annotator."""
    answer, said = normalize_answer(answer), [normalize_answer(one) for one in references]
    same = said.count(answer)
    if len(said) == 1:
        return float(same)
    return sum(min((same - (one == answer)) / 3, 1.0) for one in said) / len(said)


def vqa_accuracies(metric: Metric, batch: Batch) -> list[float]:
    return [vqa_accuracy(item.text, item.row.references) for item in batch.items]


def exact_matches(metric: Metric, batch: Batch) -> list[float]:
    """Whether each answer equals one of its references, both normalized."""
    pairs = [(item.text, item.row.references) for item in batch.items]
    return [float(normalize_answer(said) in map(normalize_answer, right)) for said, right in pairs]
