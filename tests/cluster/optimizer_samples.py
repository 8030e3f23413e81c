"""Small curves and clusters for the optimizer's tests."""

from collections.abc import Mapping, Sequence

import numpy as np

from kvferry.cluster.optimizer.holder import Holder
from kvferry.proto.v1 import coordinator_pb2 as pb

MODEL = bytes(range(32))
STEPS = (0.004, 0.002, 0.001)
GB, MB, KB = 1e9, 1e6, 1e3


def curve(
    matters: Sequence[float] = (1.0, 1.0),
    *,
    layers: int = 4,
    heads: int = 1,
    width: int = 1000,
    bits: Sequence[float] = (0.2, 0.4, 0.9),
    kl: Sequence[float] = (0.02, 0.006, 0.0015),
    measured: Sequence[float] = (),
    model: bytes = MODEL,
) -> pb.ModelCurve:
    """Groups of ``layers`` each; ``matters`` scales each one's KL."""
    made = pb.ModelCurve(
        model_id=model,
        model_layers=layers * len(matters),
        model_heads=heads,
        steps=STEPS,
        measured_kl=measured,
    )
    for group, weight in enumerate(matters):
        made.groups.add(
            layer_start=group * layers,
            layer_end=(group + 1) * layers,
            width=width,
            bits_per_token=[width * value for value in bits],
            kl=[weight * value for value in kl],
        )
    return made


def holder(
    name: str,
    layers: tuple[int, int],
    bytes_per_s: float = 100 * MB,
    *,
    heads: tuple[int, int] = (0, 1),
    latency_s: float = 0.0,
    decode: float = 0.0,
    prefill: float = 0.0,
    codecs: Mapping[str, float] | None = None,
    nearer: Mapping[str, float] | None = None,
) -> Holder:
    """A node with one part."""
    return Holder(
        node_id=name,
        parts=((layers, heads),),
        bytes_per_s=bytes_per_s,
        latency_s=latency_s,
        decode_tokens_per_s=decode,
        prefill_tokens_per_s=prefill,
        decode_values_per_s=tuple((codecs or {}).items()),
        nearer=tuple((nearer or {}).items()),
    )


def random_curve(rng: np.random.Generator, groups: int) -> pb.ModelCurve:
    """Any convex or not so convex curve."""
    points = int(rng.integers(1, 5))
    steps = sorted(rng.uniform(0.001, 0.05, points), reverse=True)
    made = pb.ModelCurve(model_id=MODEL, model_layers=groups, model_heads=1, steps=steps)
    for group in range(groups):
        width = int(rng.integers(1, 4000))
        made.groups.add(
            layer_start=group,
            layer_end=group + 1,
            width=width,
            bits_per_token=np.sort(width * rng.uniform(0.05, 3.0, points)).tolist(),
            kl=np.sort(10.0 ** rng.uniform(-5, -1.5, points))[::-1].tolist(),
        )
    return made
