"""The acts of ``kvferry bench restore``: processes, prompts, and one JSON object."""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvferry.cli.demo.cluster import Cluster
from kvferry.cli.demo.prompt import FIRST_TOPIC
from kvferry.cli.output import Bar
from kvferry.codec.lab.machine import load_average, machine
from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import FerryError
from kvferry.node.hooks import HookOptions, PrefixCache
from kvferry.node.hooks.bench_offload import measure_offload
from kvferry.node.hooks.bench_restore import (
    SPEEDUP_LENGTH,
    Subject,
    measure_points,
    measure_sweep,
)
from kvferry.node.hooks.pipeline.launch import Ranks
from kvferry.places import user_dir

# From far too slow to as fast as it goes, bytes per second.
SWEEP = (2e4, 1e5, 2e5, 3.5e5, 6e5, 1e6, 2e6, 8e6, 0.0)
POLICY = "default"
UNKNOWN_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlanned:
    """What to measure. ``sweep_tokens`` and ``offload_tokens``: 0: leave that part out."""

    model: str
    lengths: Sequence[int]
    rounds: int
    cold_starts: int
    sweep_tokens: int
    sweep_rounds: int
    offload_tokens: int
    offload_rounds: int

    @property
    def work(self) -> float:
        """All there is to do, in about as many tokens of prefill."""
        swept = self.sweep_tokens * len(SWEEP) * (1 + 2 * self.sweep_rounds)
        offload = self.offload_tokens + 60 * self.offload_rounds
        return float(
            sum(self.lengths) * (1 + self.rounds) + swept + offload + 1000 * self.cold_starts
        )


def run(loaded: LoadedModel, plan: RestorePlanned, bar: Bar) -> dict[str, Any]:
    """Measure. Raises: FerryError: a process failed, or a restore did."""
    load = load_average()
    done = 0.0

    def advance(work: float, note: str) -> None:
        bar.update(done + work, note)

    lengths = sorted({*plan.lengths, *([plan.sweep_tokens] if plan.sweep_tokens else [])})
    prompts = _prompts(loaded, [*(n + 1 for n in lengths), UNKNOWN_TOKENS, plan.offload_tokens])
    stored = dict(zip(lengths, prompts, strict=False))
    unknown, offered = prompts[-2:]
    result: dict[str, Any] = {"model": plan.model, "policy": POLICY}
    with tempfile.TemporaryDirectory(prefix="kvferry-") as name:
        folder = Path(name)
        put = _store(loaded, folder, list(stored.values()), advance)
        done += sum(lengths)
        with _daemon(folder, tiers=False) as cluster:
            with _subject(loaded, cluster) as subject:
                points = measure_points(
                    subject, [stored[n] for n in plan.lengths], plan.rounds, advance
                )
                done += sum(plan.lengths) * plan.rounds
            cold = _cold(plan, cluster, stored, advance)
            done += 1000 * plan.cold_starts
            if plan.sweep_tokens:
                with _subject(loaded, cluster, link_retry_s=0.0) as subject:
                    each = plan.sweep_tokens * (1 + 2 * plan.sweep_rounds)
                    result["sweep"] = measure_sweep(
                        subject,
                        stored[plan.sweep_tokens],
                        unknown,
                        SWEEP,
                        plan.sweep_rounds,
                        lambda count, note: advance(each * count, note),
                    )
                    done += each * len(SWEEP)
        if plan.offload_tokens:
            with _daemon(folder) as cluster, _subject(loaded, cluster) as subject:
                result["offload"] = measure_offload(
                    subject,
                    offered,
                    plan.offload_rounds,
                    lambda count, note: advance(60 * count, note),
                )
    bar.update(plan.work)
    return _result(result, plan, points, cold, put) | {
        "load_average": [load, load_average()],
        "machine": machine(),
    }


def _prompts(loaded: LoadedModel, lengths: Sequence[int]) -> list[list[int]]:
    """Prompts that share nothing, out of Python's documentation.

    Raises: ModelError: it is not long enough.
    """
    from pydoc_data.topics import topics

    from kvferry.codec.lab.text import first_tokens

    names = sorted(topics)
    start = names.index(FIRST_TOPIC) if FIRST_TOPIC in names else 0
    text = "\n\n".join(topics[name] for name in names[start:] + names[:start])
    tokens = first_tokens(loaded.tokenizer, text, sum(lengths), "pydoc_data.topics")
    prompts, at = [], 0
    for length in lengths:
        prompts.append(list(tokens[at : at + length]))
        at += length
    return prompts


@contextmanager
def _daemon(folder: Path, tiers: bool = True) -> Iterator[Cluster]:
    """Store and coordinator that know what was put before, and a node that knows nothing."""
    cluster = Cluster(folder, nodes=1, fresh_nodes=True, tiers=tiers)
    cluster.set_policy(POLICY)
    with cluster:
        yield cluster


@contextmanager
def _subject(loaded: LoadedModel, cluster: Cluster, **options: float) -> Iterator[Subject]:
    given: dict[str, Any] = dict(options)
    with PrefixCache(loaded, HookOptions(socket=cluster.sockets[0], **given)) as prefix:
        if not prefix.ready():
            raise FerryError("the model's identity or namespace is not known")
        yield Subject(loaded, prefix)


def _store(
    loaded: LoadedModel, folder: Path, prompts: Sequence[Sequence[int]], advance: Any
) -> dict[int, dict[str, int]]:
    put, done = {}, 0.0
    with _daemon(folder) as cluster, _subject(loaded, cluster) as subject:
        for prompt in prompts:
            put[len(prompt) - 1] = subject.store(prompt[:-1])
            done += len(prompt)
            advance(done, "storing")
    return put


def _cold(
    plan: RestorePlanned, cluster: Cluster, stored: dict[int, list[int]], advance: Any
) -> list[dict[str, float]]:
    """The first restore of processes that have just loaded the model."""
    length = _speedup_length(plan)
    found = []
    config = {"model": plan.model, "layers": [0, _layers(plan.model)]}
    config |= {"socket": str(cluster.sockets[0]), "cache_dir": str(user_dir("cache"))}
    for index in range(plan.cold_starts):
        with Ranks([config], cluster.folder) as ranks:
            answer = ranks.call("generate", tokens=stored[length], max_tokens=1)[0]
        restore = answer["restore"]
        if restore["restored_tokens"] != length:
            raise FerryError(f"a fresh process restored too little: {restore}")
        found.append({"restore": restore["seconds"], "ttft": answer["ttft_seconds"]})
        advance(1000.0 * (index + 1), "a fresh process")
    return found


def _layers(model: str) -> int:
    from kvferry.codec.mlx.load import load_tokenizer

    return load_tokenizer(model)[1]


def _speedup_length(plan: RestorePlanned) -> int:
    return SPEEDUP_LENGTH if SPEEDUP_LENGTH in plan.lengths else max(plan.lengths)


def _result(
    parts: dict[str, Any],
    plan: RestorePlanned,
    points: Sequence[dict[str, Any]],
    cold: Sequence[dict[str, float]],
    put: dict[int, dict[str, int]],
) -> dict[str, Any]:
    length = _speedup_length(plan)
    main = next(point for point in points if point["tokens"] == length)
    result = parts | {
        "tokens": length,
        "speedup": main["speedup"],
        "prefill_seconds": main["prefill_seconds"],
        "restore_seconds": main["restore_seconds"],
        "bytes": main["bytes"],
        "points": [
            point | {"ratio_fp16": _ratio(put[point["tokens"]]), "rounds": plan.rounds}
            for point in points
        ],
    }
    if cold:
        first = statistics.median(found["restore"] for found in cold)
        result |= {
            "cold_restore_seconds": first,
            "cold_speedup": main["prefill_seconds"] / first,
            "cold_starts": cold,
        }
    if "sweep" in parts:
        result["never_slower"] = parts["sweep"]["never_slower"]
    if "offload" in parts:
        result["slowdown_pct"] = parts["offload"]["slowdown_pct"]
    return result


def _ratio(put: dict[str, int]) -> float:
    return put["bytes_raw_fp16"] / put["bytes_put"]
