"""All calibrations of one model, with what they were measured to cost."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kvferry.codec import calibration_format as fmt
from kvferry.codec.calibration_curve import (
    MAX_CURVE_POINTS,
    CurvePoint,
    RateDistortion,
    StreamCurve,
    step_on_curve,
)
from kvferry.codec.calibration_group import GroupCalibration
from kvferry.codec.calibration_kinds import group_from_blob
from kvferry.codec.files import read_capped, write_atomically
from kvferry.errors import CalibrationCorruptError, ConfigError
from kvferry.proto.container import DEFAULT_LIMITS, Limits
from kvferry.proto.keys import DIGEST_BYTES, MAX_HEADS, MAX_LAYERS, BlobKey

SET_FILE = "calibration.json"


@dataclass(frozen=True, slots=True)
class GroupEntry:
    """A group of a `CalibrationSet`: its calibration's id and what it covers."""

    id: bytes
    layers: tuple[int, int]
    heads: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """All groups of a model and what they were measured to cost.

    Attributes:
        groups: in layer order, covering all layers and heads.
        curve: points to choose a step from; may be empty. Kept by falling step. With
            ``rates`` their KL is one that a high share of the measured texts stay
            within (`RateDistortion.safe_curve`).
        rates: curves per layer group and stream, and how well they predict; None in
            calibrations made before there were any.
        text_source: where the calibration text came from.
        tokens: tokens of calibration text.
    """

    model_id: bytes
    model_layers: int
    model_heads: int
    groups: tuple[GroupEntry, ...]
    curve: tuple[CurvePoint, ...] = ()
    text_source: str = ""
    tokens: int = 0
    rates: RateDistortion | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise CalibrationCorruptError("set", problem)
        ordered = tuple(sorted(self.curve, key=lambda point: -point.step))
        object.__setattr__(self, "curve", ordered)

    def _problem(self) -> str:
        digests = [self.model_id, *(group.id for group in self.groups)]
        if any(len(digest) != DIGEST_BYTES for digest in digests):
            return "an id is no digest"
        heads = (0, self.model_heads)
        at = 0
        for group in self.groups:
            if group.layers[0] != at or group.layers[1] <= at or group.heads != heads:
                return "its groups do not cover the model layer by layer"
            at = group.layers[1]
        if not self.text_source.isprintable() or self.tokens < 0:
            return "its text source or tokens cannot be"
        if at != self.model_layers or not at or not self.model_heads:
            return f"its groups cover {at} of {self.model_layers} layers"
        for point in self.curve:
            numbers = (point.step, point.bits_per_value, point.kl)
            if not all(math.isfinite(n) and n >= 0 for n in numbers) or not point.step:
                return "its curve holds a number that cannot be"
        layers = [group.layers for group in self.groups]
        return "" if self.rates is None else self.rates.problem(layers)

    @cached_property
    def _framed(self) -> fmt.Framed:
        return fmt.frame(self.to_json(), {})

    def to_json(self) -> dict[str, object]:
        """What is stored, as a JSON-like mapping."""
        return {
            "kind": "set",
            "model_id": self.model_id.hex(),
            "model_layers": self.model_layers,
            "model_heads": self.model_heads,
            "groups": [
                {"id": g.id.hex(), "layers": list(g.layers), "heads": list(g.heads)}
                for g in self.groups
            ],
            "curve": [
                {"step": p.step, "bits_per_value": p.bits_per_value, "kl": p.kl} for p in self.curve
            ],
            "text_source": self.text_source,
            "tokens": self.tokens,
        } | ({} if self.rates is None else {"rate_distortion": self.rates.to_json()})

    def group_curves(self, layers: tuple[int, int]) -> dict[str, StreamCurve]:
        """Stream name -> predicted curve of one layer group; empty where there is none."""
        return {} if self.rates is None else self.rates.of_group(layers)

    @property
    def id(self) -> bytes:
        """32 bytes: BLAKE3 of the description."""
        return self._framed.id

    def step_for_kl(self, target_kl: float) -> float:
        """Coarsest step whose predicted mean KL is at most ``target_kl`` nats.

        See `step_on_curve`.
        """
        return step_on_curve(self.curve, target_kl)

    def to_blob(self) -> tuple[BlobKey, bytes]:
        """Container of kind calibration with codec name "manifest"."""
        layers, heads = (0, self.model_layers), (0, self.model_heads)
        data = fmt.to_blob(self._framed, fmt.MANIFEST_NAME, self.model_id, layers, heads)
        return fmt.key_for(self.id), data

    @classmethod
    def from_blob(
        cls, data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS
    ) -> "CalibrationSet":
        """Raises: CorruptBlobError, CalibrationCorruptError, UnsupportedVersionError."""
        opened = fmt.open_blob(data, fmt.MANIFEST_NAME, limits)
        found = _from_fields(opened.fields)
        layers, heads = (0, found.model_layers), (0, found.model_heads)
        fmt.check_header(opened, found.model_id, layers, heads)
        if found.id != opened.header.page_key or opened.tensors:
            raise CalibrationCorruptError(opened.fields.where, "is not written in canonical form")
        return found

    def save(self, folder: Path, groups: Sequence[GroupCalibration]) -> None:
        """Write one file a group, then ``calibration.json``, each atomically.

        Raises: ConfigError: ``groups`` are not those that the set names.
        """
        if {g.id for g in groups} != {entry.id for entry in self.groups}:
            raise ConfigError("groups", len(groups), "the groups that the set names")
        folder.mkdir(parents=True, exist_ok=True)
        for group in groups:
            write_atomically(folder / group_file(group.id), group.to_blob()[1])
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / SET_FILE, (text + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> "tuple[CalibrationSet, list[GroupCalibration]]":
        """Read what `save` wrote.

        Raises: ConfigError (no calibration there), CalibrationCorruptError and the
            other errors of `GroupCalibration.from_blob`.
        """
        try:
            text = read_capped(folder / SET_FILE, fmt.MAX_DESCRIPTION_BYTES)
        except OSError as exc:
            allowed = f"a folder with {SET_FILE}; `kvferry calibrate` writes one"
            raise ConfigError("calibration", str(folder), allowed) from exc
        found = _from_fields(fmt.Fields.parse(str(folder / SET_FILE), text))
        return found, [_load_group(folder, entry, found.model_id) for entry in found.groups]


def group_file(calibration_id: bytes) -> str:
    """Name of a calibration's file in a folder."""
    return f"{calibration_id.hex()}.kvferry"


def _load_group(folder: Path, entry: GroupEntry, model_id: bytes) -> GroupCalibration:
    path = folder / group_file(entry.id)
    try:
        group = group_from_blob(read_capped(path, DEFAULT_LIMITS.max_blob))
    except OSError as exc:
        raise CalibrationCorruptError(str(path), "cannot be read") from exc
    if (group.id, group.layers, group.heads) != (entry.id, entry.layers, entry.heads):
        raise CalibrationCorruptError(str(path), "is another group than the set names")
    if group.model_id != model_id:
        raise CalibrationCorruptError(str(path), "is of another model than the set")
    return group


def _from_fields(fields: fmt.Fields) -> CalibrationSet:
    points = fields.objects("curve")
    if len(points) > MAX_CURVE_POINTS or fields.text("kind") != "set":
        raise fields.fail("curve" if points else "kind")
    return CalibrationSet(
        model_id=fields.digest("model_id"),
        model_layers=fields.integer("model_layers", 1, MAX_LAYERS),
        model_heads=fields.integer("model_heads", 1, MAX_HEADS),
        groups=tuple(
            GroupEntry(g.digest("id"), g.range("layers"), g.range("heads"))
            for g in fields.objects("groups")
        ),
        curve=tuple(
            CurvePoint(p.number("step"), p.number("bits_per_value"), p.number("kl")) for p in points
        ),
        text_source=fields.text("text_source"),
        tokens=fields.integer("tokens"),
        rates=_rates(fields),
    )


def _rates(fields: fmt.Fields) -> RateDistortion | None:
    stored = fields.values.get("rate_distortion")
    return (
        None if stored is None else RateDistortion.from_fields(fmt.Fields.of(fields.where, stored))
    )
