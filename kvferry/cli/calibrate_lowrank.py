"""``kvferry calibrate --codec lowrank``: a basis for every head of a model."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from kvferry.cli.calibrate_run import Texts
from kvferry.codec.calibration import CalibrationSet
from kvferry.codec.lab.checkpoint import Checkpoint
from kvferry.codec.lab.lowrank import LowRankPlan, calibrate, calibration_set, check_streams
from kvferry.codec.lab.memory import lowrank_memory_need
from kvferry.codec.lab.plan import Report
from kvferry.codec.lab.text import CalibrationText
from kvferry.codec.lowrank_calibration import LowRankCalibration
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe
from kvferry.errors import ConfigError


class LowRankPart:
    """See `kvferry.cli.calibrate_run.Part`: a basis per head, nothing to measure on."""

    codec, places = "lowrank", 1

    def __init__(self, tokens: int | None) -> None:
        self.plan = LowRankPlan() if tokens is None else LowRankPlan(tokens=tokens)
        self.tokens = self.plan.tokens

    def load(self, folder: Path) -> CalibrationSet:
        """The set of a folder. Raises: ConfigError: of another codec; CodecError."""
        found, groups = CalibrationSet.load(folder)
        if not isinstance(groups[0], LowRankCalibration):
            raise ConfigError("calibration", str(folder), "of lowrank")
        return found

    def read(self, loaded: LoadedModel, text: CalibrationText, *, own: bool) -> Texts:
        """Raises: ModelError; ConfigError: streams that have no heads."""
        shape = describe(loaded.model, loaded.config)
        check_streams(shape)
        return Texts(
            fitted=text.first_tokens(loaded.tokenizer, self.tokens),
            source=text.source,
            held=(),
            need=lowrank_memory_need(loaded, shape, self.plan),
            work=self.tokens,
        )

    def fit(
        self, loaded: LoadedModel, identity: bytes, texts: Texts, report: Report, kept: Checkpoint
    ) -> LowRankCalibration:
        """Raises: as `calibrate`."""
        return calibrate(loaded, identity, texts.fitted, texts.source, self.plan, report, kept)

    def save(self, fitted: LowRankCalibration, folder: Path) -> CalibrationSet:
        """One group, and the set."""
        made = calibration_set(fitted)
        made.save(folder, [fitted])
        return made

    def to_json(self, fitted: LowRankCalibration, seconds: float) -> Mapping[str, object]:
        """What ranks leave out, and which directions are empty."""
        return {
            "group_id": fitted.id.hex(),
            "norm": fitted.norm,
            "empty_directions": _empty(fitted),
            "lost_variance": _lost(fitted),
        }

    def lines(self, fitted: LowRankCalibration) -> Iterator[str]:
        """The same for people."""
        for name, shares in sorted(_lost(fitted).items(), reverse=True):
            told = ", ".join(f"{rank}: {100 * share:.2f} %" for rank, share in shares.items())
            yield f"variance of {name} that a rank leaves out, mean of heads: {told}"
        empty = _empty(fitted) or "none"
        yield f"norm before attention: {fitted.norm}; empty directions: {empty}"


def _empty(fitted: LowRankCalibration) -> dict[str, int]:
    return {name: int(flags.sum()) for name, flags in fitted.nulls.items()}


def _lost(fitted: LowRankCalibration) -> dict[str, dict[str, float]]:
    return {
        name: {str(rank): float(basis.lost(rank).mean()) for rank in _ranks(basis.dim)}
        for name, basis in fitted.bases.items()
    }


def _ranks(dim: int) -> list[int]:
    """Some that are common: 60, 56, 48 and 32 of 64."""
    return sorted({max(1, dim * share // 16) for share in (15, 14, 12, 8)}, reverse=True)
