"""``kvferry calibrate --codec kvtc``: what the published codec needs to know."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from kvferry.cli.calibrate_run import Texts
from kvferry.codec.calibration import CalibrationSet
from kvferry.codec.kvtc_calibration import KvtcCalibration
from kvferry.codec.lab.checkpoint import Checkpoint
from kvferry.codec.lab.held import held_texts
from kvferry.codec.lab.kvtc import APART_TOKENS, KvtcPlan, calibrate, calibration_work
from kvferry.codec.lab.memory import kvtc_memory_need
from kvferry.codec.lab.plan import Report
from kvferry.codec.lab.text import CalibrationText, held_text
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe


class KvtcPart:
    """See `kvferry.cli.calibrate_run.Part`: a basis per stream, and plans."""

    codec, places = "kvtc", 0

    def __init__(self, tokens: int | None) -> None:
        self.plan = KvtcPlan() if tokens is None else KvtcPlan(tokens=tokens)
        self.tokens = self.plan.tokens

    def load(self, folder: Path) -> CalibrationSet:
        """The set of a folder with errors and plans. Raises: ConfigError, CodecError."""
        return KvtcCalibration.load(folder)[0]

    def read(self, loaded: LoadedModel, text: CalibrationText, *, own: bool) -> Texts:
        """Raises: ModelError."""
        given = text.first_tokens(loaded.tokenizer, self.tokens)
        held = held_texts(loaded.tokenizer, APART_TOKENS, held_text())
        apart = [found.tokens for found in held]
        shape = describe(loaded.model, loaded.config)
        return Texts(
            fitted=given,
            source=text.source,
            held=held,
            need=kvtc_memory_need(loaded, shape, self.plan, apart),
            work=calibration_work(self.tokens + sum(map(len, apart)), len(shape.streams)),
        )

    def fit(
        self, loaded: LoadedModel, identity: bytes, texts: Texts, report: Report, kept: Checkpoint
    ) -> KvtcCalibration:
        """Raises: as `calibrate`."""
        apart = [found.tokens for found in texts.held]
        given, source = texts.fitted, texts.source
        return calibrate(loaded, identity, given, source, self.plan, report, apart, kept)

    def save(self, fitted: KvtcCalibration, folder: Path) -> CalibrationSet:
        """Errors and plans too."""
        return fitted.save(folder)

    def to_json(self, fitted: KvtcCalibration, seconds: float) -> Mapping[str, object]:
        """Columns of each basis."""
        return {"rank": {name: bundle.rank for name, bundle in fitted.bundles.items()}}

    def lines(self, fitted: KvtcCalibration) -> Iterator[str]:
        """Nothing more."""
        return iter(())
