"""What a model's chat template puts around what is said, as tokens.

A conversation whose cache is kept cannot be rendered anew each turn: the tokens of what
the model said itself must stay as they are. So the template is asked once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from kvferry.codec.mlx.tokenizer import Message, Tokenizer

# Words that no template contains and that tokenizers cut the same after any line break.
_FIRST, _ANSWER, _SECOND = "Zebra", "Quartz", "Walrus"


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """Tokens between the parts of a conversation.

    Attributes:
        opening: before the first thing a user says.
        asked: between what a user says and the answer.
        answered: between an answer and what the user says next.
    """

    opening: Sequence[int]
    asked: Sequence[int]
    answered: Sequence[int]


def chat_frame(tokenizer: Tokenizer, system: str = "") -> ChatFrame:
    """Of the model's chat template; line breaks where it has none that can be taken apart.

    Args:
        system: first message, where the template knows one; empty: the template's own.
    """
    said = [
        {"role": "user", "content": _FIRST},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _SECOND},
    ]
    front = [{"role": "system", "content": system}] if system else []
    rendered = _rendered(tokenizer, [*front, *said])
    parts = _between(rendered, [plain(tokenizer, w) for w in (_FIRST, _ANSWER, _SECOND)])
    if parts is None:
        first = f"{system}\n\n" if system else ""
        opening = [*tokenizer.encode(""), *plain(tokenizer, first)]
        return ChatFrame(opening, plain(tokenizer, "\n"), plain(tokenizer, "\n\n"))
    opening, asked, answered, last = parts
    # Some templates treat an earlier answer otherwise than the one to come.
    return ChatFrame(opening, last or asked, answered)


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of text in the middle of something: without what `encode` puts in front."""
    return tokenizer.encode(text)[len(tokenizer.encode("")) :]


def _rendered(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    except (ValueError, TemplateError):  # a base model
        return []


def _between(tokens: Sequence[int], words: Sequence[Sequence[int]]) -> list[list[int]] | None:
    """What stands before, between and behind the words; None: not all are there in order."""
    parts, start = [], 0
    for word in words:
        width = len(word)
        places = range(start, len(tokens) - width + 1)
        at = next((i for i in places if list(tokens[i : i + width]) == list(word)), None)
        if at is None or not width:
            return None
        parts.append(list(tokens[start:at]))
        start = at + width
    return [*parts, list(tokens[start:])]
