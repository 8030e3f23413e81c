"""History of ``lowrank`` on the model's own device: what a GPU decodes without a way round.

The arithmetic is that of `kvferry.codec.lowrank_heads` and the layout that of
`kvferry.codec.lowrank`, in torch: V of every head projected onto its strongest directions,
float16, or int8 with one scale per chunk, head and direction; K and the first tokens exact.
"""

import torch

from kvferry.codec.lowrank import LowRankCodec
from kvferry.errors import CalibrationMissingError, UnsupportedTensorError
from kvferry.hf.history import Pair
from kvferry.proto.keys import SINK_TOKENS

_LEVELS = 127


class LowRankHistory:
    """A `kvferry.hf.history.History` of one layer.

    Args:
        codec: of target "v", with the calibration of that single layer.
    """

    def __init__(self, codec: LowRankCodec) -> None:
        known = codec.calibration
        if known is None:
            raise CalibrationMissingError("")
        basis = known.bases["v"].keep(codec.rank["v"])[0]
        self._mean = torch.from_numpy(basis.mean.copy())[:, None]
        self._vectors = torch.from_numpy(basis.vectors.copy())
        self._bits = codec.bits
        self._keys: torch.Tensor | None = None
        self._sinks: torch.Tensor | None = None
        # (batch, heads, chunks, tokens, rank); int8 with scales (batch, heads, chunks, 1, rank)
        self._coefficients: torch.Tensor | None = None
        self._scales: torch.Tensor | None = None
        # (chunks x tokens,): what is wanted of them after cropping
        self._kept = torch.zeros(0, dtype=torch.bool)

    @property
    def tokens(self) -> int:
        """How many are held."""
        return 0 if self._keys is None else int(self._keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, coefficients, scales and first tokens; the basis is not counted."""
        held = (self._keys, self._sinks, self._coefficients, self._scales)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `kvferry.hf.history.History`; chunks are of one size.

        Raises: UnsupportedTensorError: heads that were not calibrated, or such numbers.
        """
        heads, dim = self._vectors.shape[:2]
        if (values.shape[1], values.shape[3]) != (heads, dim):
            raise UnsupportedTensorError(
                "v",
                f"{values.shape[1]} heads of {values.shape[3]} where {heads} of {dim} are "
                "calibrated: calibrate for this model",
            )
        self._mean, self._vectors = (t.to(values.device) for t in (self._mean, self._vectors))
        coefficients = (values.float() - self._mean) @ self._vectors
        if self._keys is None:
            self._sinks = values[:, :, :SINK_TOKENS].clone()
            coefficients[:, :, :SINK_TOKENS] = 0  # outliers, which scales would have to span
        scales = None
        if self._bits == 8:
            peak = coefficients.abs().amax(dim=-2, keepdim=True)
            scales = peak / _LEVELS
            inverse = torch.where(scales > torch.finfo(torch.float32).tiny, scales, torch.inf)
            packed = torch.round(coefficients / inverse).clamp(-_LEVELS, _LEVELS).to(torch.int8)
            whole = peak
        else:
            packed = whole = coefficients.half()
        if not bool(torch.isfinite(whole).all()):
            raise UnsupportedTensorError("v", "NaN, infinite or beyond float16: not stored")
        self._coefficients = _joined(self._coefficients, packed[:, :, None], 2)
        if scales is not None:
            self._scales = _joined(self._scales, scales[:, :, None], 2)
        self._keys = _joined(self._keys, keys, 2)
        self._kept = torch.cat([self._kept, torch.ones(values.shape[2], dtype=torch.bool)])

    def decoded(self) -> Pair:
        """See `kvferry.hf.history.History`."""
        keys, sinks, coefficients = self._keys, self._sinks, self._coefficients
        if keys is None or sinks is None or coefficients is None:
            raise UnsupportedTensorError("v", "nothing is held")
        found = coefficients.float() if self._scales is None else coefficients * self._scales
        flat = found.flatten(2, 3)
        if not bool(self._kept.all()):
            flat = flat[:, :, self._kept.to(flat.device)]
        values = (flat @ self._vectors.transpose(-1, -2) + self._mean).to(sinks.dtype)
        values[:, :, : sinks.shape[2]] = sinks
        return keys, values

    def crop(self, tokens: int) -> None:
        """See `kvferry.hf.history.History`."""
        if self._keys is None or self._sinks is None or not tokens:
            return
        left = max(0, self.tokens - tokens)
        if not left:
            self._keys = self._sinks = self._coefficients = self._scales = None
            self._kept = self._kept[:0]
            return
        self._keys, self._sinks = self._keys[:, :, :left], self._sinks[:, :, :left]
        self._kept = self._kept & (self._kept.cumsum(0) <= left)

    def select(self, rows: torch.Tensor) -> None:
        """See `kvferry.hf.history.History`."""
        if self._keys is None:
            return
        where = rows.to(self._keys.device)
        self._keys, self._sinks, self._coefficients, self._scales = (
            None if tensor is None else tensor[where]
            for tensor in (self._keys, self._sinks, self._coefficients, self._scales)
        )


def _joined(held: torch.Tensor | None, more: torch.Tensor, dim: int) -> torch.Tensor:
    return more.clone() if held is None else torch.cat([held, more], dim=dim)
