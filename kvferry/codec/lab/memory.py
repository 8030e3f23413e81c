"""What a calibration will need of a machine's memory, said before it starts.

Sums of sizes that are known beforehand; none grows with the number of tokens. Only what
the backward pass and the eigenvectors need on the way is an estimate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import psutil
from mlx.utils import tree_flatten

from kvferry.codec.calibration import DEFAULT_MAX_RANK, layer_groups
from kvferry.codec.kvtc_fit import KEPT_ROWS, MAX_BASIS_BYTES, RowsAside
from kvferry.codec.lab.fisher import CONTINUATION
from kvferry.codec.lab.kvtc_state import KvtcPlan
from kvferry.codec.lab.lowrank import LowRankPlan
from kvferry.codec.lab.plan import Plan
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.shape import ModelShape
from kvferry.errors import ModelError
from kvferry.proto.keys import WINDOW_TOKENS

_FLOAT, _DOUBLE, _HALF = 4, 8, 2
# Matrices of p x p float64 alive at once in a fit: the covariance, two of it weighted,
# and what the eigensolver works in.
_FIT_MATRICES = 5
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Bytes. ``resident`` is what the process holds already, the model included.

    Attributes:
        model: weights, a part of ``resident``.
        covariances, fisher: sums that live through the whole text.
        passing: one sequence forward and backward.
        fitting: eigenvectors of the widest stream of a layer group.
        measuring: folded matrices and caches for the curve.
        rows: kept through the whole text, to measure on.
    """

    resident: int
    model: int
    covariances: int
    fisher: int
    passing: int
    fitting: int
    measuring: int
    rows: int = 0

    @property
    def additional(self) -> int:
        """The most that will be held at once, beyond ``resident``."""
        gathering = self.covariances + max(self.passing, self.fitting)
        return self.fisher + self.rows + max(gathering, self.measuring)

    @property
    def total(self) -> int:
        """The peak of the whole process."""
        return self.resident + self.additional

    def check(self, free: int) -> None:
        """Raises: ModelError where this does not fit into ``free`` bytes."""
        if self.additional > free:
            raise ModelError(
                f"calibration needs {self.additional / GIB:.1f} GiB more than is held now, and "
                f"{free / GIB:.1f} GiB are free: close other programs or take a larger machine "
                "(--memory-limit GIB goes ahead all the same)"
            )

    def line(self) -> str:
        """One line for people."""
        parts = {
            "model": self.model,
            "covariances": self.covariances,
            "Fisher sums": self.fisher,
            "rows to measure on": self.rows,
            "a pass": self.passing,
            "a fit": self.fitting,
            "measuring": self.measuring,
        }
        each = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
        return f"memory: {self.total / GIB:.2f} GiB at most ({each}), whatever the number of tokens"

    def to_json(self) -> dict[str, int]:
        """All parts in bytes."""
        parts: dict[str, int] = {f"{name}_bytes": value for name, value in asdict(self).items()}
        return parts | {"additional_bytes": self.additional, "total_bytes": self.total}


def free_memory() -> int:
    """Bytes that programs can still take without swapping."""
    return int(psutil.virtual_memory().available)


def resident_memory() -> int:
    """Bytes that this process holds."""
    return int(psutil.Process().memory_info().rss)


def memory_need(loaded: LoadedModel, shape: ModelShape, plan: Plan) -> MemoryNeed:
    """What `calibrate` is going to need with this plan."""
    widths = [
        (b - a) * sum(stream.heads * stream.dim for stream in shape.streams.values())
        for a, b in layer_groups(shape.layers, shape.kv_heads, shape.head_dim)
    ]
    widest = max(widths)
    per_token = sum(widths)
    weights = _weights(loaded.model)
    item = _item(weights)
    cached = plan.sequence * per_token
    fisher = sum(shape.layers * s.heads * s.dim**2 for s in shape.streams.values()) * _DOUBLE
    kept = sum(width * min(width, DEFAULT_MAX_RANK) for width in widths)
    held = plan.held_context + WINDOW_TOKENS + plan.held_continuation
    caches = (3 + len(plan.curve_bits)) * held * per_token * max(item, _FLOAT)
    adding = _adding(plan.sequence, widest)
    gradients = 0
    if plan.ridge is not None:
        gradients = 2 * cached * _FLOAT + _activations(loaded.config, shape, plan.sequence, item)
    return MemoryNeed(
        resident=resident_memory(),
        model=sum(value.nbytes for value in weights),
        covariances=sum(width**2 for width in widths) * _DOUBLE,
        fisher=2 * fisher,
        passing=cached * (item + _FLOAT) + max(adding, gradients),
        fitting=_FIT_MATRICES * widest**2 * _DOUBLE + kept * _HALF,
        measuring=kept * (_HALF + 2 * _FLOAT) + caches if plan.curve_bits else 0,
    )


def kvtc_memory_need(
    loaded: LoadedModel, shape: ModelShape, plan: KvtcPlan, apart: Sequence[Sequence[int]]
) -> MemoryNeed:
    """What `kvferry.codec.lab.kvtc.calibrate` is going to need; ``apart`` as it has it."""
    widths = [shape.layers * stream.heads * stream.dim for stream in shape.streams.values()]
    widest, per_token = max(widths), sum(widths)
    weights = _weights(loaded.model)
    ranks = [min(width, MAX_BASIS_BYTES // (_HALF * per_token)) for width in widths]
    kept = sum(width * rank for width, rank in zip(widths, ranks, strict=True))
    covariances = sum(width**2 for width in widths) * _DOUBLE
    # While rows are added, those of one stream are there twice.
    fitted = 2 * KEPT_ROWS + plan.sequence
    others = sum(RowsAside.apart_rows(len(part)) for part in apart)
    # Coefficients of one stream, and what they become and come back from.
    measured = 5 * max(2 * KEPT_ROWS, others) * max(ranks) * _FLOAT
    return MemoryNeed(
        resident=resident_memory(),
        model=sum(value.nbytes for value in weights),
        covariances=covariances,
        fisher=0,
        passing=plan.sequence * per_token * (_item(weights) + _FLOAT)
        + _adding(plan.sequence, widest),
        fitting=_FIT_MATRICES * widest**2 * _DOUBLE + kept * _HALF,
        measuring=covariances + kept * (_HALF + _FLOAT) + measured,
        rows=(fitted + others) * (per_token + widest) * _FLOAT,
    )


def lowrank_memory_need(loaded: LoadedModel, shape: ModelShape, plan: LowRankPlan) -> MemoryNeed:
    """What `kvferry.codec.lab.lowrank.calibrate` is going to need with this plan."""
    weights = _weights(loaded.model)
    streams = shape.streams.values()
    squares = sum(shape.layers * stream.heads * stream.dim**2 for stream in streams)
    cached = plan.sequence * shape.layers * sum(stream.heads * stream.dim for stream in streams)
    return MemoryNeed(
        resident=resident_memory(),
        model=sum(value.nbytes for value in weights),
        covariances=squares * _DOUBLE,
        fisher=0,
        passing=cached * (_item(weights) + 3 * _FLOAT) + squares * (_FLOAT + _DOUBLE),
        fitting=_FIT_MATRICES * squares * _DOUBLE,
        measuring=0,
    )


def _item(weights: Sequence[mx.array]) -> int:
    """Bytes of a value of the cache, which has the weights' type."""
    return max((value.itemsize for value in weights if value.size), default=_FLOAT)


def _adding(sequence: int, width: int) -> int:
    """A sequence's rows, and their product, beside the sums that it is added to."""
    return 3 * sequence * width * _FLOAT + width**2 * (_FLOAT + _DOUBLE)


def _weights(model: Any) -> list[mx.array]:
    flat: Any = tree_flatten(model.parameters())
    return [value for _, value in flat]


def _activations(config: Mapping[str, Any], shape: ModelShape, held: int, item: int) -> int:
    """About what a backward pass over `CONTINUATION` tokens keeps of its forward pass."""
    text = {**config, **(config.get("text_config") or {})}
    hidden = int(text.get("hidden_size") or shape.kv_heads * shape.head_dim)
    inner = int(text.get("intermediate_size") or 4 * hidden)
    heads = int(text.get("num_attention_heads") or shape.kv_heads)
    vocabulary = int(text.get("vocab_size") or 0)
    per_layer = 12 * hidden + 5 * inner + 4 * heads * (held + CONTINUATION)
    return CONTINUATION * (shape.layers * per_layer * max(item, _HALF) + 6 * vocabulary * _FLOAT)


def peak_memory() -> int:
    """The most that this process has held, in bytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024) + _device_peak()


def _device_peak() -> int:
    """Where the device's memory is apart from the process's; 0 elsewhere."""
    return int(mx.get_peak_memory()) if mx.default_device().type == mx.gpu else 0
