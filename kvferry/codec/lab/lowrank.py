"""Text through the live model, and out comes a calibration of `lowrank`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.calibration import CalibrationSet, GroupEntry
from kvferry.codec.covariance import SavedLayout, SavedTensors
from kvferry.codec.lab.checkpoint import Checkpoint
from kvferry.codec.lab.forward import prefill
from kvferry.codec.lab.plan import MIN_TOKENS, Report, Stopped
from kvferry.codec.lowrank_calibration import LowRankCalibration
from kvferry.codec.lowrank_fit import HeadAccumulator
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.norms import attention_norms
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.rope import stream_ropes
from kvferry.codec.mlx.shape import ModelShape
from kvferry.errors import CalibrationCorruptError, ConfigError

_COVERED = "covered"


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankPlan:
    """How much text there is to read. Sizes in tokens.

    Attributes:
        tokens: to fit on. A head has 64 to 256 directions, so that a few thousand do.
        sequence: such many at a time.
    """

    tokens: int = 8192
    sequence: int = 1024

    def __post_init__(self) -> None:
        if self.tokens < MIN_TOKENS:
            raise ConfigError("tokens", self.tokens, f"at least {MIN_TOKENS}")

    def to_json(self) -> Mapping[str, object]:
        """All that tells one run's result from another's."""
        return {"codec": "lowrank", **asdict(self)}


def check_streams(shape: ModelShape) -> None:
    """Raises: ConfigError: a model whose cache is not of K and V alone."""
    found = ", ".join(shape.streams)
    if set(shape.streams) != {"k", "v"}:
        allowed = f"another: this model caches {found or 'no rows'}, and lowrank codes K and V"
        raise ConfigError("codec", "lowrank", allowed)


def calibrate(
    loaded: LoadedModel,
    model_id: bytes,
    tokens: Sequence[int],
    source: str,
    plan: LowRankPlan,
    report: Report,
    checkpoint: Checkpoint | None = None,
) -> LowRankCalibration:
    """A basis per layer, head and stream, all layers and heads.

    Args:
        tokens: of text, ``plan.tokens``.
        source: where the text came from, for people.
        report: called with tokens done so far, and a note; may raise `Stopped`.
        checkpoint: where the state is kept, and taken from if it is there.
    Raises: ModelError: a cache that is not supported; ConfigError: too little text;
        whatever ``report`` raises.
    """
    if len(tokens) != plan.tokens:
        raise ConfigError("text", f"{len(tokens)} tokens", f"{plan.tokens} tokens")
    shape = describe(loaded.model, loaded.config)
    check_streams(shape)
    ropes = stream_ropes(loaded.model, shape)
    seen = HeadAccumulator(
        model_id=model_id,
        layers=(0, shape.layers),
        heads=(0, shape.kv_heads),
        shapes={name: (stream.heads, stream.dim) for name, stream in shape.streams.items()},
        ropes=ropes,
    )
    _gather(loaded.model, shape, seen, tokens, plan, report, checkpoint)
    report(float(plan.tokens), "fitting")
    norms = attention_norms(loaded.model, shape, ropes)
    return seen.finish(source, norm=norms.kind, nulls=norms.nulls)


def calibration_set(made: LowRankCalibration) -> CalibrationSet:
    """The set of this one group, as folders hold it."""
    return CalibrationSet(
        model_id=made.model_id,
        model_layers=made.layers[1],
        model_heads=made.heads[1],
        groups=(GroupEntry(made.id, made.layers, made.heads),),
        text_source=made.source,
        tokens=made.tokens,
    )


def _gather(
    model: Any,
    shape: ModelShape,
    seen: HeadAccumulator,
    tokens: Sequence[int],
    plan: LowRankPlan,
    report: Report,
    checkpoint: Checkpoint | None,
) -> None:
    """Sequence after sequence, from where a kept state ends."""
    done = 0
    kept = None if checkpoint is None else checkpoint.load(_layout(seen))
    if kept is not None:
        done = _load(seen, kept)
        report(float(done), "resumed")
    saved, read = done, done

    def advance(count: int) -> None:
        nonlocal read
        read += count
        report(float(read), "reading")

    try:
        for start in range(done, len(tokens), plan.sequence):
            part = tokens[start : start + plan.sequence]
            cache = make_prompt_cache(model)
            prefill(model, part, cache, advance)
            snapshot = adapters.snapshot(cache, len(part), latent=shape.latent)
            seen.add(snapshot.page((0, shape.layers), (0, len(part))))
            done = start + len(part)
            if checkpoint is not None and checkpoint.due:
                checkpoint.save(_tensors(seen, done))
                saved = done
    except Stopped:
        # Raised between two changes of the sums, so they are whole.
        if checkpoint is not None and done > saved:
            checkpoint.save(_tensors(seen, done))
        raise


def _layout(seen: HeadAccumulator) -> SavedLayout:
    return {_COVERED: ((1,), "<i8"), **seen.layout()}


def _tensors(seen: HeadAccumulator, done: int) -> SavedTensors:
    return {_COVERED: np.array([done], dtype="<i8"), **seen.tensors()}


def _load(seen: HeadAccumulator, kept: SavedTensors) -> int:
    try:
        seen.load(kept)
        return int(kept[_COVERED][0])
    except KeyError as exc:
        raise CalibrationCorruptError("checkpoint", f"tensor {exc} is missing") from exc
