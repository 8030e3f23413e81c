"""One rank as a process: commands come as JSON lines on stdin, answers go to stdout.

All ranks are given the same commands. ``kvferry demo`` and the tests drive it:

    python -m kvferry.node.hooks.pipeline.worker '{"model": "smollm2", "layers": [0, 15], ...}'
"""

import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from kvferry.errors import FerryError
from kvferry.node.hooks.options import HookOptions

if TYPE_CHECKING:
    from kvferry.node.hooks.prefix_cache import PrefixCache

_IDLE_AFTER_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What a rank is started with. ``layers`` absolute, half-open; socket None: no kvferry.

    With ``tensor`` every rank has a part of every layer instead, and ``layers`` says nothing.
    """

    model: str
    layers: tuple[int, int] = (0, 0)
    tensor: bool = False
    socket: str | None = None
    cache_dir: str | None = None
    options: dict[str, float] | None = None

    @classmethod
    def parse(cls, text: str) -> "WorkerConfig":
        """From the JSON object on the command line."""
        raw = json.loads(text)
        raw["layers"] = tuple(raw.get("layers", (0, 0)))
        return cls(**raw)


class Worker:
    """Model stage and prefix cache of one rank."""

    def __init__(self, config: WorkerConfig) -> None:
        import mlx.core as mx

        from kvferry.codec.mlx.load import load_model
        from kvferry.node.hooks.group import group_of
        from kvferry.node.hooks.pipeline.stage import Stage
        from kvferry.node.hooks.pipeline.whole import Whole

        distributed = mx.distributed.init()
        group = distributed if distributed.size() > 1 else None
        layers = None if config.tensor else config.layers
        loaded = load_model(config.model, layers=layers)
        self.stage: Stage | Whole
        if layers is None:
            self.stage = Whole.divided(loaded.model, group)
        else:
            self.stage = Stage(loaded.model, layers, group)
        self.prefix: PrefixCache | None = None
        if config.socket is not None:
            from kvferry.node.hooks import prefix_cache

            given: dict[str, Any] = dict(config.options or {})
            if config.cache_dir is not None:
                given["cache_dir"] = Path(config.cache_dir)
            options = HookOptions(socket=Path(config.socket), **given)
            # Divided heads would be taken for all there are.
            divided = layers is None and group is not None
            self.prefix = prefix_cache.PrefixCache(
                replace(loaded, whole=not divided),
                options,
                group=group_of(group),
                layers=layers,
                tensor=(0, 1) if group is None or layers else (group.rank(), group.size()),
                make_cache=self.stage.make_cache,
            )
            self.prefix.ready()
        self._kept: tuple[list[int], list[Any]] | None = None
        self._group = None if group is None else group_of(group)

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        """Run one command. Every rank runs the same ones in the same order."""
        name = command.pop("cmd")
        if name not in ("generate", "offer", "flush", "policy", "warm", "agree"):
            raise FerryError(f"no command {name!r}")
        answer: dict[str, Any] = getattr(self, f"do_{name}")(**command)
        return answer

    def do_warm(self) -> dict[str, Any]:
        """First use of the kernels, so that no timing pays for it."""
        self.stage.prefill(list(range(1000, 1256)), self.stage.make_cache())
        return {}

    def do_generate(
        self,
        tokens: list[int],
        max_tokens: int,
        forced: list[int] | None = None,
        use_cache: bool = True,
        offer: bool = False,
        logits_out: str | None = None,
    ) -> dict[str, Any]:
        """Greedy generation, or the choices along ``forced`` tokens (teacher forcing).

        Answers with ``choices``: the most likely token at each step, whatever was fed.
        """
        started = time.monotonic()
        if use_cache and self.prefix is not None:
            cache, remaining = self.prefix.restore(tokens)
        else:
            cache, remaining = self.stage.make_cache(), list(tokens)
        logits = self.stage.prefill(remaining, cache)
        token = self.stage.share_token(logits)
        first = time.monotonic() - started
        if offer and self.prefix is not None:
            self.prefix.offer(tokens, cache, "prefill")
        choices, rows, fed = [token], [_row(logits)], []
        for step in range(max_tokens - 1):
            fed.append(token if forced is None else forced[step])
            logits = self.stage.forward(fed[-1:], cache)
            token = self.stage.share_token(logits)
            choices.append(token)
            rows.append(_row(logits))
        total = time.monotonic() - started
        self._kept = ([*tokens, *fed], cache)
        if logits_out is not None and self.stage.last:
            np.save(logits_out, np.stack([r for r in rows if r is not None]))
        return {
            "choices": choices,
            "ttft_seconds": first,
            "seconds": total,
            "restore": self._last_restore() if use_cache else None,
        }

    def do_offer(self, event: str = "turn_end", tokens: int | None = None) -> dict[str, Any]:
        """Offer the cache of the last generation again, at another event."""
        if self.prefix is None or self._kept is None:
            return {"taken": False}
        known, cache = self._kept
        return {"taken": self.prefix.offer(known[:tokens], cache, event)}

    def do_flush(self, timeout_s: float = 120.0) -> dict[str, Any]:
        """Wait until what was offered is in the store."""
        done = self.prefix.flush(timeout_s) if self.prefix is not None else True
        return {"done": done, "counters": dict(self.prefix.counters) if self.prefix else {}}

    def do_policy(self, name: str, timeout_s: float = 20.0) -> dict[str, Any]:
        """Wait until the policy ``name`` is in force on this rank's node."""
        end = time.monotonic() + timeout_s
        while self.prefix is not None and self.prefix.policy.name != name:
            if time.monotonic() > end:
                raise FerryError(f"policy {name!r} did not arrive within {timeout_s:.0f} s")
            time.sleep(0.05)
        return {"name": name}

    def do_agree(self, rounds: int, collectives: int = 3) -> dict[str, Any]:
        """Seconds that ranks which are ready together need to agree on one request."""
        if self._group is None:
            raise FerryError("a rank alone has nobody to agree with")
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            for _ in range(collectives):
                self._group.all_min([2048])
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}

    def _last_restore(self) -> dict[str, Any] | None:
        report = self.prefix.last_restore if self.prefix is not None else None
        if report is None:
            return None
        return {
            "prompt_tokens": report.prompt_tokens,
            "restored_tokens": report.restored_tokens,
            "loaded_tokens": report.loaded_tokens,
            "reason": report.reason,
            "bytes": report.bytes,
            "seconds": report.seconds,
            "steps": dict(report.steps),
        }

    def idle(self) -> bool:
        """Use time without requests; whether there is more to do."""
        return self.prefix is not None and self.prefix.idle()

    def close(self) -> None:
        """Hand over what is queued."""
        if self.prefix is not None:
            self.prefix.close()


def _row(logits: Any) -> Any:
    return None if logits is None else np.array(logits[0, -1], copy=True)


def serve(worker: Worker, commands: TextIO, answers: TextIO) -> None:
    """Answer each line of ``commands`` with one line, until they end; idle in between."""
    waiting: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(commands, waiting), daemon=True).start()
    while (command := _next(worker, waiting)) is not None:
        try:
            answer = {"ok": True, **worker.handle(command)}
        except FerryError as exc:
            answer = {"ok": False, "error": str(exc)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _next(worker: Worker, waiting: "queue.Queue[dict[str, Any] | None]") -> dict[str, Any] | None:
    """The next command; idle time is the model's thread's, that is this one's."""
    while True:
        try:
            return waiting.get(timeout=_IDLE_AFTER_S)
        except queue.Empty:
            while waiting.empty() and worker.idle():
                pass


def _read(commands: TextIO, waiting: "queue.Queue[dict[str, Any] | None]") -> None:
    try:
        for command in _lines(commands):
            waiting.put(command)
    finally:
        waiting.put(None)


def _lines(commands: TextIO) -> Iterator[dict[str, Any]]:
    for line in commands:
        if line.strip():
            yield json.loads(line)


def main(arguments: Sequence[str]) -> int:
    """Entry point of a rank's process."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not get between the answers
    try:
        worker = Worker(WorkerConfig.parse(arguments[0]))
    except FerryError as exc:
        answers.write(json.dumps({"ok": False, "error": str(exc)}) + "\n")
        return 1
    answers.write(json.dumps({"ok": True, "ready": True}) + "\n")
    answers.flush()
    serve(worker, sys.stdin, answers)
    worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
