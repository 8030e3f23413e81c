"""Reading `ferry` blobs: parameters, lengths, coefficients and exact tokens, checked.

Apart from the codec, so that a device decoder can do its own matrix products.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.codec import sections as sec
from kvferry.codec.base import CalibrationSource, CodedPage, FloatArray, Wanted
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.entropy import unpack_bits, unpack_columns
from kvferry.errors import CorruptBlobError, IdentityMismatchError

PARAMS = ("rank", "sinks", "step")
_MAX_SINKS = 4096


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """The parameters that a blob was written with, checked."""

    step: float
    sinks: int
    rank: Mapping[str, int]


def sink_count(tokens: tuple[int, int], sinks: int) -> int:
    """How many leading tokens of a page are stored exactly."""
    return max(0, min(sinks, tokens[1]) - tokens[0])


def calibration_of(wanted: Wanted, calibrations: CalibrationSource) -> GroupCalibration:
    """The calibration that a blob names, if it fits the blob.

    Raises: CalibrationMissingError, CorruptBlobError, IdentityMismatchError.
    """
    if not wanted.calibration_id:
        raise CorruptBlobError("calibration id", "is empty")
    known = calibrations.get(wanted.calibration_id)
    if not isinstance(known, GroupCalibration):
        raise CorruptBlobError("calibration id", "names no calibration of a layer group")
    if (known.layers, known.heads) != (wanted.layers, wanted.heads):
        found = f"layers {known.layers}, heads {known.heads}"
        raise IdentityMismatchError("calibration", found, f"{wanted.layers}, {wanted.heads}")
    if known.rope_fingerprint != wanted.rope_fingerprint:
        found = wanted.rope_fingerprint.hex()[:16]
        raise IdentityMismatchError("rope", found, known.rope_fingerprint.hex()[:16])
    if set(known.streams) != set(wanted.shapes):
        raise CorruptBlobError("streams", f"{sorted(wanted.shapes)} are not calibrated")
    for name, shape in wanted.shapes.items():
        if shape[1::2] != (known.streams[name].heads, known.streams[name].dim):
            raise CorruptBlobError(f"stream {name!r}", f"shape {shape} is not calibrated")
    return known


def read_plan(wanted: Wanted, known: GroupCalibration) -> ReadPlan:
    """Raises: CorruptBlobError for parameters that this codec does not write."""
    sec.check_params(wanted, PARAMS)
    step, rank = wanted.params["step"], wanted.params["rank"]
    if type(step) not in (int, float) or not 1e-30 < float(str(step)) < 1e30:
        raise CorruptBlobError("codec parameters", "'step' is no number above 0")
    if not isinstance(rank, dict) or set(rank) != set(known.streams):
        raise CorruptBlobError("codec parameters", "'rank' is not one number per stream")
    for name, value in rank.items():
        if type(value) is not int or not 1 <= value <= known.streams[name].rank:
            raise CorruptBlobError("codec parameters", f"rank {value!r} of stream {name!r}")
    return ReadPlan(float(str(step)), sec.integer(wanted, "sinks", 0, _MAX_SINKS), rank)


def check_page(page: CodedPage, known: GroupCalibration, plan: ReadPlan) -> None:
    """Section names and lengths. Raises: CorruptBlobError."""
    wanted = page.wanted
    exact = sink_count(wanted.tokens, plan.sinks)
    coded = wanted.tokens[1] - wanted.tokens[0] - exact
    parts = ["sinks"] * bool(exact) + ["q"] * bool(coded)
    sec.check_names(page.sections, (f"{name}/{p}" for name in known.streams for p in parts))
    for name, (layers, heads, _, dim) in wanted.shapes.items():
        if exact:
            itemsize = wanted.dtypes[name].storage.itemsize
            sec.check_raw(page.sections[f"{name}/sinks"], layers * heads * exact * dim * itemsize)
        if coded:
            section = page.sections[f"{name}/q"]
            size = coded * plan.rank[name]
            if section.raw_length not in (2 * size, 4 * size):
                raise CorruptBlobError(
                    f"section {section.name!r}", "has another size than its rank"
                )


def read_coefficients(page: CodedPage, name: str, plan: ReadPlan, out: FloatArray) -> None:
    """Dequantized coefficients of a checked page into ``out`` (tokens, rank) float32.

    Raises: CorruptBlobError.
    """
    section = page.sections[f"{name}/q"]
    itemsize = section.raw_length // out.size
    unpack_columns(section.data, itemsize, plan.step, out, f"section {section.name!r}")


def read_sinks(page: CodedPage, name: str, plan: ReadPlan) -> npt.NDArray[np.generic] | None:
    """The exact tokens of a checked page, (layers, heads, tokens, dim); None: it has none.

    Raises: CorruptBlobError.
    """
    exact = sink_count(page.wanted.tokens, plan.sinks)
    if not exact:
        return None
    layers, heads, _, dim = page.wanted.shapes[name]
    section = page.sections[f"{name}/sinks"]
    dtype = page.wanted.dtypes[name].storage
    shape = (layers, heads, exact, dim)
    return unpack_bits(section.data, shape, dtype, f"section {section.name!r}")
