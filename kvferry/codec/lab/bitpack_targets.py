"""What seed 001 wanted of ``bitpack``, beside what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SAVING = 25.0  # per cent of quantized weights with a plain cache


@dataclass(frozen=True, slots=True)
class Target:
    """One figure that the seed names.

    Attributes:
        name: in words.
        field: where it stands in a row of the table.
        limit: in the unit of ``name``.
        at_least: the figure has to reach it; else to stay below it.
        why: of what keeps it from being met, where something general does.
        scale: of the field to the unit of ``name``.
    """

    name: str
    field: str
    limit: float
    at_least: bool = False
    why: str = ""
    scale: float = 1.0


_ERROR = (
    "a step is 1/{steps} of a channel's range over some 500 tokens, and such a range is "
    "6 to 7 times the mean magnitude of what is spread normally: that costs {least:.1f} %"
)
_ANEW = (
    "the whole history is unpacked for every token, by passes over memory that attention "
    "does not need"
)
TARGETS = (
    Target("token match over the generation, %", "token_match", 99.0, True, scale=100.0),
    Target("perplexity increase, %", "ppl_delta_pct", 2.0),
    Target("relative error of K, %", "k_error_pct", 1.0, why=_ERROR),
    Target("relative error of V, %", "v_error_pct", 1.0, why=_ERROR),
    Target("compression of a token, ms", "compress_ms_per_token", 1.0),
    Target("decompression for a token, ms", "unpack_ms_per_token", 5.0, why=_ANEW),
    Target(
        "latency overhead of a token, %",
        "overhead_pct",
        5.0,
        why=_ANEW,
    ),
)


def targets(rows: Sequence[Mapping[str, Any]], memory: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each number of bits, every target: wanted, measured, met, and why not."""
    found = []
    for row in rows:
        for target in TARGETS:
            value = float(row[target.field]) * target.scale
            met = value >= target.limit if target.at_least else value < target.limit
            found.append(
                {
                    "bits": row["bits"],
                    "target": target.name,
                    "wanted": f"{'>=' if target.at_least else '<'} {target.limit:g}",
                    "measured": value,
                    "met": met,
                    "why": "" if met else _why(target, int(row["bits"])),
                }
            )
        found += _memory_target(int(row["bits"]), memory, row)
    return found


def _why(target: Target, bits: int) -> str:
    steps = 2**bits - 1
    return target.why.format(steps=steps, least=100 * 6.5 / steps / 4)


def _memory_target(
    bits: int, memory: Mapping[str, Any], row: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Saving against quantized weights with a plain cache; empty for a model without files."""
    weights, plain = memory["weights_in_files"], memory["cache_plain"]
    if weights is None:
        return []
    saved = plain - row["cache_bytes"]
    share = 100 * saved / (weights + plain)
    why = ""
    if share < SAVING:
        per_token = saved - SAVING / 100 * plain
        why = (
            f"weights are {weights / plain:.1f} times the cache here; it takes "
            f"{SAVING / 100 * weights / per_token:.1f} times the tokens"
            if per_token > 0
            else "weights outweigh the cache"
        )
    return [
        {
            "bits": bits,
            "target": "memory saved of quantized weights with a plain cache, %",
            "wanted": f">= {SAVING:g}",
            "measured": share,
            "met": share >= SAVING,
            "why": why,
        }
    ]
