"""The largest compression whose loss stays within a bound on every text given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvferry.codec.calibration import CurvePoint, GroupCalibration, step_on_curve
from kvferry.codec.lab.evaluate import Evaluation, Prepared, measure
from kvferry.codec.lab.forward import Done
from kvferry.codec.lab.knobs import Knob, Options
from kvferry.codec.lab.search import Found, coarsest, coarsest_of, last_of
from kvferry.errors import ConfigError

DEFAULT_BUDGET = 8


@dataclass(frozen=True, slots=True)
class Bound:
    """What no text may exceed.

    Attributes:
        metric: "kl_mean" in nats, or "ppl_delta_pct": growth of perplexity in per cent
            (a fall is no loss).
        limit: above 0.
    """

    metric: str
    limit: float

    def __post_init__(self) -> None:
        if not 0 < self.limit < 1e9:
            name = "--max-kl" if self.metric == "kl_mean" else "--max-ppl-delta"
            raise ConfigError(name, self.limit, "a number above 0")

    def error(self, result: Evaluation) -> float:
        """What is bounded."""
        found = result.found
        return found.kl_mean if self.metric == "kl_mean" else found.ppl_delta_pct


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """One setting and what it came to; texts after the first beyond the bound are left out.

    Attributes:
        results: text's name -> measured, in the order given.
        error: the worst of them.
    """

    options: Options
    results: Mapping[str, Evaluation]
    error: float

    @property
    def ratio(self) -> float:
        """fp16 bytes of all texts measured over the bytes shipped for them."""
        values = sum(result.pages.values for result in self.results.values())
        return 2 * values / sum(result.pages.blob_bytes for result in self.results.values())


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """The best setting, measured on all texts, and all that was tried, in order."""

    best: Trial
    trials: Sequence[Trial]

    def measured(self, model: str) -> list[dict[str, object]]:
        """One object per text: that of ``kvferry eval``, with the text's name."""
        return [
            {"text": name, **result.to_json(model)} for name, result in self.best.results.items()
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Tuner:
    """The search for one codec.

    Attributes:
        texts: name -> prepared text, all of one size.
        knob: what is turned.
        groups, curve: the model's calibration, for codecs that need one.
        budget: settings that may be measured.
        done: called with numbers of tokens run.
        report: called with each setting that was tried.
    """

    texts: Mapping[str, Prepared]
    knob: Knob
    bound: Bound
    groups: Sequence[GroupCalibration] = ()
    curve: Sequence[CurvePoint] = ()
    budget: int = DEFAULT_BUDGET
    done: Done = lambda tokens: None
    report: Callable[[Trial], None] = lambda trial: None

    def run(self) -> Tuned:
        """Raises: ConfigError: no setting keeps the bound; CodecError; ModelError."""
        trials: dict[float, Trial] = {}
        order = list(self.texts)

        def error(value: float) -> float:
            trial = trials[value] = self._try(value, order)
            # The text that suffers most comes first: a setting that is too coarse mostly
            # needs no other.
            order.sort(key=lambda name: -_error_of(trial, name, self.bound))
            self.report(trial)
            return trial.error

        best, finest = self._search(error)
        if best is None:
            raise self._out_of_reach(finest, trials[finest.value])
        return Tuned(trials[best.value], list(trials.values()))

    def _search(self, error: Callable[[float], float]) -> tuple[Found | None, Found]:
        if self.knob.table:
            return last_of(error, self.knob.settings, self.bound.limit)
        if not self.knob.free:
            return coarsest_of(error, self.knob.settings, self.bound.limit)
        return coarsest(error, self._start(), self.bound.limit, self.budget)

    def _start(self) -> float:
        if self.knob.option == "step" and self.bound.metric == "kl_mean" and self.curve:
            return step_on_curve(self.curve, self.bound.limit)
        return self.knob.settings[len(self.knob.settings) // 2]

    def _try(self, value: float, order: Sequence[str]) -> Trial:
        options = self.knob.options(value)
        results: dict[str, Evaluation] = {}
        worst = float("-inf")
        for name in order:
            text = self.texts[name]
            setup = text.setup(self.knob.codec, options, self.groups, self.curve)
            results[name] = measure(text, setup, self.done)
            error = self.bound.error(results[name])
            if not error <= self.bound.limit:  # also where it is no number
                worst = error
                break
            worst = max(worst, error)
        given = {name: results[name] for name in self.texts if name in results}
        return Trial(options, given, worst)

    def _out_of_reach(self, finest: Found, trial: Trial) -> ConfigError:
        name = "--max-kl" if self.bound.metric == "kl_mean" else "--max-ppl-delta"
        shown = " ".join(f"{name}={_short(value)}" for name, value in trial.options.items())
        text = max(trial.results, key=lambda name: _error_of(trial, name, self.bound))
        allowed = (
            f"larger: the finest setting tried of {self.knob.codec} ({shown or 'the only one'}) "
            f"gives {finest.error:.3g} on {text}"
        )
        return ConfigError(name, self.bound.limit, allowed)


def _error_of(trial: Trial, name: str, bound: Bound) -> float:
    return bound.error(trial.results[name]) if name in trial.results else float("-inf")


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
