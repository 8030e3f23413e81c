"""Text through the live model, and out comes what `ferry` needs to know about it."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.calibration import (
    CalibrationSet,
    GroupCalibration,
    GroupEntry,
    RateDistortion,
    fit_group,
)
from kvferry.codec.lab.checkpoint import Checkpoint
from kvferry.codec.lab.curve import measure_text, rate_distortion
from kvferry.codec.lab.fisher import CONTINUATION
from kvferry.codec.lab.forward import prefill
from kvferry.codec.lab.gathered import Gathered
from kvferry.codec.lab.plan import FIT_WORK, PASS_WORK, HeldText, Plan, Report, Stopped
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.device import device_products
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.rope import stream_ropes
from kvferry.codec.mlx.shape import ModelShape
from kvferry.errors import ConfigError

__all__ = ["HeldText", "Plan", "Report", "Stopped", "calibrate", "steps_for_bits"]


def calibrate(
    loaded: LoadedModel,
    model_id: bytes,
    tokens: Sequence[int],
    source: str,
    plan: Plan,
    report: Report,
    *,
    held: Sequence[HeldText] = (),
    checkpoint: Checkpoint | None = None,
    seconds: dict[str, float] | None = None,
) -> tuple[CalibrationSet, list[GroupCalibration]]:
    """Fit all layer groups and measure their rate against KL.

    Args:
        tokens: ``plan.fitted_tokens``; without ``held`` then ``plan.held_tokens`` of them.
        source: where the text came from, for people.
        report: called with work done so far, of ``plan.work``, and a note, between
            steps that belong together; may raise `Stopped`.
        held: texts to measure on, ``plan.held_tokens`` of each.
        checkpoint: where the state is kept, and taken from if it is there.
        seconds: gets the time of each step: capture (the text forward), gradients,
            covariances, fitting, curve.
    Raises: ModelError: a cache that is not supported; ConfigError: too little text;
        whatever ``report`` raises.
    """
    wanted = plan.fitted_tokens + (0 if held else plan.held_tokens)
    if len(tokens) != wanted:
        raise ConfigError("text", f"{len(tokens)} tokens", f"{wanted} tokens")
    texts = list(held) or [HeldText("held", tokens[plan.fitted_tokens :])]
    shape = describe(loaded.model, loaded.config)
    run = _Run(loaded.model, model_id, shape, plan, report, checkpoint, seconds)
    groups = run.fit(tokens[: plan.fitted_tokens], source)
    rates = run.curve(texts, groups) if plan.curve_bits else None
    found = CalibrationSet(
        model_id=model_id,
        model_layers=shape.layers,
        model_heads=shape.kv_heads,
        groups=tuple(GroupEntry(g.id, g.layers, g.heads) for g in groups),
        curve=() if rates is None else rates.safe_curve(),
        text_source=source,
        tokens=plan.tokens,
        rates=rates,
    )
    return found, groups


class _Run:
    def __init__(
        self,
        model: Any,
        model_id: bytes,
        shape: ModelShape,
        plan: Plan,
        report: Report,
        checkpoint: Checkpoint | None,
        seconds: dict[str, float] | None,
    ) -> None:
        self._model, self._model_id, self._shape, self._plan = model, model_id, shape, plan
        self._report, self._checkpoint = report, checkpoint
        self._seconds: dict[str, float] = {} if seconds is None else seconds
        self._done = 0.0
        ropes = stream_ropes(model, shape)
        self._gathered = Gathered(model_id, shape, ropes)

    def _advance(self, work: float, note: str) -> None:
        self._done += work
        self._report(self._done, note)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self._seconds[step] = self._seconds.get(step, 0.0) + spent

    def fit(self, tokens: Sequence[int], source: str) -> list[GroupCalibration]:
        """Gather, then fit group by group; each group's covariances go once it is fitted."""
        self._gather(tokens)
        fitted = []
        while self._gathered.groups:
            with self._timed("fitting"):
                made = self._fit_first(source)
            del self._gathered.groups[0]
            fitted.append(made.using(device_products()))
            self._advance(FIT_WORK * (made.layers[1] - made.layers[0]), "fitting")
        return fitted

    def _fit_first(self, source: str) -> GroupCalibration:
        seen, ridge = self._gathered.groups[0], self._plan.ridge
        if self._checkpoint is not None:
            kept = self._checkpoint.load_group(self._model_id, seen.layers)
            if kept is not None:
                return kept
        weights = None if ridge is None else self._gathered.weights(seen, ridge)
        made = fit_group(seen, weights=weights, source=source)
        if self._checkpoint is not None:
            self._checkpoint.save_group(made)
        return made

    def _gather(self, tokens: Sequence[int]) -> None:
        """Sequence after sequence from where a kept state ends."""
        gathered, plan, checkpoint = self._gathered, self._plan, self._checkpoint
        kept = None if checkpoint is None else checkpoint.load(gathered.layout())
        if kept is not None:
            gathered.load(kept)
            passed = sum(start < gathered.covered for start in plan.weighed)
            self._advance(gathered.covered + passed * PASS_WORK, "resumed")
        saved = gathered.covered
        try:
            for start in plan.starts:
                if start < gathered.covered:
                    continue
                self._sequence(tokens, start)
                if checkpoint is not None and checkpoint.due:
                    checkpoint.save(gathered.tensors())
                    saved = gathered.covered
        except Stopped:
            # Raised between two changes of the sums, so they are whole.
            self._keep(saved)
            raise
        self._keep(saved)

    def _keep(self, saved: int) -> None:
        if self._checkpoint is not None and self._gathered.covered > saved:
            self._checkpoint.save(self._gathered.tensors())

    def _sequence(self, tokens: Sequence[int], start: int) -> None:
        plan = self._plan
        end = min(start + plan.sequence, plan.tokens)
        cache = make_prompt_cache(self._model)
        with self._timed("capture"):
            part = tokens[start:end]
            prefill(self._model, part, cache, lambda n: self._advance(n, "reading"))
            snapshot = adapters.snapshot(cache, len(part), latent=self._shape.latent)
        found = None
        if start in plan.weighed:
            with self._timed("gradients"):
                follows = tokens[end : end + CONTINUATION]
                found = self._gathered.fisher.measure(self._model, cache, follows)
        with self._timed("covariances"):
            whole = (0, len(part))
            pages = [snapshot.page(group.layers, whole) for group in self._gathered.groups]
            self._gathered.add(pages, found, end)
        if found is not None:
            self._advance(PASS_WORK, "weighing")

    def curve(
        self, texts: Sequence[HeldText], groups: Sequence[GroupCalibration]
    ) -> RateDistortion:
        """Measure some steps on texts that the bases have not seen."""
        steps = steps_for_bits(groups, sorted(self._plan.curve_bits))
        found = []
        with self._timed("curve"):
            for text in texts:
                found.append(
                    measure_text(
                        self._model,
                        text,
                        groups,
                        steps,
                        self._plan,
                        lambda work: self._advance(work, "measuring"),
                    )
                )
        made = rate_distortion(steps, found)
        if made.prediction is None:
            return made
        # Weights say how errors compare, in no unit of their own: tokens were weighed
        # against each other. The unit is taken from the KL that was measured.
        return rate_distortion(steps, found, scale=made.prediction.median)


def steps_for_bits(groups: Sequence[GroupCalibration], bits: Sequence[float]) -> list[float]:
    """Steps that should give about so many bits per value, coefficients taken as Gaussian."""
    bundles = [bundle for group in groups for bundle in group.bundles.values()]
    sigma = np.concatenate([bundle.sigma for bundle in bundles]).astype(np.float64)
    width = sum(bundle.width for bundle in bundles)

    def estimated(step: float) -> float:
        return float(0.5 * np.log2(1 + 2 * math.pi * math.e * (sigma / step) ** 2).sum() / width)

    found = []
    for wanted in bits:
        low, high = -60.0, 60.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if estimated(2**middle) > wanted else (low, middle)
        found.append(float(2**high))
    return found
