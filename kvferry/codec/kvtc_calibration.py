"""What `kvtc` learns about a model: one unweighted basis per stream over all layers.

A reader needs only the `GroupCalibration` part, and a blob names that by its id. Beside
it stand, for writers, the errors measured on the calibration text, from which a plan for
any ratio follows, and the plans for some ratios, so that it need not be searched again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from kvferry.codec.calibration import CalibrationSet, GroupCalibration, GroupEntry
from kvferry.codec.files import read_capped, write_atomically
from kvferry.codec.kvtc_plan import (
    BITS,
    SIZES,
    BitPlan,
    Errors,
    GroupErrors,
    best_plans,
    budget_for,
)
from kvferry.errors import CalibrationCorruptError, ConfigError

RATIOS = (3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 14.0, 16.0, 20.0, 24.0, 32.0, 48.0, 64.0)
MAX_ERRORS_BYTES = 64 << 20
_KEYS = tuple((size, bits) for size in SIZES for bits in BITS if bits)
_NOT_OFFERED = -1.0

Plans = Mapping[str, BitPlan]


@dataclass(frozen=True, slots=True, eq=False)
class StreamErrors:
    """Squared errors per token of one stream, as `best_plans` takes them."""

    energy: Errors
    groups: GroupErrors

    def plans(self, width: int, ratios: Sequence[float]) -> list[BitPlan]:
        """The best plan of ``width`` values at each ratio."""
        return best_plans(self.energy, self.groups, [budget_for(r, width) for r in ratios])

    def to_tensors(self, name: str) -> dict[str, npt.NDArray[np.float32]]:
        """``name/energy`` (r,) and ``name/errors`` (sizes x bits, r), -1 where there is none."""
        table = np.full((len(_KEYS), len(self.energy)), _NOT_OFFERED, dtype=np.float32)
        for row, key in enumerate(_KEYS):
            found = self.groups.get(key, np.zeros(0))
            table[row, : len(found)] = np.where(np.isfinite(found), found, _NOT_OFFERED)
        return {f"{name}/energy": self.energy.astype(np.float32), f"{name}/errors": table}

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Self:
        """Raises: CalibrationCorruptError."""
        energy, table = tensors.get(f"{name}/energy"), tensors.get(f"{name}/errors")
        if energy is None or table is None or energy.ndim != 1:
            raise CalibrationCorruptError("errors", f"of stream {name!r} are missing")
        if table.shape != (len(_KEYS), len(energy)) or not np.isfinite(table).all():
            raise CalibrationCorruptError("errors", f"of stream {name!r} have another shape")
        wide = np.where(table < 0, np.inf, table).astype(np.float64)
        groups = {
            (size, bits): wide[row, : len(energy) - size + 1]
            for row, (size, bits) in enumerate(_KEYS)
            if size <= len(energy)
        }
        return cls(energy.astype(np.float64), groups)


@dataclass(frozen=True, kw_only=True, eq=False)
class KvtcCalibration(GroupCalibration):
    """A calibration that can also plan.

    Attributes:
        errors: per stream; no part of the id, since no reader needs it.
        plans: ratio -> stream -> plan, those that are known already.
    """

    errors: Mapping[str, StreamErrors] = field(default_factory=dict)
    plans: Mapping[float, Plans] = field(default_factory=dict)

    def plans_for(self, ratio: float) -> Plans:
        """The plans of all streams for a nominal ratio; seconds where it is a new one.

        Raises: ConfigError: a ratio that leaves no bits.
        """
        known = self.plans.get(ratio)
        return known if known is not None else self._planned([ratio])[ratio]

    def planned(self, ratios: Sequence[float] = RATIOS) -> Self:
        """The same calibration with the plans of ``ratios`` at hand."""
        return replace(self, plans=self._planned(ratios))

    def _planned(self, ratios: Sequence[float]) -> dict[float, Plans]:
        found: dict[float, dict[str, BitPlan]] = {ratio: {} for ratio in ratios}
        for name, stream in self.bundles.items():
            for ratio, plan in zip(
                ratios, self.errors[name].plans(stream.width, ratios), strict=True
            ):
                found[ratio][name] = plan
        return dict(found)

    @classmethod
    def of(cls, group: GroupCalibration, errors: Mapping[str, StreamErrors]) -> Self:
        """Raises: CalibrationCorruptError: errors of other streams or ranks."""
        if set(errors) != set(group.bundles):
            raise CalibrationCorruptError("errors", f"are of streams {sorted(errors)}")
        for name, stream in group.bundles.items():
            if len(errors[name].energy) != stream.rank:
                raise CalibrationCorruptError("errors", f"of stream {name!r} have another rank")
        parts: dict[str, Any] = {f.name: getattr(group, f.name) for f in fields(GroupCalibration)}
        return cls(**parts, errors=errors)

    def save(self, folder: Path) -> CalibrationSet:
        """Write the set with this one group, and errors and plans beside it.

        Raises: OSError; CalibrationCorruptError where it does not cover a whole model.
        """
        entry = GroupEntry(self.id, self.layers, self.heads)
        made = CalibrationSet(
            model_id=self.model_id,
            model_layers=self.layers[1],
            model_heads=self.heads[1],
            groups=(entry,),
            text_source=self.source,
            tokens=self.tokens,
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / _errors_file(self), self._errors_bytes())
        made.save(folder, [self])
        for old in {*folder.glob("*.kvferry"), *folder.glob("*.errors")}:
            if old.stem != self.id.hex():
                old.unlink(missing_ok=True)
        return made

    def _errors_bytes(self) -> bytes:
        tensors: dict[str, npt.NDArray[np.float32]] = {}
        for name, errors in self.errors.items():
            tensors |= errors.to_tensors(name)
        plans = {
            str(ratio): {name: plan.to_json() for name, plan in streams.items()}
            for ratio, streams in self.plans.items()
        }
        return safetensors.numpy.save(tensors, metadata={"plans": json.dumps(plans)})

    @classmethod
    def load(cls, folder: Path) -> "tuple[CalibrationSet, KvtcCalibration]":
        """Read what `save` wrote.

        Raises: ConfigError (none there), CalibrationCorruptError, other CodecErrors.
        """
        found, groups = CalibrationSet.load(folder)
        if len(groups) != 1:
            reason = "a calibration of kvtc; `kvferry calibrate --codec kvtc` writes one"
            raise ConfigError("calibration", str(folder), reason)
        path = folder / _errors_file(groups[0])
        try:
            data = read_capped(path, MAX_ERRORS_BYTES)
        except OSError as exc:
            reason = "a calibration of kvtc; `kvferry calibrate --codec kvtc` writes one"
            raise ConfigError("calibration", str(folder), reason) from exc
        tensors, plans = _read_errors(str(path), data)
        errors = {name: StreamErrors.from_tensors(name, tensors) for name in groups[0].bundles}
        for streams in plans.values():
            ranks = {name: plan.rank for name, plan in streams.items()}
            if set(ranks) != set(errors) or any(
                r > len(errors[n].energy) for n, r in ranks.items()
            ):
                raise CalibrationCorruptError(str(path), "holds a plan of other streams or ranks")
        return found, replace(cls.of(groups[0], errors), plans=plans)


def _errors_file(group: GroupCalibration) -> str:
    return f"{group.id.hex()}.errors"


def _read_errors(
    where: str, data: bytes
) -> tuple[Mapping[str, npt.NDArray[np.float32]], dict[float, Plans]]:
    try:
        tensors = safetensors.numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        text = json.loads(data[8 : 8 + length])["__metadata__"]["plans"]
        plans = {
            float(ratio): {name: BitPlan.from_json(plan) for name, plan in streams.items()}
            for ratio, streams in json.loads(text).items()
        }
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError) as exc:
        raise CalibrationCorruptError(where, f"does not load ({exc})") from exc
    except ConfigError as exc:
        raise CalibrationCorruptError(where, f"holds a plan that cannot be ({exc})") from exc
    return tensors, dict(plans)
