"""Text to calibrate with, and text files to measure on."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvferry.codec.mlx.tokenizer import Tokenizer
from kvferry.errors import ModelError

MAX_FILE_BYTES = 256 << 20
DEFAULT_SOURCE = "pydoc_data.topics and Python's standard library"
# The demo's prompt begins with this topic: it comes last here, so that what the demo
# measures was not calibrated on.
_LAST_TOPIC = "class"
# Two parts of documentation to one of source code: a basis that has seen both takes 15 %
# fewer bytes for code at equal KL than one of documentation alone, and no more for prose.
_CODE_MODULES = ("http.client", "configparser", "optparse", "mailbox", "_pydecimal", "typing")
_DOCS_CHARS, _CODE_CHARS = 8000, 4000
# What a calibration costs is measured on others.
_HELD_MODULES = ("ipaddress", "heapq", "textwrap")
_CHARS_PER_TOKEN = 8  # more than any tokenizer needs, so that enough text is read


def default_text() -> str:
    """Python's own documentation and sources in turn, from any machine that has Python."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    after = names.index(_LAST_TOPIC) + 4 if _LAST_TOPIC in names else 0
    docs = "\n\n".join(topics[name] for name in names[after:] + names[:after])
    code = _sources(_CODE_MODULES)
    rounds = -(-len(docs) // _DOCS_CHARS)
    return in_turn([(docs, _DOCS_CHARS), (code[: rounds * _CODE_CHARS], _CODE_CHARS)])


def held_text() -> str:
    """Source of some standard modules; empty where Python came without sources.

    On the kind of text that the bases were fitted on a step costs three times less than
    elsewhere, so a curve measured there would promise too much.
    """
    return _sources(_HELD_MODULES)


def _sources(modules: Sequence[str]) -> str:
    found = [importlib.util.find_spec(name) for name in modules]
    files = [Path(spec.origin) for spec in found if spec is not None and spec.origin]
    return "\n\n".join(read_text(file) for file in files if file.suffix == ".py")


def read_text(path: Path) -> str:
    """A text file; bytes that are not UTF-8 are replaced. Raises: ModelError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ModelError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as exc:
        raise ModelError(f"{path} cannot be read: {exc.strerror or exc}") from exc


def first_tokens(tokenizer: Tokenizer, text: str, count: int, what: str) -> list[int]:
    """The first ``count`` tokens of ``text``. Raises: ModelError where it has fewer."""
    tokens = tokenizer.encode(text[: _CHARS_PER_TOKEN * count])
    if len(tokens) < count and len(text) > _CHARS_PER_TOKEN * count:
        tokens = tokenizer.encode(text)
    if len(tokens) < count:
        raise ModelError(f"{what} gives {len(tokens):,} tokens where {count:,} are needed")
    return tokens[:count]


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """What to fit on, and where it is from."""

    fitted: str
    source: str

    def first_tokens(self, tokenizer: Tokenizer, count: int) -> list[int]:
        """As `first_tokens`. Raises: ModelError where it has fewer."""
        what = f"the text to calibrate on ({self.source})"
        return first_tokens(tokenizer, self.fitted, count, what)


def calibration_text(files: Sequence[Path], tokens: int) -> CalibrationText:
    """The files' text, in turn a piece of each; without files `default_text`.

    Args: tokens: how many will be fitted on: all files have a share of so many.
    Raises: ModelError: a file that cannot be read.
    """
    if not files:
        return CalibrationText(default_text(), DEFAULT_SOURCE)
    texts = [read_text(file) for file in files]
    size = min(_DOCS_CHARS, max(1, 2 * tokens // len(files)))  # two rounds, four letters a token
    text = texts[0] if len(texts) == 1 else in_turn([(text, size) for text in texts])
    return CalibrationText(text, ", ".join(file.name for file in files))


def in_turn(texts: Sequence[tuple[str, int]]) -> str:
    """All of all texts, of each so many characters in turn while it lasts."""
    rounds = max((-(-len(text) // size) for text, size in texts), default=0)
    pieces = [text[n * size : (n + 1) * size] for n in range(rounds) for text, size in texts]
    return "\n\n".join(piece for piece in pieces if piece)
