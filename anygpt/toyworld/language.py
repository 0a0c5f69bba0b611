"""The sentences of ToyWorld: captions, questions, requests, small talk and refusals.

Every function draws from a `numpy.random.Generator`. Sentences that name a thing take it as an argument, so a
split by things also splits the sentences.
"""

from collections.abc import Sequence
from typing import TypeVar

from numpy.random import Generator

from anygpt.errors import InputError
from anygpt.toyworld.world import COLOURS, MOTIONS, SHAPES, Thing

T = TypeVar("T")

_NOUNS = {
    "image": ("picture", "image", "photo"),
    "video": ("video", "clip", "short film"),
    "audio": ("sound", "recording", "audio"),
}
_SHOWS = {"image": ("shows", "has"), "video": ("shows", "has"), "audio": ("is of", "comes from")}
_HERE = {
    "image": ("Here is the picture:", "It looks like this:", "This is the image:"),
    "video": ("Here is the video:", "It moves like this:", "This is the clip:"),
    "audio": ("Here is the sound:", "It sounds like this:", "This is the recording:"),
}
_QUESTIONS = {
    "image": ("What is in this picture?", "What do you see?", "Describe the image.", "Which shape is this?"),
    "video": ("What happens in this video?", "What moves here?", "Describe the clip.", "What is it doing?"),
    "audio": ("What makes this sound?", "What do you hear?", "Describe the sound.", "Which thing is this?"),
}
_CONVERSIONS = {
    "image": ("What does this look like?", "Show me a picture of this.", "Draw this, please.", "Make an image of it."),
    "video": (
        "Show it moving {motion}.",
        "Make a video of this going {motion}.",
        "Let it move {motion}.",
        "What does it look like when this moves {motion}?",
    ),
    "audio": ("What does this sound like?", "Let me hear this.", "Play its sound.", "Make the sound of this."),
}
_SMALL_TALK = (
    ("Hello!", "Hello! What can I do for you?"),
    ("Hi there.", "Hi! What can I do for you?"),
    ("How are you?", "I am fine, thank you."),
    ("Who are you?", "I am a model that reads and makes text, pictures, videos and sounds."),
    ("What can you do?", "I can describe, draw, film and play shapes."),
    ("Thank you!", "You are welcome."),
    ("Good morning.", "Good morning! What can I do for you?"),
    ("Goodbye.", "Goodbye! See you soon."),
    ("Which shapes do you know?", f"I know the {', the '.join(SHAPES[:-1])} and the {SHAPES[-1]}."),
    ("Which colours do you know?", f"I know {', '.join(COLOURS[:-1])} and {COLOURS[-1]}."),
)
_NONSENSE = (
    "the smell of Tuesday",
    "the weight of a song",
    "a round number's shadow",
    "the taste of seven",
    "yesterday's colour",
    "a silent noise",
    "the edge of nothing",
    "a sleeping question",
)
_NONSENSE_ASKED = ("Show me {x}.", "Draw {x}.", "Play {x}.", "Film {x}.", "Can I see {x}?", "Let me hear {x}.")
REFUSALS = (
    "I cannot do that: there is no such thing.",
    "Sorry, I do not know what that is.",
    "That makes no sense to me.",
    "I cannot make that. Ask me for a shape and a colour.",
)
_LATER_QUESTIONS = {
    "colour": ("What colour is {it}?", "Which colour does {it} have?"),
    "shape": ("What shape is {it}?", "Which shape does {it} have?"),
    "thing": ("What is {it}?", "Say again what {it} is."),
}
_LATER_REQUESTS = {
    "image": ("Draw {it}.", "Show me a picture of {it}.", "What does {it} look like?"),
    "video": ("Film {it} moving {motion}.", "Let {it} move {motion}.", "Make a video of {it} going {motion}."),
    "audio": ("Let me hear {it}.", "Play the sound of {it}.", "What does {it} sound like?"),
}
LATEST, FIRST = "it", "the first one"
"""How a later turn refers to an earlier thing: the latest, or the first of the conversation."""
# Descriptions without the shape's name, for questions that need more than copying.
_IN_OTHER_WORDS = {
    "circle": ("is round and filled", "is a full disc"),
    "square": ("has four equal sides and lies flat", "is a box with four corners"),
    "triangle": ("has three corners", "has three sides"),
    "cross": ("is two bars, one over the other", "looks like a plus sign"),
    "ring": ("is round with a hole in it", "is an empty round band"),
    "diamond": ("has four sides and stands on its tip", "is a box on its point"),
}


def article(noun: str) -> str:
    """The noun phrase with its indefinite article: "a red ring", "an orange ring"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plain_caption(thing: Thing, motion: str | None = None) -> str:
    """The plain caption of a medium, as used by decoders: "a red circle [moving left]"."""
    return f"{article(str(thing))}{f' moving {motion}' if motion else ''}"


def caption(thing: Thing, rng: Generator, motion: str | None = None, modality: str | None = None) -> str:
    """A sentence or phrase that names the thing (and its motion), maybe as what "the picture" of a `modality` shows."""
    what = plain_caption(thing)
    moves = pick(rng, (" moving {m}", " going {m}", " that moves {m}")).format(m=motion) if motion else ""
    forms = ["{what}{moves}", "This is {what}{moves}.", "It is {what}{moves}."]
    if modality is not None:
        noun, verb = pick(rng, _NOUNS[modality]), pick(rng, _SHOWS[modality])
        forms += [f"The {noun} {verb} {{what}}{{moves}}.", f"This {noun} {verb} {{what}}{{moves}}."]
    return pick(rng, forms).format(what=what, moves=moves)


def describe_question(modality: str, rng: Generator) -> str:
    """A question about a given medium, whose answer is a caption."""
    return pick(rng, _QUESTIONS[modality])


def request(
    modality: str,
    rng: Generator,
    motion: str | None = None,
    thing: Thing | None = None,
    it: str | None = None,
) -> str:
    """A request for a medium, moving as `motion` says: of a thing in words, of an earlier one that is called `it`
    (`LATEST` or `FIRST`), or of what is given. Of the last two, one for a video needs a motion."""
    if thing is not None:
        noun, what = article(pick(rng, _NOUNS[modality])), plain_caption(thing, motion)
        ways = {"image": ("Draw {}.",), "video": ("Film {}.",), "audio": ("Let me hear {}.", "Play {}.")}
        return pick(rng, (f"Make {noun} of {{}}.", f"I want {noun} of {{}}.", *ways[modality])).format(what)
    if modality == "video" and motion not in MOTIONS:
        raise InputError(f"a request for a video needs a motion ({', '.join(MOTIONS)}), but it is {motion!r}")
    return pick(rng, (_LATER_REQUESTS if it else _CONVERSIONS)[modality]).format(it=it, motion=motion)


def media_reply(modality: str, thing: Thing, rng: Generator, motion: str | None = None) -> str:
    """The text before a medium in an answer, which describes it: "Here is the picture: a red circle".

    The language model names what it saw or heard right before the signal tokens, so that one map from words serves all
    inputs. There is no trailing space, which a tokenizer would make a separate token.
    """
    return f"{pick(rng, _HERE[modality])} {plain_caption(thing, motion)}"


def text_qa(thing: Thing, rng: Generator) -> tuple[str, str]:
    """A question about a thing described in words, and its answer."""
    given = pick(rng, ("There is {what}. ", "I have {what}. ", "Think of {what}. ")).format(what=plain_caption(thing))
    riddle = f"Something {thing.colour} {pick(rng, _IN_OTHER_WORDS[thing.shape])}. "
    kind = pick(rng, ("colour", "shape", "yes or no", "riddle"))
    if kind == "colour":
        question = pick(rng, ("What colour is it?", "Which colour does it have?"))
        return given + question, pick(rng, ("It is {c}.", "Its colour is {c}.")).format(c=thing.colour)
    if kind == "shape":
        question = pick(rng, ("What shape is it?", "Which shape does it have?"))
        return given + question, pick(rng, ("It is {s}.", "Its shape is {s}.")).format(s=article(thing.shape))
    if kind == "riddle":
        question = pick(rng, ("What is it?", "Which thing is that?"))
        return riddle + question, f"It is {plain_caption(thing)}."
    asked = pick(rng, (thing.shape, pick(rng, SHAPES)))  # slightly more than half of the answers are "yes"
    answer = f"Yes, it is {article(asked)}." if asked == thing.shape else f"No, it is {article(thing.shape)}."
    return f"{given}Is it {article(asked)}?", answer


def later_question(it: str, thing: Thing, rng: Generator) -> tuple[str, str]:
    """A question about an earlier thing, called `it` (`LATEST` or `FIRST`), and its answer."""
    kind = pick(rng, tuple(_LATER_QUESTIONS))
    answer = {"colour": thing.colour, "shape": article(thing.shape), "thing": plain_caption(thing)}[kind]
    return pick(rng, _LATER_QUESTIONS[kind]).format(it=it), f"{it[0].upper()}{it[1:]} is {answer}."


def small_talk(rng: Generator) -> tuple[str, str]:
    """A line of small talk and its answer."""
    return pick(rng, _SMALL_TALK)


def refusal(rng: Generator) -> tuple[str, str]:
    """A request for something that does not exist, and a refusal."""
    return pick(rng, _NONSENSE_ASKED).format(x=pick(rng, _NONSENSE)), pick(rng, REFUSALS)


def pick(rng: Generator, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]
