"""`kvferry serve` as a process of its own, and the openai client that talks to it."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import mlx_lm
from openai import OpenAI

from kvferry.cli.cluster_bench.ports import free_port

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


def has_argument(name: str) -> bool:
    """Whether the mlx-lm that is served with has it; releases differ."""
    other = os.environ.get("KVFERRY_TEST_MLX_LM")
    folder = Path(other) / "mlx_lm" if other else Path(str(mlx_lm.__path__[0]))
    return f'"{name}"' in (folder / "server.py").read_text()


@dataclass(frozen=True)
class Answer:
    """What a client got: text, usage, and when the first piece of text came."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    first_s: float
    finish_reason: str


class Server:
    """A running `kvferry serve`; ``KVFERRY_TEST_MLX_LM`` names another mlx-lm to serve with.

    ``prelude`` is Python that runs first, in the server's process.
    """

    def __init__(
        self,
        folder: Path,
        node: Path,
        *arguments: str,
        model: str = "smollm2",
        prelude: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.log = folder / f"serve-{self.port}.log"
        self._summary = folder / f"serve-{self.port}.json"
        program = f"{prelude}\nfrom kvferry.cli.main import main\nmain()"
        command = [sys.executable, "-c", program, "serve", "--model", model]
        command += ["--socket", str(node), "--json", str(self._summary)]
        command += ["--port", str(self.port), "--temp", "0", *arguments]
        variables = {**os.environ, **(environment or {})}
        if other := variables.get("KVFERRY_TEST_MLX_LM"):
            paths = [other, *filter(None, [variables.get("PYTHONPATH")])]
            variables["PYTHONPATH"] = os.pathsep.join(paths)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)
        self.client = OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=120
        )

    def __enter__(self) -> Self:
        try:
            self._wait_ready()
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, as a user would."""
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def _wait_ready(self) -> None:
        """Until it listens; requests then wait for the model."""
        end = time.monotonic() + START_TIMEOUT_S
        while self.health() is None:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def health(self) -> dict[str, Any] | None:
        """What /health says; None: nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health") as reply:
                found: dict[str, Any] = json.load(reply)
                return found
        except urllib.error.URLError:
            return None

    def summary(self) -> dict[str, int]:
        """Counters that it wrote when it stopped."""
        counters: dict[str, int] = json.loads(self._summary.read_text())["counters"]
        return counters

    def warm(self) -> None:
        """One short request, so that the model is there and no measurement waits for it."""
        self.chat([{"role": "user", "content": "Hi"}], 1)

    def chat(self, messages: list[dict[str, str]], max_tokens: int = 12) -> Answer:
        given: Any = messages
        asked = time.monotonic()
        reply = self.client.chat.completions.create(
            model="default_model", messages=given, max_tokens=max_tokens
        )
        choice, usage = reply.choices[0], reply.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens or 0
        text = choice.message.content or ""
        spent = time.monotonic() - asked
        return Answer(text, usage.prompt_tokens, cached, spent, choice.finish_reason)

    def complete(self, prompt: str, max_tokens: int = 8, model: str = "default_model") -> Answer:
        asked = time.monotonic()
        reply = self.client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens)
        choice, usage = reply.choices[0], reply.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens or 0
        spent = time.monotonic() - asked
        return Answer(choice.text, usage.prompt_tokens, cached, spent, choice.finish_reason)

    def stream(self, messages: list[dict[str, str]], max_tokens: int = 12) -> Answer:
        given: Any = messages
        asked = time.monotonic()
        pieces, first, reason, usage = [], 0.0, "", None
        with self.client.chat.completions.create(
            model="default_model",
            messages=given,
            max_tokens=max_tokens,
            stream=True,
            stream_options={"include_usage": True},
        ) as chunks:
            for chunk in chunks:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    if choice.delta.content:
                        first = first or time.monotonic() - asked
                        pieces.append(choice.delta.content)
                    reason = choice.finish_reason or reason
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens or 0
        return Answer("".join(pieces), usage.prompt_tokens, cached, first, reason)
