"""Texts of several kinds to measure a curve on, from what every machine with Python has.

A step costs up to three times as much KL on one kind of text as on another, so one kind
promises too much. None of these is in the text that bases are fitted on.
"""

import ast
import importlib.util
import site
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import TemplateError

from kvferry.codec.lab.plan import HeldText
from kvferry.codec.lab.text import read_text
from kvferry.codec.mlx.tokenizer import Tokenizer
from kvferry.errors import ModelError

_CHARS_PER_TOKEN = 8
_PROSE_MODULES = ("difflib", "argparse", "statistics", "fractions", "random", "tarfile")
_CHAT_MODULES = ("shutil", "inspect", "calendar", "bisect", "copy", "zipfile", "imaplib")
_LICENSES = ("LICENSE.txt", "LICENSE")


def held_texts(
    tokenizer: Tokenizer, count: int, source: str, rest: Sequence[int] = ()
) -> list[HeldText]:
    """``count`` tokens of each kind of text that there is enough of.

    Args:
        source: source code, as `kvferry.codec.lab.text.held_text` gives it; may be empty.
        rest: tokens that follow those fitted on; used where they are of a kind that
            nothing else here is, or where nothing else is to be had.
    Raises: ModelError: not one of them is long enough.
    """
    found = []
    for name, text in (("source", source), ("prose", prose())):
        tokens = tokenizer.encode(text[: _CHARS_PER_TOKEN * count])[:count]
        if len(tokens) == count:
            found.append(HeldText(name, tokens))
    tokens = chat(tokenizer, count)
    if len(tokens) == count:
        found.append(HeldText("chat", tokens))
    if len(rest) >= count:
        found.insert(0, HeldText("rest", list(rest[:count])))
    if not found:
        raise ModelError(f"no text of {count:,} tokens to measure a calibration on")
    return found


def prose() -> str:
    """Python's license, then what some of its modules say about themselves."""
    folders = [Path(sys.base_prefix), *(Path(p) for p in site.PREFIXES), *_library()]
    files = [folder / name for folder in folders for name in _LICENSES]
    found = next((read_text(file) for file in files if file.is_file()), "")
    # The license's first half is a history; its terms are one legal text after another.
    parts = [found[: len(found) // 4]]
    for module in _PROSE_MODULES:
        parts.extend(text for _, text in docstrings(module))
    return "\n\n".join(part for part in parts if part)


def chat(tokenizer: Tokenizer, count: int) -> list[int]:
    """Short questions and answers in the model's own chat template, or plainly if it has none."""
    tokens: list[int] = []
    for module in _CHAT_MODULES:
        for name, text in docstrings(module):
            if len(tokens) >= count:
                return tokens[:count]
            question = f"What does {name} of Python's {module} module do?"
            tokens.extend(_turn(tokenizer, question, text))
    return tokens[:count]


def _turn(tokenizer: Tokenizer, question: str, answer: str) -> list[int]:
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            add_generation_prompt=False,
        )
    except (ValueError, TemplateError):  # a base model
        return tokenizer.encode(f"{question}\n\n{answer}\n\n")


def docstrings(module: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of a module's classes and functions, read from its source."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return
    tree = ast.parse(read_text(Path(spec.origin)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = ast.get_docstring(node)
            if text and len(text) > 80:
                yield node.name, text


def _library() -> list[Path]:
    spec = importlib.util.find_spec("ast")
    return [] if spec is None or not spec.origin else [Path(spec.origin).parent]
