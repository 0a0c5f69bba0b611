"""Answers in words beside what people said: captions by pycocoevalcap, questions by VQA's rules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from pycocoevalcap.bleu.bleu import Bleu

from anygpt.evaluation.metrics.base import Batch, Mean, Metric, Value, mean_value

_CLITICS = re.compile(r"(n't|'(?:s|m|re|ve|ll|d))(?!\w)")
_WORDS = re.compile(r"n't|'(?:s|m|re|ve|ll|d)(?!\w)|\d+(?:[.,]\d+)+|\w+(?:[-/]\w+)*|[^\w\s]")
_DROPPED = set("'\"`()[]{}.?!,:;-–—…“”‘’")


def words_of(text: str) -> str:
    """Lower-case words, spaces between them, as papers on captions count them.

    Follows the Penn Treebank, with punctuation left out: `doesn't` is two words, `t-shirt` is one. It stands for the
    Java tokenizer that pycocoevalcap comes with, and agrees with it on plain captions.
    """
    spaced = _CLITICS.sub(r" \1", text.lower())
    return " ".join(word for word in _WORDS.findall(spaced) if word not in _DROPPED)


class CaptionMetric(Metric):
    """BLEU-1 to 4 (a value of the corpus), ROUGE-L or CIDEr-D (means), over all answers and their references.

    The words of all answers are kept: CIDEr-D weighs them by how many rows use them.
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
        return {"": mean_value(scorer.compute_score(self.references, self.answers)[1])}


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
    """An answer as VQA's evaluation compares it (arXiv 1505.00468).

    Lower case; punctuation goes, or becomes a space between two words; numbers as digits; no articles; contractions
    with their apostrophes.
    """
    text = " ".join(text.split())
    tight = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if tight or f"{mark} " in text or f" {mark}" in text else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = (_DIGITS.get(word, word) for word in out.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """min(people who said it / 3, 1), as a mean over all choices of all people but one; a single one is compared."""
    answer, said = normalize_answer(answer), [normalize_answer(one) for one in references]
    same = said.count(answer)
    if len(said) == 1:
        return float(same)
    return sum(min((same - (one == answer)) / 3, 1.0) for one in said) / len(said)


class VqaAccuracy(Mean):
    """`vqa_accuracy` of each answer."""

    def score(self, batch: Batch) -> list[float]:
        return [vqa_accuracy(item.text, item.row.references) for item in batch.items]


class ExactMatch(Mean):
    """1 where an answer is one of the references, both normalised."""

    def score(self, batch: Batch) -> list[float]:
        pairs = [(item.text, item.row.references) for item in batch.items]
        return [float(normalize_answer(said) in map(normalize_answer, right)) for said, right in pairs]
