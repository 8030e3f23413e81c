"""Text through the live model, and out comes a calibration of the published codec."""

from collections.abc import Sequence
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.base import PageTensors
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.kvtc_calibration import KvtcCalibration
from kvferry.codec.lab.checkpoint import Checkpoint
from kvferry.codec.lab.forward import prefill
from kvferry.codec.lab.kvtc_state import KvtcGathered, KvtcPlan
from kvferry.codec.lab.plan import Report, Stopped
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.rope import stream_ropes
from kvferry.codec.mlx.shape import ModelShape
from kvferry.errors import ConfigError

__all__ = ["APART_TOKENS", "KvtcPlan", "calibrate", "calibration_work"]

APART_TOKENS = 1024
# One basis, and its errors, cost about as much as prefilling so many tokens.
_FIT_WORK = 4096.0


def calibration_work(tokens: int, streams: int) -> float:
    """What `calibrate` reports at its end, in prefilled tokens; ``tokens`` of all texts."""
    return tokens + streams * _FIT_WORK


def calibrate(
    loaded: LoadedModel,
    model_id: bytes,
    tokens: Sequence[int],
    source: str,
    plan: KvtcPlan,
    report: Report,
    apart: Sequence[Sequence[int]] = (),
    checkpoint: Checkpoint | None = None,
) -> KvtcCalibration:
    """One basis per stream over all layers and heads, and plans for common ratios.

    Args:
        tokens: of text, ``plan.tokens``.
        source: where the text came from, for people.
        report: called with work done so far, of `calibration_work`, and a note; may raise
            `Stopped`.
        apart: tokens of other texts; what quantization costs is measured on them, or on
            ``tokens`` where there are none.
        checkpoint: where the state is kept, and taken from if it is there.
    Raises: ModelError: a cache that is not supported; ConfigError: too little text, or a
        model that is too wide for one basis; whatever ``report`` raises.
    """
    if len(tokens) != plan.tokens:
        raise ConfigError("text", f"{len(tokens)} tokens", f"{plan.tokens} tokens")
    shape = describe(loaded.model, loaded.config)
    run = _Run(loaded.model, model_id, shape, plan, report, checkpoint, apart)
    run.gather(tokens)
    return run.finish(source)


class _Run:
    def __init__(
        self,
        model: Any,
        model_id: bytes,
        shape: ModelShape,
        plan: KvtcPlan,
        report: Report,
        checkpoint: Checkpoint | None,
        apart: Sequence[Sequence[int]],
    ) -> None:
        self._model, self._model_id, self._shape = model, model_id, shape
        self._plan, self._report, self._checkpoint = plan, report, checkpoint
        self._apart, self._done = apart, 0.0
        ropes = stream_ropes(model, shape)
        self._gathered = KvtcGathered(model_id, shape, ropes, [len(part) for part in apart])

    def _advance(self, work: float, note: str) -> None:
        self._done += work
        self._report(self._done, note)

    def gather(self, tokens: Sequence[int]) -> None:
        """Sequence after sequence, then the texts apart, from where a kept state ends."""
        gathered, checkpoint = self._gathered, self._checkpoint
        kept = None if checkpoint is None else checkpoint.load(gathered.layout())
        if kept is not None:
            gathered.load(kept)
            measured = self._apart[: gathered.measured]
            self._advance(gathered.covered + sum(map(len, measured)), "resumed")
        saved = self._progress
        try:
            for start in range(gathered.covered, len(tokens), self._plan.sequence):
                gathered.add(self._read(tokens[start : start + self._plan.sequence]))
                if checkpoint is not None and checkpoint.due:
                    checkpoint.save(gathered.tensors())
                    saved = self._progress
            for part in self._apart[gathered.measured :]:
                gathered.measure_on(self._read(part))
        except Stopped:
            # Raised between two changes of the sums, so they are whole.
            self._keep(saved)
            raise
        self._keep(saved)

    @property
    def _progress(self) -> tuple[int, int]:
        return self._gathered.covered, self._gathered.measured

    def _keep(self, saved: tuple[int, int]) -> None:
        if self._checkpoint is not None and self._progress > saved:
            self._checkpoint.save(self._gathered.tensors())

    def _read(self, part: Sequence[int]) -> PageTensors:
        cache = make_prompt_cache(self._model)
        prefill(self._model, part, cache, lambda count: self._advance(count, "reading"))
        snapshot = adapters.snapshot(cache, len(part), latent=self._shape.latent)
        return snapshot.page((0, self._shape.layers), (0, len(part)))

    def finish(self, source: str) -> KvtcCalibration:
        """Basis after basis, each kept once it is fitted; then errors and plans."""
        fitted = {}
        for name in sorted(self._shape.streams):
            self._report(self._done, "fitting")
            fitted[name] = self._fit(name, source)
            self._done += _FIT_WORK
        made = self._gathered.fit.finish(source, fitted)
        self._report(self._done, "fitting")
        return made

    def _fit(self, name: str, source: str) -> GroupCalibration:
        layers, checkpoint = (0, self._shape.layers), self._checkpoint
        if checkpoint is not None:
            kept = checkpoint.load_group(self._model_id, layers, name)
            if kept is not None:
                return kept
        made = self._gathered.fit.fit(name, source)
        if checkpoint is not None:
            checkpoint.save_group(made, name)
        return made
