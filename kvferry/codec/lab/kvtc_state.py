"""What a calibration of the published codec has seen so far: of fixed size, kept and loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray, PageTensors
from kvferry.codec.covariance import SavedLayout, SavedTensors
from kvferry.codec.kvtc_fit import KEPT_ROWS, KvtcFit, RowsAside
from kvferry.codec.lab.gathered import SeenGroup
from kvferry.codec.mlx.shape import ModelShape
from kvferry.codec.rope import RopeSpec
from kvferry.errors import CalibrationCorruptError, ConfigError

MIN_TOKENS = 512
_COVERED = "covered"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvtcPlan:
    """How much text there is to read. Sizes in tokens.

    Attributes:
        tokens: to fit on. A covariance of SmolLM2-135M is 5,760 wide: fewer than the
            default's would leave it singular, or nearly so.
        sequence: such many at a time.
    """

    tokens: int = 16_384
    sequence: int = 2048

    def __post_init__(self) -> None:
        if self.tokens < MIN_TOKENS:
            raise ConfigError("tokens", self.tokens, f"at least {MIN_TOKENS}")

    def to_json(self) -> Mapping[str, object]:
        """All that tells one run's result from another's."""
        return {"codec": "kvtc", **asdict(self)}


class KvtcGathered:
    """Covariances of every stream, and rows to measure on; the text itself is not kept.

    Args:
        apart: tokens of each text that errors are measured on.

    Attributes:
        covered: tokens of the text to fit on that are in it.
        measured: texts apart that are in it.
        fit: see `KvtcFit`.
    """

    def __init__(
        self,
        model_id: bytes,
        shape: ModelShape,
        ropes: Mapping[str, Sequence[RopeSpec]],
        apart: Sequence[int],
    ) -> None:
        self.covered = self.measured = 0
        self._shape, self._apart = shape, sum(map(RowsAside.apart_rows, apart))
        self._seen = SeenGroup(
            model_id=model_id,
            layers=(0, shape.layers),
            heads=(0, shape.kv_heads),
            ropes=ropes,
            joint=False,
        )
        self.fit = KvtcFit(self._seen)

    def add(self, page: PageTensors) -> None:
        """Take in a sequence to fit on."""
        self.fit.add(page)
        self.covered += page.tokens[1]

    def measure_on(self, page: PageTensors) -> None:
        """Take in a text apart."""
        self.fit.measure_on(page)
        self.measured += 1

    def layout(self) -> SavedLayout:
        """Names, shapes and dtypes of all tensors that a kept state may have."""
        found: SavedLayout = {_COVERED: ((4,), "<i8"), "rows": ((2,), "<i8")}
        found |= self._seen.layout(self._shape)
        for name, stream in self._shape.streams.items():
            width = self._shape.layers * stream.heads * stream.dim
            found[f"kept/{name}"] = ((2 * KEPT_ROWS, width), "<f4")
            found[f"apart/{name}"] = ((self._apart, width), "<f4")
        return found

    def tensors(self) -> SavedTensors:
        """The whole state: views of the sums, copies of the rows."""
        rows = self.fit.set_aside()
        counts = [_count(rows.kept), _count(rows.apart)]
        found: dict[str, npt.NDArray[Any]] = {
            _COVERED: np.array([self.covered, self.measured, rows.stride, rows.count], "<i8"),
            "rows": np.array(counts, "<i8"),
            **self._seen.tensors(),
        }
        for name, kept in rows.kept.items():
            found[f"kept/{name}"] = _padded(kept, 2 * KEPT_ROWS)
        for name, apart in rows.apart.items():
            found[f"apart/{name}"] = _padded(apart, self._apart)
        return found

    def load(self, tensors: SavedTensors) -> None:
        """Take over a kept state whose layout was checked.

        Raises: CalibrationCorruptError: tensors are missing.
        """
        try:
            self._seen.load(tensors, self._shape)
            covered, measured, stride, count = (int(n) for n in tensors[_COVERED])
            kept, apart = (int(n) for n in tensors["rows"])
            names = list(self._shape.streams)
            rows = RowsAside(
                {name: tensors[f"kept/{name}"][:kept] for name in names if kept},
                {name: tensors[f"apart/{name}"][:apart] for name in names if apart},
                stride,
                count,
            )
        except KeyError as exc:
            raise CalibrationCorruptError("checkpoint", f"tensor {exc} is missing") from exc
        self.fit.take_back(rows)
        self.covered, self.measured = covered, measured


def _count(rows: Mapping[str, FloatArray]) -> int:
    return len(next(iter(rows.values()))) if rows else 0


def _padded(rows: FloatArray, count: int) -> FloatArray:
    """To the one size that a state may have, so that it can be checked before it is read."""
    whole = np.zeros((count, rows.shape[1]), dtype=np.float32)
    whole[: len(rows)] = rows
    return whole
