"""``policy_ms``: what one decision takes, 64 nodes x 100 layer groups."""

import statistics
import time

import numpy as np

from kvferry.cluster.optimizer.holder import Holder
from kvferry.cluster.optimizer.ladder import make_ladder
from kvferry.cluster.optimizer.problem import make_problem
from kvferry.cluster.optimizer.solve import solve
from kvferry.proto.v1 import coordinator_pb2 as pb

CODECS = ("affine", "ferry", "zstd")


def measure(nodes: int = 64, groups: int = 100, repeats: int = 21) -> dict[str, float]:
    """Median milliseconds from curve and links to every node's choice for every group.

    The nodes share all layers (tensor-parallel), so that there are nodes x groups parts to
    choose for: more than a pipeline of as many nodes has. Links, curves and what each codec
    takes each node to decode are random.

    Returns: ``policy_ms``; ``policy_worst_ms``; ``policy_parts``.
    """
    rng = np.random.default_rng(5)
    curve = _curve(rng, nodes, groups)
    holders = [
        Holder(
            node_id=f"n{node}",
            parts=(((0, groups), (node, node + 1)),),
            bytes_per_s=float(10 ** rng.uniform(6, 9)),
            latency_s=float(rng.uniform(1e-4, 1e-2)),
            decode_values_per_s=tuple((name, float(10 ** rng.uniform(7, 9))) for name in CODECS),
        )
        for node in range(nodes)
    ]
    took = []
    for _ in range(repeats):
        started = time.perf_counter()
        plan = solve(make_problem(make_ladder(curve), holders, 0.005))
        took.append(1e3 * (time.perf_counter() - started))
        if plan.kl > 0.005 * (1 + 1e-6):
            raise AssertionError(f"{plan.kl} nats of 0.005")
    return {
        "policy_ms": statistics.median(took),
        "policy_worst_ms": max(took),
        "policy_parts": float((plan.problem.share > 0).sum()),
    }


def _curve(rng: np.random.Generator, heads: int, groups: int) -> pb.ModelCurve:
    """Groups that matter unlike, on steps over four octaves."""
    steps = 0.005 / 2.0 ** np.arange(0, 4.5, 0.5)
    curve = pb.ModelCurve(
        model_id=bytes(32), model_layers=groups, model_heads=heads, steps=steps.tolist()
    )
    for group in range(groups):
        width, matters = 2048, float(rng.lognormal(0, 0.7))
        kl = 0.1 * matters / groups * (steps / steps[0]) ** 1.9
        bits = width * (0.2 + 0.35 * np.log2(steps[0] / steps) * rng.uniform(0.8, 1.2))
        curve.groups.add(
            layer_start=group,
            layer_end=group + 1,
            width=width,
            bits_per_token=bits.tolist(),
            kl=kl.tolist(),
        )
    return curve
