"""Options of `lowrank` from text, and its named settings."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from kvferry.codec import options as opts
from kvferry.errors import ConfigError
from kvferry.proto.keys import MAX_LAYERS

OPTIONS = ("rank", "target", "bits", "identity", "ln_nullspace", "policy")
TARGETS: Mapping[str, tuple[str, ...]] = {"v": ("v",), "k": ("k",), "kv": ("k", "v")}
BITS = (8, 16)
MAX_RANK = 4096
_MAX_SPANS = 64
_SPAN = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
_SWITCH = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class LowRankOptions:
    """What was asked for; the calibration makes it concrete.

    Attributes:
        rank: directions kept per head; None: ``share`` of a head's.
        share: of a head's directions.
        target: streams that are coded, a key of `TARGETS`; all others stay exact.
        bits: of a coefficient: 16 (float16) or 8 (int8, a scale per head and direction).
        identity: layers that stay exact, absolute, half-open ranges.
        ln_nullspace: drop the direction that a LayerNorm leaves empty: True (refused
            where there is none), False, or None: where there is one.
    """

    rank: int | None = None
    share: float = 15 / 16
    target: str = "v"
    bits: int = 16
    identity: tuple[tuple[int, int], ...] = ()
    ln_nullspace: bool | None = False

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> Self:
        """``policy`` first, then what the other options say instead. Raises: ConfigError."""
        opts.check_names("lowrank", options, OPTIONS)
        policy = str(options.get("policy", "default"))
        if policy not in POLICIES:
            raise ConfigError("policy", policy, f"one of {', '.join(POLICIES)}")
        found = cls(**{n: getattr(POLICIES[policy], n) for n in cls.__dataclass_fields__})
        if "rank" in options:
            rank = opts.whole_number("rank", options["rank"], tuple(range(1, MAX_RANK + 1)))
            found = replace(found, rank=rank)
        if "target" in options:
            target = str(options["target"])
            if target not in TARGETS:
                raise ConfigError("target", target, f"one of {', '.join(TARGETS)}")
            found = replace(found, target=target)
        if "bits" in options:
            found = replace(found, bits=opts.whole_number("bits", options["bits"], BITS))
        if "identity" in options:
            found = replace(found, identity=parse_spans(options["identity"]))
        if "ln_nullspace" in options:
            found = replace(found, ln_nullspace=_switch(options["ln_nullspace"]))
        return found

    def rank_of(self, dim: int) -> int:
        """Directions kept of heads of ``dim`` values. Raises: ConfigError: more than those."""
        if self.rank is None:
            return max(1, int(self.share * dim))
        if self.rank > dim:
            raise ConfigError("rank", self.rank, f"1 to {dim}, the values of a head")
        return self.rank

    def exact_layers(self, layers: tuple[int, int]) -> tuple[int, ...]:
        """Those of a range of layers that stay exact."""
        return tuple(n for n in range(*layers) if any(a <= n < b for a, b in self.identity))


# Shares of a head's directions, so that they mean the same for heads of 64 and of 128;
# what they cost was measured, see benchmarks/lowrank.md.
POLICIES: Mapping[str, LowRankOptions] = {
    "default": LowRankOptions(),
    "high_compression": LowRankOptions(share=15 / 16, bits=8),
    "memory_emergency": LowRankOptions(share=3 / 4, bits=8, ln_nullspace=None),
}


def parse_spans(value: object) -> tuple[tuple[int, int], ...]:
    """Layers as text: "0-4" is half-open as in policies, "29" is one. Raises: ConfigError."""
    allowed = 'layers as "0-4,29" (0 to 3, and 29)'
    parts = [part.strip() for part in str(value).split(",")]
    if len(parts) > _MAX_SPANS:
        raise ConfigError("identity", f"{len(parts)} ranges", f"at most {_MAX_SPANS}")
    spans = []
    for part in parts:
        match = _SPAN.fullmatch(part)
        if match is None:
            raise ConfigError("identity", value, allowed)
        start = int(match[1])
        end = int(match[2] or start + 1)
        if not 0 <= start < end <= MAX_LAYERS:
            raise ConfigError("identity", value, allowed)
        spans.append((start, end))
    return tuple(spans)


def warning(options: Mapping[str, object]) -> str:
    """What people should know of a choice before it is made; empty: nothing."""
    if str(options.get("target", "v")) == "v":
        return ""
    return (
        f"lowrank target={options['target']}: what keys lose, every query meets, and where keys "
        "were cut with RoPE on them it cost much; measure on your model before use"
    )


def _switch(value: object) -> bool | None:
    text = str(value)
    if text == "auto":
        return None
    if text not in _SWITCH:
        raise ConfigError("ln_nullspace", value, "true, false or auto")
    return _SWITCH[text]
