"""The acts of the demo, and the numbers that come out of them."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvferry.cli.demo.cluster import Cluster
from kvferry.cli.demo.prompt import build_prompt
from kvferry.cli.output import Bar, progress
from kvferry.codec.mlx.openblas import model_environment
from kvferry.errors import FerryError
from kvferry.node.hooks.pipeline.launch import Ranks
from kvferry.places import user_dir

FIRST_SPLIT = ((0, 20), (20, 30))
OTHER_SPLITS = (((0, 15), (15, 30)), ((0, 10), (10, 30)))
ACTS = 7
# Half of what `kvferry calibrate` takes by default: the first demo is not to take long.
CALIBRATION_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """What to run. ``keep``: a folder to leave everything in."""

    model: str = "smollm2"
    prompt_tokens: int = 1500
    max_tokens: int = 64
    keep: Path | None = None


@dataclass(slots=True)
class _Stage:
    """The demo's folder, prompt and reference, passed from act to act."""

    plan: DemoPlan
    folder: Path
    cache_dir: Path
    prompt: list[int]
    layers: int
    reference: list[int] = field(default_factory=list)

    def splits(self, split: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The split scaled to a model with another number of layers."""
        return [(a * self.layers // 30, b * self.layers // 30) for a, b in split]

    def logits(self, name: str) -> Path:
        return self.folder / f"logits-{name.replace('/', '+')}.npy"


def run_demo(plan: DemoPlan) -> dict[str, Any]:
    """All acts; returns the object of design section 13, and more.

    Raises: FerryError: a process did not start, or died; its log's end is in the text.
    """
    with _folder(plan.keep) as folder:
        prompt, layers = build_prompt(plan.model, plan.prompt_tokens)
        ensure_calibration(plan.model)
        stage = _Stage(plan, folder, user_dir("cache"), prompt, layers)
        with progress("demo", ACTS) as bar:
            return _acts(stage, bar)


def _acts(stage: _Stage, bar: Bar) -> dict[str, Any]:
    bar.update(0, "cold run, then stored with the default and the exact codec")
    cold = _act_cold(stage)
    bar.update(1, "everything stopped; fresh machines restore from the store")
    restored = _act_restore(stage, FIRST_SPLIT, fresh=True, exact=True)
    reshard = []
    for at, split in enumerate(OTHER_SPLITS):
        bar.update(3 + at, f"layers split {_split_name(stage.splits(split))}")
        reshard.append(_act_restore(stage, split, fresh=True))
    bar.update(5, "the store is gone: machines restore from their own disks")
    local = _act_restore(stage, OTHER_SPLITS[-1], fresh=False, with_store=False)
    bar.update(6, "the store is gone and the machines are new: prefill")
    alone = _act_prefill_without_store(stage)
    bar.update(7)
    return _result(stage, cold, restored, reshard, local, alone)


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="kvferry-") as name:
        yield Path(name)


def ensure_calibration(model: str) -> None:
    """Calibrate once; kept in the user's cache folder. Shows its own progress."""
    command = [sys.executable, "-m", "kvferry", "calibrate", "--model", model, "--if-missing"]
    command += ["--tokens", str(CALIBRATION_TOKENS)]
    done = subprocess.run(command, env=dict(os.environ) | model_environment(), stdout=sys.stderr)
    if done.returncode:
        raise FerryError("calibration failed, see above; try `kvferry calibrate --model smollm2`")


@contextmanager
def _running(
    stage: _Stage,
    split: Sequence[tuple[int, int]],
    policy: str,
    fresh: bool,
    with_store: bool = True,
) -> Iterator[tuple[Cluster, Ranks]]:
    """A cluster and ranks, warm, with ``policy`` in force on every node."""
    with ExitStack() as stack:
        cluster = Cluster(stage.folder, len(split), fresh, with_store)
        cluster.set_policy(policy)
        stack.enter_context(cluster)
        configs = [
            {
                "model": stage.plan.model,
                "layers": layers,
                "socket": str(socket),
                "cache_dir": str(stage.cache_dir),
            }
            for layers, socket in zip(stage.splits(split), cluster.sockets, strict=True)
        ]
        ranks = stack.enter_context(Ranks(configs, stage.folder))
        ranks.call("policy", name=policy)
        ranks.call("warm")
        yield cluster, ranks


def _switch(cluster: Cluster, ranks: Ranks, policy: str) -> None:
    """Change the policy on running nodes, and wait until every rank has it."""
    cluster.set_policy(policy)
    ranks.call("policy", name=policy)


def _act_cold(stage: _Stage) -> dict[str, Any]:
    plan = stage.plan
    with _running(stage, FIRST_SPLIT, "default", fresh=True) as (cluster, ranks):
        answers = ranks.call(
            "generate",
            tokens=stage.prompt,
            max_tokens=plan.max_tokens,
            use_cache=False,
            offer=True,
            logits_out=str(stage.logits("cold")),
        )
        stage.reference = answers[-1]["choices"]
        default = _put_totals(ranks)
        _switch(cluster, ranks, "exact")
        ranks.call("offer", event="prefill", tokens=len(stage.prompt))
        both = _put_totals(ranks)
    return {
        "ttft": max(a["ttft_seconds"] for a in answers),
        "default": default,
        "exact": {name: both[name] - default[name] for name in both},
    }


def _put_totals(ranks: Ranks) -> dict[str, int]:
    answers = ranks.call("flush")
    if not all(answer["done"] for answer in answers):
        raise FerryError("uploads did not reach the store in time")
    names = ("bytes_put", "bytes_raw_fp16")
    return {n: sum(answer["counters"].get(n, 0) for answer in answers) for n in names}


def _act_restore(
    stage: _Stage,
    split: Sequence[tuple[int, int]],
    *,
    fresh: bool,
    exact: bool = False,
    with_store: bool = True,
) -> dict[str, Any]:
    """Restore with the default codec, teacher-forced; with ``exact`` a free run as well."""
    name = f"{_split_name(split)}-{with_store}"
    with _running(stage, split, "default", fresh, with_store) as (cluster, ranks):
        forced = _generate(stage, ranks, forced=stage.reference, logits=stage.logits(name))
        outcome = {"default": forced, "kl": _kl(stage.logits("cold"), stage.logits(name))}
        if exact:
            _switch(cluster, ranks, "exact")
            outcome["exact"] = _generate(stage, ranks)
    return outcome


def _act_prefill_without_store(stage: _Stage) -> dict[str, Any]:
    split = OTHER_SPLITS[-1]
    with _running(stage, split, "default", fresh=True, with_store=False) as (_, ranks):
        return {"default": _generate(stage, ranks)}


def _generate(
    stage: _Stage, ranks: Ranks, forced: list[int] | None = None, logits: Path | None = None
) -> dict[str, Any]:
    answers = ranks.call(
        "generate",
        tokens=stage.prompt,
        max_tokens=stage.plan.max_tokens,
        forced=forced,
        logits_out=None if logits is None else str(logits),
    )
    same = [a == b for a, b in zip(answers[-1]["choices"], stage.reference, strict=True)]
    return {
        "ttft": max(answer["ttft_seconds"] for answer in answers),
        "same": sum(same) / len(same),
        "restored": min(answer["restore"]["restored_tokens"] for answer in answers),
        "bytes": sum(answer["restore"]["bytes"] for answer in answers),
        "reasons": sorted({answer["restore"]["reason"] for answer in answers} - {""}),
        "steps": [answer["restore"]["steps"] for answer in answers],
    }


def _kl(exact: Path, restored: Path) -> float:
    """Mean KL(exact || restored) in nats over the compared steps."""
    p, q = (_log_softmax(np.load(path).astype(np.float64)) for path in (exact, restored))
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def _log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    whole: np.ndarray[Any, Any] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return whole


def _split_name(split: Sequence[tuple[int, int]]) -> str:
    return "/".join(str(b - a) for a, b in split)


def _result(
    stage: _Stage,
    cold: dict[str, Any],
    restored: dict[str, Any],
    reshard: list[dict[str, Any]],
    local: dict[str, Any],
    alone: dict[str, Any],
) -> dict[str, Any]:
    default, exact = restored["default"], restored["exact"]
    local_ok = local["default"]["restored"] > 0 and local["default"]["same"] == default["same"]
    return {
        "model": stage.plan.model,
        "ranks": len(FIRST_SPLIT),
        "prompt_tokens": len(stage.prompt),
        "compared_tokens": len(stage.reference),
        "cold_ttft_seconds": cold["ttft"],
        "restored_ttft_seconds": default["ttft"],
        "ttft_speedup": cold["ttft"] / default["ttft"],
        "restored_tokens": default["restored"],
        "compression_ratio": cold["default"]["bytes_raw_fp16"] / cold["default"]["bytes_put"],
        "raw_bytes_fp16": cold["default"]["bytes_raw_fp16"],
        "shipped_bytes": cold["default"]["bytes_put"],
        "kl_mean": restored["kl"],
        "same_tokens": default["same"],
        "restore_steps": default["steps"],
        "exact_same_tokens": exact["same"],
        "exact_restored_tokens": exact["restored"],
        "exact_ttft_seconds": exact["ttft"],
        "exact_ttft_speedup": cold["ttft"] / exact["ttft"],
        "exact_shipped_bytes": cold["exact"]["bytes_put"],
        "exact_compression_ratio": cold["exact"]["bytes_raw_fp16"] / cold["exact"]["bytes_put"],
        "reshard_restored_tokens": min(r["default"]["restored"] for r in reshard),
        "reshards": [
            {
                "layers": _split_name(stage.splits(split)),
                "restored_tokens": r["default"]["restored"],
                "ttft_seconds": r["default"]["ttft"],
                "same_tokens": r["default"]["same"],
                "kl_mean": r["kl"],
            }
            for split, r in zip(OTHER_SPLITS, reshard, strict=True)
        ],
        "first_split": _split_name(stage.splits(FIRST_SPLIT)),
        "store_down_restored_tokens": local["default"]["restored"],
        "store_down_prefill_same_tokens": alone["default"]["same"],
        "store_down_prefill_reasons": alone["default"]["reasons"],
        "store_down_ok": local_ok and alone["default"]["same"] == 1.0,
    }
