"""What a calibration measures, on how much text, and how much work that is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from kvferry.codec.lab.fisher import CONTINUATION
from kvferry.errors import ConfigError
from kvferry.proto.keys import WINDOW_TOKENS

MIN_TOKENS = 512
Report = Callable[[float, str], None]
# One token of prefill is one unit of work; the rest was measured in it.
PASS_WORK, FIT_WORK, POINT_WORK = 3.2 * CONTINUATION, 50.0, 120.0
COMPARE_WORK = 1.2


class Stopped(Exception):  # noqa: N818 - no failure
    """Raised by a `Report` to end a run between two steps; its state is kept first."""


@dataclass(frozen=True, slots=True)
class HeldText:
    """Tokens of a text that bases are not fitted on, and what kind it is."""

    name: str
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure, and on how much text. Sizes in tokens.

    Attributes:
        tokens: of text that the bases are fitted on.
        sequence: such many at a time.
        passes: backward passes at most, one at a sequence's end; spread evenly.
        ridge: see `Fisher.weights`; None: identity weights, no backward passes.
        held_context, held_continuation: of each held text, for the curve.
        curve_bits: where the curve is measured, as estimated bits per value.
    """

    tokens: int = 8192
    sequence: int = 1024
    passes: int = 16
    ridge: float | None = 0.3
    held_context: int = 640
    held_continuation: int = 128
    curve_bits: tuple[float, ...] = (1.0, 0.6, 0.4, 0.25, 0.15)

    def __post_init__(self) -> None:
        if self.tokens < MIN_TOKENS:
            raise ConfigError("tokens", self.tokens, f"at least {MIN_TOKENS}")

    @property
    def fitted_tokens(self) -> int:
        """Tokens of text to fit on, with those that follow the last sequence."""
        return self.tokens + CONTINUATION

    @property
    def held_tokens(self) -> int:
        """Tokens of a text to measure the curve on."""
        return self.held_context + WINDOW_TOKENS + self.held_continuation + 1

    @property
    def starts(self) -> Sequence[int]:
        """Where sequences begin."""
        return range(0, self.tokens, self.sequence)

    @property
    def weighed(self) -> frozenset[int]:
        """Starts of the sequences that end with a backward pass."""
        if self.ridge is None:
            return frozenset()
        count = len(self.starts)
        wanted = max(1, min(self.passes, count))
        return frozenset(self.starts[i * count // wanted] for i in range(wanted))

    def work(self, layers: int, texts: int = 1) -> float:
        """The whole for a model of so many layers, in prefilled tokens."""
        points = len(self.curve_bits)
        compared = (1 + points) * self.held_continuation * COMPARE_WORK + points * POINT_WORK
        held = self.held_context + WINDOW_TOKENS + compared if points else 0
        return self.tokens + len(self.weighed) * PASS_WORK + layers * FIT_WORK + texts * held

    def to_json(self) -> Mapping[str, object]:
        """All that tells one run's result from another's."""
        return asdict(self)
