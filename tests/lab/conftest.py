"""A small random llama for what needs any model, and the command as a user runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.models.cache import make_prompt_cache
from tiny_llama import sharp_llama

from kvferry.codec.calibration import GroupAccumulator, GroupCalibration, fit_group
from kvferry.codec.lab.fisher import Fisher
from kvferry.codec.lab.forward import prefill
from kvferry.codec.lab.text import read_text
from kvferry.codec.mlx.adapters import snapshot
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.openblas import model_environment
from kvferry.codec.mlx.rope import rope_specs
from kvferry.codec.mlx.tokenizer import Message

VOCABULARY = 97


class Words:
    """A tokenizer of one token per character."""

    eos_token_ids = frozenset({0})

    def encode(self, text: str) -> list[int]:
        return [ord(c) % VOCABULARY for c in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token) for token in tokens)

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        return self.encode("".join(message["content"] for message in messages))


@pytest.fixture(scope="session")
def tiny() -> LoadedModel:
    """See `sharp_llama`."""
    model, config = sharp_llama(VOCABULARY)
    return LoadedModel("tiny", model, Words(), config, (), (), (0, 3))


@pytest.fixture(scope="session")
def text() -> list[int]:
    """All source of these tests: enough to calibrate on."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return Words().encode("".join(map(read_text, files)))


@pytest.fixture
def tokens() -> list[int]:
    """Text that repeats itself now and then, as text does."""
    return Words().encode(read_text(Path(__file__).parents[2] / "LICENSE"))


@pytest.fixture
def filled(tiny: LoadedModel) -> Callable[[list[int]], list[Any]]:
    def fill(tokens: list[int]) -> list[Any]:
        cache = make_prompt_cache(tiny.model)
        prefill(tiny.model, tokens, cache)
        return list(cache)

    return fill


@pytest.fixture(scope="session")
def fitted(tiny: LoadedModel) -> list[GroupCalibration]:
    """Fisher-weighted calibration of the small model, from this file's own text."""
    words = Words().encode(Path(__file__).read_text())
    ropes = {"k": tuple(rope_specs(tiny.model))}
    seen = GroupAccumulator(model_id=bytes(range(32)), layers=(0, 3), heads=(0, 2), ropes=ropes)
    fisher = Fisher(ropes)
    for start in range(0, 2048, 512):
        cache = make_prompt_cache(tiny.model)
        prefill(tiny.model, words[start : start + 512], cache)
        seen.add(snapshot(cache, 512).page((0, 3), (0, 512)))
        fisher.add(tiny.model, cache, words[start + 512 : start + 576])
    return [fit_group(seen, weights=fisher.weights((0, 3), 1.0), source="tests")]


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def kvferry() -> Command:
    """Run the command; OpenBLAS included."""

    def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "kvferry", *map(str, arguments)],
            env=dict(os.environ) | model_environment(),
            capture_output=True,
            text=True,
            timeout=280,
        )

    return run


@pytest.fixture
def ok(kvferry: Command) -> Callable[..., dict[str, Any]]:
    """Run a command with ``--json -`` that must succeed; its object."""

    def run(*arguments: str | Path) -> dict[str, Any]:
        done = kvferry(*arguments, "--json", "-")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run
