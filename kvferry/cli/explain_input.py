"""What `kvferry explain` is asked about: a model by name, a prompt from a file."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from kvferry.codec.mlx.load import LoadedModel
    from kvferry.codec.state_parts import StateLayout
    from kvferry.node.coding import Shard

MAX_PROMPT_BYTES = 64 << 20
_FORMS = 'text, token ids, or chat messages as JSON ([{"role": ..., "content": ...}])'


@dataclass(frozen=True, slots=True)
class Asked:
    """A model's identity and shape, and the tokens of a prompt."""

    shard: "Shard"
    layout: "StateLayout"
    tokens: Sequence[int]


def asked(model: str, prompt: str, *, chat: bool) -> Asked:
    """Read the prompt as the model's tokenizer does.

    Only one layer's weights are loaded; the digests of the others come from their files, or
    from the last time.

    Args:
        prompt: a file, ``-`` for standard input: text, or JSON with token ids or messages.
        chat: text is what a user says, and goes through the model's chat template.
    Raises: ModelError; ConfigError: a prompt that cannot be read.
    """
    if find_spec("mlx") is None:
        reason = "the model's tokenizer and weights are read with mlx, which is not installed here"
        raise ModelError(f"{reason}: pip install 'kvferry[mlx]'")
    from kvferry.codec.mlx.load import load_model
    from kvferry.codec.mlx.weights import fingerprint
    from kvferry.node.hooks.part import Part
    from kvferry.places import user_dir
    from kvferry.proto.identity import model_id

    text = read_prompt(prompt)
    loaded = load_model(model, layers=(0, 1))
    part = Part.of(loaded)
    digests = fingerprint(part.loaded, part.layers, cache_dir=user_dir("cache"))
    shard = part.shard(model_id(digests))
    return Asked(shard, part.layout, tokens_of(loaded, text, chat=chat))


def read_prompt(source: str) -> str:
    """Raises: ConfigError: no file, too large, or not text."""
    try:
        if source == "-":
            data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        else:
            with Path(source).open("rb") as file:
                data = file.read(MAX_PROMPT_BYTES + 1)
        if len(data) > MAX_PROMPT_BYTES:
            raise ConfigError("prompt", source, f"of at most {MAX_PROMPT_BYTES >> 20} MiB")
        return data.decode()
    except OSError as exc:
        raise ConfigError("prompt", source, f"a file that can be read ({exc.strerror})") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError("prompt", source, "UTF-8 text") from exc


def tokens_of(loaded: "LoadedModel", text: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt. Raises: ConfigError."""
    value = _json(text)
    if isinstance(value, dict):  # a request of the OpenAI API
        value = value.get("messages")
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        return _checked(loaded, value)
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return _templated(loaded, value)
    if value is not None:
        raise ConfigError("prompt", text[:40], _FORMS)
    if chat:
        return _templated(loaded, [{"role": "user", "content": text}])
    return loaded.tokenizer.encode(text)


def _json(text: str) -> Any:
    """A JSON list or object; None: this is plain text."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _checked(loaded: "LoadedModel", ids: list[int]) -> list[int]:
    most = int(loaded.config.get("vocab_size") or 1 << 32)
    wrong = next((i for i in ids if not 0 <= i < most), None)
    if wrong is not None:
        raise ConfigError("token id", wrong, f"of this model: 0 to {most - 1:,}")
    return ids


def _templated(loaded: "LoadedModel", messages: list[Any]) -> list[int]:
    from jinja2 import TemplateError

    try:
        return loaded.tokenizer.apply_chat_template(messages)
    except (ValueError, TypeError, KeyError, TemplateError) as exc:
        first = str(exc).partition(". ")[0]
        allowed = f"a conversation that the model's template takes ({first})"
        raise ConfigError("prompt", "messages", allowed) from exc
