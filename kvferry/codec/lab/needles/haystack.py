"""Texts with passkeys hidden in them, where no codec keeps anything exact.

A needle lies wholly behind the sinks and before the window: what is stored exactly
anyway would say nothing about a codec.

Source: the passkey of Mohtashami and Jaggi (arXiv 2305.16300, section 4.2), several of
them told apart by a name as in RULER (arXiv 2404.06654, section 3.1).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.codec.lab.chat_frame import chat_frame, plain
from kvferry.codec.mlx.tokenizer import Tokenizer
from kvferry.errors import ConfigError
from kvferry.proto.keys import SINK_TOKENS, WINDOW_TOKENS

KEY_DIGITS = 5
# Words that a text rarely uses before "gate": of a bare "pass key" a model prefers to
# say what the text around it is about.
NAMES = ("willow", "copper", "violet", "marble", "silver", "amber", "cedar", "ivory")
TASK = "Somewhere in the following text the pass keys of some gates are given.\n\n"
NEEDLE = "\nThe pass key of the {name} gate is {key}.\n"
QUESTION = "\n\nWhat is the pass key of the {name} gate?"
ANSWER = "The pass key of the {name} gate is"


@dataclass(frozen=True, slots=True)
class Needle:
    """One sentence in a haystack.

    Attributes:
        depth: 0: as far from the question as can be, 1: as near as can be.
        span: positions of its tokens, half-open.
    """

    name: str
    key: str
    depth: float
    span: tuple[int, int]

    @property
    def sentence(self) -> str:
        """As it stands in the text."""
        return NEEDLE.format(name=self.name, key=self.key)


@dataclass(frozen=True, slots=True)
class Haystack:
    """A user's message up to its question.

    Attributes:
        tokens: the conversation's opening, the task, text and needles.
        needles: in order of their places.
        asked: tokens between the question and the answer.
    """

    tokens: Sequence[int]
    needles: Sequence[Needle]
    asked: Sequence[int]
    seed: int

    @property
    def coded(self) -> int:
        """Tokens that codecs see; the window behind them is stored as it always is."""
        return len(self.tokens) - WINDOW_TOKENS


@dataclass(frozen=True, slots=True)
class Question:
    """What follows a haystack.

    Attributes:
        asked: tokens of the question and of the answer's beginning.
        answer: tokens of the key.
    """

    needle: Needle
    asked: Sequence[int]
    answer: Sequence[int]


def make_haystack(
    tokenizer: Tokenizer, filler: Sequence[int], length: int, depths: Sequence[float], seed: int
) -> Haystack:
    """Same arguments, same haystack.

    Args:
        filler: tokens of ordinary text; where it is read from depends on the seed.
        length: tokens in all, the window's included.
        depths: one needle each, 0 to 1 of the places where a needle may stand.
    Raises: ConfigError: it is too short for its needles, or the filler for it.
    """
    if not depths or len(depths) > len(NAMES) or not all(0 <= d <= 1 for d in depths):
        raise ConfigError("depths", list(depths), f"1 to {len(NAMES)} numbers from 0 to 1")
    draw = random.Random(f"kvferry/needles/{length}/{seed}/{sorted(depths)}")  # noqa: S311
    frame = chat_frame(tokenizer)
    front = [*frame.opening, *plain(tokenizer, TASK)]
    names = draw.sample(NAMES, len(depths))
    keys = _keys(draw, len(depths))
    sentences = [
        plain(tokenizer, NEEDLE.format(name=n, key=k)) for n, k in zip(names, keys, strict=True)
    ]
    text = _filler(draw, filler, length - len(front) - sum(map(len, sentences)), length)
    # Places are counted in filler tokens: each needle stands before one of them.
    first = max(0, SINK_TOKENS - len(front))
    last = len(text) - WINDOW_TOKENS
    if last < first:
        raise ConfigError("length", length, f"room for {len(depths)} needles before the window")
    tokens, needles, done = list(front), [], 0
    order = sorted(range(len(depths)), key=lambda i: depths[i])
    for index in order:
        at = first + round(depths[index] * (last - first))
        tokens += text[done:at]
        span = (len(tokens), len(tokens) + len(sentences[index]))
        tokens += sentences[index]
        needles.append(Needle(names[index], keys[index], depths[index], span))
        done = at
    return Haystack([*tokens, *text[done:]], needles, frame.asked, seed)


def question(tokenizer: Tokenizer, haystack: Haystack, needle: Needle) -> Question:
    """The question after one needle of a haystack, its answer begun.

    Without a beginning a small model opens with whatever it likes; the key must come
    first if it is to be compared letter by letter.
    """
    asked = plain(tokenizer, QUESTION.format(name=needle.name))
    begun = ANSWER.format(name=needle.name)
    # Cut where the key begins, as the tokens of the whole sentence have it.
    start, whole = plain(tokenizer, begun), plain(tokenizer, f"{begun} {needle.key}")
    same = next(
        (i for i, pair in enumerate(zip(start, whole, strict=False)) if len({*pair}) > 1),
        len(start),
    )
    return Question(needle, [*asked, *haystack.asked, *whole[:same]], whole[same:])


def _keys(draw: random.Random, count: int) -> list[str]:
    """All different, so that no needle answers for another."""
    low = 10 ** (KEY_DIGITS - 1)
    return [str(key) for key in draw.sample(range(low, 10 * low), count)]


def _filler(draw: random.Random, filler: Sequence[int], count: int, length: int) -> list[int]:
    if count < WINDOW_TOKENS:
        raise ConfigError("length", length, f"more than {length - count + WINDOW_TOKENS} tokens")
    if len(filler) < count:
        raise ConfigError("length", length, f"at most what {len(filler)} tokens of text allow")
    start = draw.randrange(len(filler) - count + 1)
    return list(filler[start : start + count])
