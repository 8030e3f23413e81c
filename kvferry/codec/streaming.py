"""StreamingLLM's choice: the first tokens of a sequence and the most recent ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from kvferry.codec import dropping as drop
from kvferry.codec import options as opts
from kvferry.codec.base import (
    CalibrationSource,
    Encoded,
    PageTensors,
    Wanted,
)
from kvferry.codec.uncalibrated import Uncalibrated
from kvferry.proto.container import SectionData
from kvferry.proto.keys import SINK_TOKENS

MAX_WINDOW = 1 << 24
DEFAULT_RATIO = 4.0


@dataclass(frozen=True, slots=True)
class StreamingCodec(Uncalibrated):
    """Keep sinks and a window of recent tokens exactly, forget those between.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
    arXiv 2309.17453, section 3.2: positions are those within the cache (``contiguous``).

    Attributes:
        sinks: tokens kept at the start of a sequence.
        window: most recent tokens kept; None: as many as make ``ratio``.
        ratio: tokens for each that is kept, sinks included; at least one recent one is.
        positions: "contiguous" or "original": where the model sees what is left.
    """

    name: ClassVar[str] = "streaming"
    version: ClassVar[int] = 1
    whole_context: ClassVar[bool] = True

    sinks: int = SINK_TOKENS
    window: int | None = None
    ratio: float = DEFAULT_RATIO
    positions: str = drop.PLACES[0]

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        drop.check_common(self.ratio, self.sinks, self.positions)
        if self.window is not None:
            opts.whole_within("window", self.window, 1, MAX_WINDOW)

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> Self:
        """``sinks``, ``window`` or ``ratio``, ``positions``. Raises: ConfigError."""
        opts.check_names(cls.name, options, ("sinks", "window", "ratio", "positions"))
        drop.only_one(options, ("window", "ratio"))
        window = options.get("window")
        return cls(
            drop.sinks_option(options, SINK_TOKENS),
            None if window is None else opts.whole_within("window", window, 1, MAX_WINDOW),
            drop.ratio_option(options.get("ratio", DEFAULT_RATIO)),
            drop.place_option(options),
        )

    @property
    def params(self) -> Mapping[str, object]:
        """``positions``, ``sinks``, and ``window`` or ``ratio``."""
        size = {"ratio": self.ratio} if self.window is None else {"window": self.window}
        return {"positions": self.positions, "sinks": self.sinks, **size}

    def encode(self, page: PageTensors) -> Encoded:
        """Raises: UnsupportedTensorError for states, and for pages whose heads differ."""
        positions = drop.positions_in(page)
        first = int(np.searchsorted(positions, self.sinks)) if positions.ndim == 1 else 0
        recent = self.window
        if recent is None:
            recent = max(1, round(page.entries / self.ratio) - first)
        kept = np.arange(page.entries, dtype=np.int64)
        kept = kept[(kept < first) | (kept >= page.entries - recent)]
        return drop.encode_entries(self.name, page, kept, self.positions)

    def decode(
        self,
        wanted: Wanted,
        sections: Mapping[str, SectionData],
        calibrations: CalibrationSource,
    ) -> PageTensors:
        """A page with `PageTensors.kept`. Raises: CorruptBlobError."""
        drop.check_params(wanted, ("positions", "sinks"), ("window", "ratio"))
        return drop.decode_entries(self.name, wanted, sections)
