"""``kvferry calibrate``: bases and curves of the default codec."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from kvferry.cli.calibrate_run import Texts
from kvferry.codec.calibration import CalibrationSet, GroupCalibration
from kvferry.codec.lab.calibrate import calibrate
from kvferry.codec.lab.checkpoint import Checkpoint
from kvferry.codec.lab.held import held_texts
from kvferry.codec.lab.memory import memory_need
from kvferry.codec.lab.plan import Plan, Report
from kvferry.codec.lab.text import CalibrationText, held_text
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe

DEFAULT_TOKENS = 16384
Fitted = tuple[CalibrationSet, list[GroupCalibration]]


class FerryPart:
    """See `kvferry.cli.calibrate_run.Part`; what it fits is a set and its groups.

    Args: fisher: whether bases are weighted by what the model's output feels.
    """

    codec, places = "ferry", 0

    def __init__(self, tokens: int | None, *, fisher: bool) -> None:
        self.tokens = DEFAULT_TOKENS if tokens is None else tokens
        self.plan = Plan(tokens=self.tokens) if fisher else Plan(tokens=self.tokens, ridge=None)
        self._seconds: dict[str, float] = {}

    def load(self, folder: Path) -> CalibrationSet:
        """The set of a folder. Raises: ConfigError, CodecError."""
        return CalibrationSet.load(folder)[0]

    def read(self, loaded: LoadedModel, text: CalibrationText, *, own: bool) -> Texts:
        """Of the user's own text what follows is measured on too. Raises: ModelError."""
        plan = self.plan
        count = plan.fitted_tokens + (plan.held_tokens if own else 0)
        tokens = text.first_tokens(loaded.tokenizer, count)
        rest = tokens[plan.fitted_tokens :]
        held = held_texts(loaded.tokenizer, plan.held_tokens, held_text(), rest)
        return Texts(
            fitted=tokens[: plan.fitted_tokens],
            source=text.source,
            held=held,
            need=memory_need(loaded, describe(loaded.model, loaded.config), plan),
            work=plan.work(len(loaded.model.layers), len(held)),
        )

    def fit(
        self, loaded: LoadedModel, identity: bytes, texts: Texts, report: Report, kept: Checkpoint
    ) -> Fitted:
        """Raises: as `calibrate`."""
        return calibrate(
            loaded,
            identity,
            texts.fitted,
            texts.source,
            self.plan,
            report,
            held=texts.held,
            checkpoint=kept,
            seconds=self._seconds,
        )

    def save(self, fitted: Fitted, folder: Path) -> CalibrationSet:
        """A file for each group, and the set."""
        made, groups = fitted
        made.save(folder, groups)
        return made

    def to_json(self, fitted: Fitted, seconds: float) -> Mapping[str, object]:
        """Groups, curves, and what each step took."""
        made, _ = fitted
        stored = made.to_json()
        steps = self._seconds | {"whole": seconds}
        after = [spent for name, spent in steps.items() if name not in ("whole", "capture")]
        return {
            "groups": [list(group.layers) for group in made.groups],
            "step_seconds": steps,
            "seconds_after_capture": sum(after),
            "seconds_after_passes": sum(after) - steps.get("gradients", 0.0),
            "curve": stored["curve"],
            "rate_distortion": stored.get("rate_distortion"),
        }

    def lines(self, fitted: Fitted) -> Iterator[str]:
        """The curve, and how well it predicts."""
        made, _ = fitted
        for point in made.curve:
            ratio = 16 / point.bits_per_value
            yield f"{ratio:6.1f}x  KL {point.kl:.4f}  step {point.step:.4g}"
        if made.rates is not None and (held := made.rates.prediction) is not None:
            texts = ", ".join(text.name for text in made.rates.texts)
            yield (
                f"KL: the highest of {texts}; measured / predicted: "
                f"{held.median:.2f} (median), {held.worst:.2f} (worst)"
            )
