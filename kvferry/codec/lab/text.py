"""Text to calibrate with, and text files to measure on."""

from collections.abc import Sequence
from pathlib import Path

from kvferry.codec.mlx.tokenizer import Tokenizer
from kvferry.errors import ModelError

MAX_FILE_BYTES = 256 << 20
DEFAULT_SOURCE = "pydoc_data.topics"
# The demo's prompt begins with this topic: it comes last here, so that what the demo
# measures was not calibrated on.
_LAST_TOPIC = "class"
_CHARS_PER_TOKEN = 8  # more than any tokenizer needs, so that enough text is read


def default_text() -> str:
    """Python's own documentation, on every machine that has Python."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    after = names.index(_LAST_TOPIC) + 4 if _LAST_TOPIC in names else 0
    return "\n\n".join(topics[name] for name in names[after:] + names[:after])


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


def calibration_text(files: Sequence[Path]) -> tuple[str, str]:
    """(text, where it came from). Without files: `default_text`."""
    if not files:
        return default_text(), DEFAULT_SOURCE
    return "\n\n".join(read_text(file) for file in files), ", ".join(f.name for f in files)
