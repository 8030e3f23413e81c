"""What a live calibration needs the model for, in pieces that a request can wait for."""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.base import PageTensors
from kvferry.codec.calibration import GroupCalibration, RateDistortion, StreamCurve, TextCurve
from kvferry.codec.calibration_curve import total_prediction
from kvferry.codec.lab.calibrate import steps_for_bits
from kvferry.codec.lab.coding import group_codecs, join_layers
from kvferry.codec.lab.compare import compare
from kvferry.codec.lab.curve import code_group, rate_distortion, stream_curves, total_bits
from kvferry.codec.lab.gathered import Gathered
from kvferry.codec.mlx.adapters import CacheSnapshot
from kvferry.codec.mlx.refill import restore
from kvferry.proto.keys import WINDOW_TOKENS

SAMPLE_TOKENS = 768
HELD_MIN_TOKENS = 512
CURVE_BITS = (0.3, 0.6, 1.0, 1.6)
_CONTINUED = 96  # tokens of a held text that are predicted
# (cached, continuation) of a backward pass, from cheap to good; the window is left out.
_PASS_SIZES = ((192, 24), (320, 48), (448, 64), (672, 96))
_FIRST_TOKENS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Tokens with the cache that the model made of them, on the host."""

    tokens: tuple[int, ...]
    page: PageTensors

    @classmethod
    def of(cls, tokens: Sequence[int], snapshot: CacheSnapshot) -> "Sample":
        """The first `SAMPLE_TOKENS` of a cache; copied, so that the cache can go."""
        held = min(len(tokens), snapshot.tokens, SAMPLE_TOKENS)
        return cls(tuple(tokens[:held]), snapshot.page(snapshot.layers, (0, held)))


@dataclass(slots=True)
class Measured:
    """A curve on its way."""

    rates: RateDistortion | None = None
    _ready: threading.Event = field(default_factory=threading.Event)

    def wait(self, timeout_s: float) -> bool:
        """Whether it is there."""
        return self._ready.wait(timeout_s)

    def set(self, rates: RateDistortion) -> None:
        """It is."""
        self.rates = rates
        self._ready.set()


class _Pace:
    """What a unit of work took, so that a piece fits into a budget."""

    def __init__(self) -> None:
        self._per_unit = 0.0

    def fits(self, units: float, budget_s: float) -> bool:
        """Whether so much work fits; where nothing was measured, yes."""
        return self._per_unit * units <= budget_s

    def most(self, budget_s: float, otherwise: int) -> int:
        """Units that fit; ``otherwise`` where nothing was measured."""
        return otherwise if not self._per_unit else int(budget_s / self._per_unit)

    def add(self, units: float, seconds: float) -> None:
        """Take in a measurement; a slower one counts at once, a faster one by half."""
        found = seconds / units
        self._per_unit = max(found, (found + self._per_unit) / 2)


class IdleWork:
    """Backward passes, then a curve, one piece a call of `run`.

    `run` belongs to the model's thread; the rest to the gathering thread.

    Args:
        model: whole, or None: nothing of this is possible.
        passes: backward passes wanted.
    """

    def __init__(self, model: Any | None, gathered: Gathered, passes: int) -> None:
        self._model, self._gathered, self._passes = model, gathered, passes
        self.called = False
        self._samples: deque[Sample] = deque(maxlen=2)
        self._curve: _Curve | None = None
        self._lock = threading.Lock()
        self._pass_pace, self._compare_pace = _Pace(), _Pace()

    @property
    def possible(self) -> bool:
        """Whether `run` could do anything."""
        return self._model is not None

    @property
    def weighed(self) -> bool:
        """Whether all backward passes are done."""
        return self._gathered.fisher.passes >= self._passes

    def enough(self) -> None:
        """No more passes: the sums are about to be read."""
        self._passes = 0

    def weigh(self, sample: Sample) -> None:
        """Text for a backward pass; the oldest goes where there are too many."""
        with self._lock:
            self._samples.append(sample)

    def measure(self, groups: Sequence[GroupCalibration], held: Sequence[Sample]) -> Measured:
        """Code the held texts now; `run` then feeds the model with what came back."""
        curve = _Curve(groups, held)
        with self._lock:
            self._samples.clear()
            self._curve = curve
        return curve.result

    def drop(self) -> None:
        """Let go of all that is kept."""
        with self._lock:
            self._samples.clear()
            self._curve = None

    def run(self, budget_s: float) -> bool:
        """One piece of at most ``budget_s`` as far as can be foreseen. True: there is more."""
        if self._model is None:
            return False
        self.called = True
        with self._lock:
            curve = self._curve
            sample = self._samples.popleft() if self._samples and not self.weighed else None
        if curve is not None:
            return curve.run(self._model, budget_s, self._compare_pace)
        if sample is None:
            return False
        self._weigh(sample, budget_s)
        return bool(self._samples)

    def _weigh(self, sample: Sample, budget_s: float) -> None:
        sizes = [s for s in _PASS_SIZES if sum(s) <= len(sample.tokens)]
        fitting = [s for s in sizes if self._pass_pace.fits(sum(s), budget_s)]
        if not fitting:
            return
        # The first one is the smallest: nothing is known of its pace yet.
        held, follow = fitting[-1] if self._gathered.fisher.passes else fitting[0]
        started = time.monotonic()
        cache = make_prompt_cache(self._model)
        restore(cache, [sample.page.cut_tokens((0, held))])
        found = self._gathered.fisher.measure(
            self._model, cache, sample.tokens[held : held + follow]
        )
        self._gathered.weigh(sample.page.cut_tokens((0, held)), found)
        self._pass_pace.add(held + follow, time.monotonic() - started)


class _Curve:
    """Held texts coded at some steps, and how far the comparison has come."""

    def __init__(self, groups: Sequence[GroupCalibration], held: Sequence[Sample]) -> None:
        self.result = Measured()
        self._steps = steps_for_bits(groups, CURVE_BITS)
        self._weighted = any(s.weight is not None for s in groups[0].streams.values())
        self._texts = deque(
            _CodedText.of(f"live {number}", sample, groups, self._steps)
            for number, sample in enumerate(held, start=1)
        )
        self._found: list[tuple[TextCurve, list[StreamCurve]]] = []

    def run(self, model: Any, budget_s: float, pace: _Pace) -> bool:
        """The next piece. False: the curve is there."""
        if not self._texts:
            return False
        text = self._texts[0]
        if text.run(model, budget_s, pace):
            return True
        self._found.append(text.curve())
        self._texts.popleft()
        if self._texts:
            return True
        self.result.set(self._rates())
        return False

    def _rates(self) -> RateDistortion:
        made = rate_distortion(self._steps, self._found)
        if self._weighted or made.prediction is None:
            return made
        return rate_distortion(self._steps, self._found, scale=made.prediction.median)


class _CodedText:
    """One held text: its cache at each step, fed token by token as time allows."""

    def __init__(
        self, name: str, sample: Sample, context: int, coded: Sequence[PageTensors]
    ) -> None:
        self._name, self._sample, self._context = name, sample, context
        end = len(sample.tokens) - _CONTINUED
        window = sample.page.cut_tokens((context, end))
        whole = sample.page.cut_tokens((0, end))
        self._waiting = deque([[whole], *([page, window] for page in coded)])
        self._caches: list[list[Any]] = []
        self._fed = end
        self._sums = [0.0] * len(coded)
        self.streams: list[StreamCurve] = []

    @classmethod
    def of(
        cls,
        name: str,
        sample: Sample,
        groups: Sequence[GroupCalibration],
        steps: Sequence[float],
    ) -> "_CodedText":
        context = len(sample.tokens) - _CONTINUED - WINDOW_TOKENS
        exact = sample.page.cut_tokens((0, context))
        parts = [exact.cut_layers(group.layers) for group in groups]
        coded_at, pages = [], []
        for step in steps:
            codecs = group_codecs("ferry", {"step": step}, [g.layers for g in groups], groups)
            coded = [
                code_group([part], codecs[g.layers], g)
                for part, g in zip(parts, groups, strict=True)
            ]
            pages.append(join_layers([c.pages[0] for c in coded]))
            coded_at.append(coded)
        made = cls(name, sample, context, pages)
        made.streams = stream_curves(groups, coded_at)
        return made

    def run(self, model: Any, budget_s: float, pace: _Pace) -> bool:
        """Fill one cache, or feed some tokens to all of them. False: all were fed."""
        if self._waiting:
            cache = make_prompt_cache(model)
            restore(cache, self._waiting.popleft())
            self._caches.append(cache)
            return True
        caches = len(self._caches)
        most = max(1, pace.most(budget_s, _FIRST_TOKENS * caches) // caches)
        end = min(self._fed + most, len(self._sample.tokens) - 1)
        started = time.monotonic()
        tokens = self._sample.tokens[self._fed : end + 1]
        found = compare(model, self._caches[0], self._caches[1:], tokens)
        pace.add((end - self._fed) * caches, time.monotonic() - started)
        for index, comparison in enumerate(found):
            self._sums[index] += max(0.0, comparison.kl_mean) * (end - self._fed)
        self._fed = end
        return self._fed < len(self._sample.tokens) - 1

    def curve(self) -> tuple[TextCurve, list[StreamCurve]]:
        """What was found."""
        self._caches.clear()
        count = _CONTINUED - 1
        return (
            TextCurve(
                name=self._name,
                tokens=count,
                bits=total_bits(self.streams),
                kl=tuple(math.fsum([total]) / count for total in self._sums),
                predicted=total_prediction(self.streams),
            ),
            self.streams,
        )
