"""Text to calibrate with, and text files to measure on."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvferry.codec.mlx.tokenizer import Tokenizer
from kvferry.errors import ModelError

MAX_FILE_BYTES = 256 << 20
DEFAULT_SOURCE = "pydoc_data.topics"
# The demo's prompt begins with this topic: it comes last here, so that what the demo
# measures was not calibrated on.
_LAST_TOPIC = "class"
# Another kind of text than the documentation: what calibration costs is measured there.
_HELD_MODULES = ("ipaddress", "heapq", "textwrap")
_CHARS_PER_TOKEN = 8  # more than any tokenizer needs, so that enough text is read


def default_text() -> str:
    """Python's own documentation, on every machine that has Python."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    after = names.index(_LAST_TOPIC) + 4 if _LAST_TOPIC in names else 0
    return "\n\n".join(topics[name] for name in names[after:] + names[:after])


def held_text() -> str:
    """Source of some standard modules; empty where Python came without sources.

    On the kind of text that the bases were fitted on a step costs three times less than
    elsewhere, so a curve measured there would promise too much.
    """
    found = [importlib.util.find_spec(name) for name in _HELD_MODULES]
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
    """What to fit on, what to measure on afterwards (may be empty), and where from."""

    fitted: str
    held: str
    source: str


def calibration_text(files: Sequence[Path]) -> CalibrationText:
    """The files' text; without files `default_text`, measured on `held_text`."""
    if not files:
        return CalibrationText(default_text(), held_text(), DEFAULT_SOURCE)
    text = "\n\n".join(read_text(file) for file in files)
    return CalibrationText(text, "", ", ".join(file.name for file in files))


def calibration_tokens(
    tokenizer: Tokenizer, text: CalibrationText, fitted: int, held: int
) -> list[int]:
    """``fitted`` tokens to fit on, then ``held`` ones to measure on.

    The latter come from ``text.held`` where that is long enough, else from what
    follows the former. Raises: ModelError: too little text.
    """
    apart = tokenizer.encode(text.held[: _CHARS_PER_TOKEN * held])[:held]
    what = f"the text to calibrate on ({text.source})"
    if len(apart) == held:
        return first_tokens(tokenizer, text.fitted, fitted, what) + apart
    return first_tokens(tokenizer, text.fitted, fitted + held, what)
