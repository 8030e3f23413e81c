"""Texts by name: some that every Python brings along, and files."""

from collections.abc import Sequence
from pathlib import Path

from kvferry.codec.lab.held import chat, prose
from kvferry.codec.lab.text import first_tokens, held_text, read_text
from kvferry.codec.mlx.tokenizer import Tokenizer
from kvferry.errors import ConfigError

BUILT_IN = ("prose", "source", "chat")


def check_text(name: str, folder: Path, where: str) -> None:
    """Raises: ConfigError: neither built in nor a file."""
    if name not in BUILT_IN and not (folder / name).is_file():
        allowed = f"{', '.join(BUILT_IN)}, or a file beside the TOML"
        raise ConfigError(f"{where}: texts", name, allowed)


def tokens_of(name: str, folder: Path, tokenizer: Tokenizer, count: int) -> Sequence[int]:
    """The first ``count`` tokens of a text.

    Args:
        folder: what names of files are relative to.
    Raises: ModelError: it has fewer, or cannot be read.
    """
    if name == "chat":
        tokens = chat(tokenizer, count)
        return tokens if len(tokens) == count else first_tokens(tokenizer, "", count, name)
    return first_tokens(tokenizer, content_of(name, folder), count, name)


def second_half(name: str, folder: Path) -> str:
    """What of a text is calibrated on: not what is measured on. Raises: ModelError."""
    content = content_of(name, folder)
    return content[len(content) // 2 :]


def content_of(name: str, folder: Path) -> str:
    """A text as text; ``chat`` exists only as tokens. Raises: ModelError."""
    if name == "prose":
        return prose()
    if name == "source":
        return held_text()
    return read_text(folder / name)
