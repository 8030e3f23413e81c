"""Rules that an answer keeps or not, without a judge.

Source: rule-based scoring as of IFEval (arXiv 2311.07911, section 2).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvferry.errors import ConfigError

# Words that hardly a sentence of a language does without, and that the others lack.
_COMMON_WORDS: Mapping[str, str] = {
    "en": "the is are and of to you it that with for this",
    "fr": "le la les est et une des du vous il elle que dans pour",
    "de": "der die das ist und ein eine nicht sie ich mit von",
    "es": "el los las es y una del usted que con por para",
}
FORMATS = ("json", "list", "lowercase", "number", "uppercase")


@dataclass(frozen=True, slots=True)
class Rule:
    """One of `KINDS` and what it is held against: a text, texts or a number of words."""

    kind: str
    value: str | int | tuple[str, ...]

    def kept(self, answer: str) -> bool:
        """Whether an answer keeps it. Letter case matters to formats only."""
        return KINDS[self.kind](answer.strip(), self.value)

    def to_json(self) -> dict[str, object]:
        """As the examples' file has it."""
        value = list(self.value) if isinstance(self.value, tuple) else self.value
        return {self.kind: value}


def make_rule(where: str, given: object) -> Rule:
    """``{kind: value}`` of a JSON file. Raises: ConfigError, one line that names ``where``."""
    if not isinstance(given, Mapping) or len(given) != 1:
        raise ConfigError(where, given, f"one of {', '.join(KINDS)} with its value")
    kind, value = next(iter(given.items()))
    if kind in ("max_words", "min_words"):
        good = type(value) is int and value > 0
    elif kind == "any_of":
        good = isinstance(value, Sequence) and not isinstance(value, str) and bool(value)
        good = good and all(isinstance(text, str) and text for text in value)
    elif kind == "format":
        good = value in FORMATS
    elif kind == "language":
        good = value in _COMMON_WORDS
    else:
        good = kind in KINDS and isinstance(value, str) and bool(value)
    if not good:
        raise ConfigError(f"{where}: {kind}", value, f"a value of {', '.join(KINDS)}")
    return Rule(str(kind), tuple(value) if kind == "any_of" else value)


def has(answer: str, text: str) -> bool:
    """Whether ``text`` stands in an answer where a word begins, whatever its letters' case.

    A number must end where ``text`` ends; a word need not, so that plurals count.
    """
    end = r"(?!\d)" if text[-1:].isdigit() else ""
    return re.search(rf"(?<!\w){re.escape(text)}{end}", answer, re.IGNORECASE) is not None


def language_of(answer: str) -> str:
    """The language that most of the answer's common words are of; empty: none is ahead."""
    words = re.findall(r"[^\W\d_]+", answer.lower())
    counts = {n: sum(word in own.split() for word in words) for n, own in _COMMON_WORDS.items()}
    best = max(counts.values())
    ahead = [name for name, count in counts.items() if count == best]
    return ahead[0] if best and len(ahead) == 1 else ""


def _formatted(answer: str, kind: object) -> bool:
    if kind == "json":
        try:
            return isinstance(json.loads(answer), dict | list)
        except ValueError:
            return False
    if kind == "list":
        lines = [line.strip() for line in answer.splitlines() if line.strip()]
        return sum(line.startswith(("- ", "* ", "• ")) for line in lines) >= 2
    if kind == "number":
        return re.fullmatch(r"[-+]?\d[\d.,]*\.?", answer) is not None
    letters = "".join(c for c in answer if c.isalpha())
    return bool(letters) and (letters.isupper() if kind == "uppercase" else letters.islower())


def _bare(text: str) -> str:
    return text.strip().strip("\"'`*.!?,:; ").casefold()


def _words(answer: str) -> int:
    return len(answer.split())


KINDS: Mapping[str, Callable[[str, object], bool]] = {
    "contains": lambda answer, value: has(answer, str(value)),
    "excludes": lambda answer, value: not has(answer, str(value)),
    "any_of": lambda answer, value: any(has(answer, t) for t in _texts(value)),
    "starts_with": lambda answer, value: _bare(answer).startswith(_bare(str(value))),
    "ends_with": lambda answer, value: _bare(answer).endswith(_bare(str(value))),
    "max_words": lambda answer, value: 0 < _words(answer) <= int(str(value)),
    "min_words": lambda answer, value: _words(answer) >= int(str(value)),
    "format": _formatted,
    "language": lambda answer, value: language_of(answer) == value,
}


def _texts(value: object) -> Sequence[str]:
    return value if isinstance(value, tuple) else (str(value),)
