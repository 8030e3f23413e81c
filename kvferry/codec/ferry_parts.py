"""Reading `ferry` blobs: parameters, lengths and coefficients, checked.

Apart from the codec, so that a device decoder can do its own matrix products.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kvferry.codec import sections as sec
from kvferry.codec.base import CodedPage, FloatArray, Wanted
from kvferry.codec.calibrated import Span, check_exact, read_sink_count
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.entropy import unpack_columns
from kvferry.codec.importance import MAX_EXPONENT, factors
from kvferry.errors import CorruptBlobError

PARAMS = ("adapt", "rank", "sinks", "step")


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """The parameters that a blob was written with, checked."""

    step: float
    sinks: int
    rank: Mapping[str, int]


def read_plan(wanted: Wanted, known: GroupCalibration) -> ReadPlan:
    """Raises: CorruptBlobError for parameters that this codec does not write."""
    sec.check_params(wanted, PARAMS)
    step, rank = wanted.params["step"], wanted.params["rank"]
    if type(step) not in (int, float) or not 1e-30 < float(str(step)) < 1e30:
        raise CorruptBlobError("codec parameters", "'step' is no number above 0")
    if not isinstance(rank, dict) or set(rank) != set(known.bundles):
        raise CorruptBlobError("codec parameters", "'rank' is not one number per bundle")
    for name, value in rank.items():
        if type(value) is not int or not 1 <= value <= known.bundles[name].rank:
            raise CorruptBlobError("codec parameters", f"rank {value!r} of streams {name!r}")
    return ReadPlan(float(str(step)), read_sink_count(wanted), rank)


def check_page(page: CodedPage, known: GroupCalibration, plan: ReadPlan) -> None:
    """Section names and lengths. Raises: CorruptBlobError."""
    wanted = page.wanted
    span = Span.of(wanted.tokens, plan.sinks)
    coded = span.coded
    names = [f"{name}/sinks" for name in known.streams] if span.exact else []
    names += [f"{name}/q" for name in known.bundles] if coded else []
    steps = [f"{name}/steps" for name in known.bundles if coded]
    sec.check_names(page.sections, (*names, *(name for name in steps if name in page.sections)))
    check_exact(wanted, page.sections, span.exact)
    if not coded:
        return
    for name in known.bundles:
        section = page.sections[f"{name}/q"]
        size = coded * plan.rank[name]
        if section.raw_length not in (2 * size, 4 * size):
            raise CorruptBlobError(f"section {section.name!r}", "has another size than its rank")
        if f"{name}/steps" in page.sections:
            sec.check_raw(page.sections[f"{name}/steps"], 2 * coded)


def read_coefficients(page: CodedPage, name: str, plan: ReadPlan, out: FloatArray) -> None:
    """Dequantized coefficients of a checked page into ``out`` (tokens, rank) float32.

    Raises: CorruptBlobError.
    """
    section = page.sections[f"{name}/q"]
    itemsize = section.raw_length // out.size
    unpack_columns(section.data, itemsize, plan.step, out, f"section {section.name!r}")
    steps = page.sections.get(f"{name}/steps")
    if steps is None:
        return
    levels = np.empty((len(out), 1), dtype=np.float32)
    unpack_columns(steps.data, 2, 1.0, levels, f"section {steps.name!r}")
    if np.abs(levels).max() > MAX_EXPONENT:
        raise CorruptBlobError(f"section {steps.name!r}", "holds a step that is out of range")
    out *= factors(levels[:, 0].astype(np.int16))[:, None]
