"""How finely each token is coded: the more of the model's attention it will get, the finer.

A token's importance is how much the model's next words change with an error in that
token's cache: the energy of the gradient (`kvferry.codec.lab.fisher`) at the token,
against the mean of its sequence. It varies by orders of magnitude, and about half of the
variance of its logarithm can be told from the cache itself, by one linear map of the
leading coefficients. Tokens of twice the importance are coded with a step smaller by
2 ** (adapt / 2); 1 would be the optimum for an importance that is known, prediction
makes less the best (measured in ``benchmarks/codec.md``). What was chosen travels with
the page, so a reader predicts nothing.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.codec.basis import Basis, Weights, apply_weights
from kvferry.codec.covariance import Float64Array
from kvferry.codec.transform import Forward

DEFAULT_ADAPT = 0.5
# Leading coefficients that the prediction looks at.
MAX_FEATURES = 512
# Tokens that a feature must have been seen with, and what correlations are shrunk by.
_TOKENS_PER_FEATURE = 8
_SHRINKAGE = 1.1
# Exponents are quarters of an octave, at most two octaves either way.
PER_OCTAVE = 4
MAX_EXPONENT = 8
_QUARTERS = np.array([1.0, 2**0.25, 2**0.5, 2**0.75], dtype=np.float32)

Exponents = npt.NDArray[np.int16]


class ImportanceSums:
    """Correlation of rows with the logarithm of their token's importance; one vector."""

    def __init__(self, width: int) -> None:
        self.products: Float64Array = np.zeros(width, dtype=np.float64)
        self.count = 0

    def add(self, rows: FloatArray, importance: Float64Array) -> None:
        """Take in a sequence.

        Args:
            rows: (tokens, p) as `CovarianceAccumulator` takes them.
            importance: (tokens,) above 0, in any unit.
        """
        if len(rows) < 2:
            return
        level = np.log(np.maximum(importance, np.finfo(np.float64).tiny))
        level -= level.mean()
        self.products += level @ (rows - rows.mean(axis=0, dtype=np.float64))
        self.count += len(rows)

    def merge(self, other: "ImportanceSums") -> None:
        """Take in all that ``other`` has seen."""
        self.products += other.products
        self.count += other.count

    def fit(self, basis: Basis, weights: Weights) -> FloatArray | None:
        """(n,) float32: what a coefficient of one standard deviation adds to the logarithm
        of the importance; None where too few tokens were seen."""
        features = min(MAX_FEATURES, self.count // _TOKENS_PER_FEATURE, basis.vectors.shape[1])
        features = min(features, int(np.count_nonzero(basis.sigma)))
        if features < 1:
            return None
        seen = apply_weights(weights, (self.products / self.count)[:, None])[:, 0]
        correlation = (seen @ basis.vectors[:, :features]) / basis.sigma[:features]
        return (correlation / _SHRINKAGE).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """Logarithm of a token's importance: ``rows @ direction - offset``.

    In float64: a coefficient's last bits depend on how many threads computed it, and
    what is stored must not.

    Attributes:
        direction: (p,) float64.
    """

    direction: Float64Array
    offset: float


def predictor(by: Forward, sigma: FloatArray, importance: FloatArray) -> Predictor:
    """What a basis knows of importance, as one direction in the space of rows."""
    count = len(importance)
    scaled = np.zeros(count, dtype=np.float64)
    np.divide(importance, sigma[:count], out=scaled, where=sigma[:count] > 0)
    direction = by.matrix[:, :count].astype(np.float64) @ scaled
    return Predictor(direction, float(by.offset[:count] @ scaled))


def exponents(rows: FloatArray, by: Predictor | None, adapt: float) -> Exponents:
    """How much finer or coarser each token is coded, in quarters of an octave.

    Args:
        rows: (tokens, p) as `kvferry.codec.transform.project` takes them.
        by: None: no token differs from another.
        adapt: 0: none does.
    Returns: (tokens,) int16 within `MAX_EXPONENT`; negative is finer.
    """
    out: Exponents = np.zeros(len(rows), dtype=np.int16)
    if by is None or not adapt:
        return out
    octaves = (rows.astype(np.float64) @ by.direction - by.offset) * (-adapt / (2 * np.log(2.0)))
    np.clip(np.rint(octaves * PER_OCTAVE), -MAX_EXPONENT, MAX_EXPONENT, out=octaves)
    if np.isfinite(octaves).all():  # else `quantize` refuses the page
        np.copyto(out, octaves, casting="unsafe")
    return out


def factors(chosen: Exponents) -> FloatArray:
    """(tokens,) float32 that multiply the step; the same on every machine."""
    octaves, quarters = np.divmod(chosen.astype(np.int32), PER_OCTAVE)
    return np.ldexp(_QUARTERS[quarters], octaves)
