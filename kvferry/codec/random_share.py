"""The control of every codec that chooses tokens: a random share of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from kvferry.codec import dropping as drop
from kvferry.codec import options as opts
from kvferry.codec.base import (
    CalibrationSource,
    Encoded,
    PageTensors,
    Positions,
    Wanted,
)
from kvferry.codec.uncalibrated import Uncalibrated
from kvferry.proto.container import SectionData

MAX_SEED = (1 << 53) - 1  # exact in any JSON
DEFAULT_RATIO = 4.0


@dataclass(frozen=True, slots=True)
class RandomCodec(Uncalibrated):
    """Keep tokens by lot, exactly, and forget the others.

    A token's lot depends on ``seed`` and its position alone: all layers keep the same
    ones, and so does every machine.

    Attributes:
        ratio: tokens for each that is kept, at least one is.
        sinks: tokens at the start of a sequence that are kept whatever their lot. Most
            models lose far more with the very first token than with any other: a codec
            that keeps it is to be compared with as many sinks here.
        seed: another choice for another number.
        positions: "contiguous" or "original": where the model sees what is left.
    """

    name: ClassVar[str] = "random"
    version: ClassVar[int] = 1
    whole_context: ClassVar[bool] = True

    ratio: float = DEFAULT_RATIO
    sinks: int = 0
    seed: int = 0
    positions: str = drop.PLACES[0]

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        drop.check_common(self.ratio, self.sinks, self.positions)
        opts.whole_within("seed", self.seed, 0, MAX_SEED)

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> Self:
        """``keep`` (a share) or ``ratio``, ``sinks``, ``seed``, ``positions``.

        Raises: ConfigError.
        """
        opts.check_names(cls.name, options, ("keep", "ratio", "sinks", "seed", "positions"))
        drop.only_one(options, ("keep", "ratio"))
        ratio = drop.ratio_option(options.get("ratio", DEFAULT_RATIO))
        if "keep" in options:
            ratio = 1 / opts.number_within("keep", options["keep"], 1 / drop.MAX_RATIO, 1)
        return cls(
            ratio,
            drop.sinks_option(options, 0),
            opts.whole_within("seed", options.get("seed", 0), 0, MAX_SEED),
            drop.place_option(options),
        )

    @property
    def params(self) -> Mapping[str, object]:
        """``positions``, ``ratio``, ``seed``, ``sinks``."""
        return {
            "positions": self.positions,
            "ratio": self.ratio,
            "seed": self.seed,
            "sinks": self.sinks,
        }

    def encode(self, page: PageTensors) -> Encoded:
        """Raises: UnsupportedTensorError for states, and for pages whose heads differ."""
        positions = drop.positions_in(page)
        if positions.ndim > 1:
            positions = np.arange(page.entries, dtype=np.int64)  # refused when taken
        count = min(page.entries, max(1, round(page.entries / self.ratio)))
        order = lots(positions, self.seed)
        order[positions < self.sinks] = 0
        kept = np.sort(np.argsort(order, kind="stable")[:count]).astype(np.int64)
        return drop.encode_entries(self.name, page, kept, self.positions)

    def decode(
        self,
        wanted: Wanted,
        sections: Mapping[str, SectionData],
        calibrations: CalibrationSource,
    ) -> PageTensors:
        """A page with `PageTensors.kept`. Raises: CorruptBlobError."""
        drop.check_params(wanted, ("positions", "seed", "sinks"), ("ratio",))
        return drop.decode_entries(self.name, wanted, sections)


def lots(positions: Positions, seed: int) -> npt.NDArray[np.uint64]:
    """A number above 0 for each position, as if drawn by lot: SplitMix64 (Steele et al. 2014)."""
    start = _mixed(np.array([seed], dtype=np.uint64))
    return _mixed(start + positions.astype(np.uint64)) | np.uint64(1)


def _mixed(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
