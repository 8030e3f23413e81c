"""How much each direction of the cache matters to what the model says next.

F, per layer, stream and head, is the Fisher information of the next-token distribution
with respect to a cached vector: labels are drawn from the model's own output, and the
outer product of the gradient of their log-likelihood is averaged over tokens. Half of
d' F d is then the KL divergence that an error d in the cache causes (Amari 1998, the
second-order expansion of KL). Keys are taken with RoPE undone, as they are coded.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import ConcatenateKVCache

from kvferry.codec.base import FloatArray
from kvferry.codec.importance import DEFAULT_ADAPT
from kvferry.codec.mlx.leaves import leaves, rows_adapter
from kvferry.codec.mlx.parts import parts_of, row_arrays
from kvferry.codec.rope import RopeSpec, positions_of, undo
from kvferry.proto.keys import SINK_TOKENS, WINDOW_TOKENS

_Float64 = npt.NDArray[np.float64]
_Number = TypeVar("_Number", np.float32, np.float64)
CONTINUATION = 128
Rows = Mapping[str, mx.array]


@dataclass(slots=True)
class Fisher:
    """Sums over passes.

    Attributes:
        ropes: stream -> one spec per layer; streams that are missing are not rotated.
        sums: stream -> (layers, heads, dim, dim) predicted KL per unit of error.
        passes: how many passes the sums are of.
        latent: whether rows are MLA's.
        groups: layer groups, in order; all layers are one if empty. Within each, tokens
            that matter more will be coded finer (`kvferry.codec.importance`), and count
            for less here by as much: else a few of them would decide what is kept of all.
    """

    ropes: Mapping[str, Sequence[RopeSpec]]
    sums: dict[str, _Float64] = field(default_factory=dict)
    passes: int = 0
    groups: Sequence[tuple[int, int]] = ()
    latent: bool = False

    def add(self, model: Any, cache: Sequence[Any], next_tokens: Sequence[int]) -> None:
        """`measure` one pass and `take` it in."""
        self.take(self.measure(model, cache, next_tokens))

    def measure(self, model: Any, cache: Sequence[Any], next_tokens: Sequence[int]) -> "FisherPass":
        """One backward pass: what ``next_tokens`` after ``cache`` would lose.

        Args:
            cache: of all layers, filled; left as it is.
            next_tokens: what the text goes on with; a hundred or so.
        Returns: what `take` takes in.
        """
        parts = parts_of(cache).rows
        rows = [row_arrays(held, held[0].offset, self.latent) for held in parts]
        shape = (len(next_tokens), _vocabulary(model, next_tokens[:1], cache, rows))
        noise = mx.random.gumbel(shape, key=mx.random.key(self.passes))
        slopes = mx.grad(_log_likelihood(model, next_tokens, noise, cache))(rows)
        mx.eval(slopes)
        plain, energy = {}, {}
        for name in rows[0]:
            specs = self.ropes.get(name, [None] * len(rows))
            plain[name] = [unrotated(g[name], s) for g, s in zip(slopes, specs, strict=True)]
            energy[name] = np.stack([token_energy(g) for g in plain[name]])
        found = FisherPass({}, energy)
        scale = self._token_weights(found, len(rows))
        for name, layers in plain.items():
            total = np.stack([outer_products(g, w) for g, w in zip(layers, scale, strict=True)])
            found.products[name] = total / (2 * len(next_tokens))
        return found

    def _token_weights(self, found: "FisherPass", layers: int) -> list[_Float64]:
        """Per layer (tokens,): what is left of a token's error where it is coded finer."""
        made: list[_Float64] = []
        for first, last in self.groups or [(0, layers)]:
            level = np.log(np.maximum(found.importance((first, last)), 1e-30))
            weight = np.exp(-DEFAULT_ADAPT * (level - np.nanmean(level)))
            made += [weight] * (last - first)
        return made

    def take(self, found: "FisherPass") -> None:
        """Take in what `measure` found."""
        for name, total in found.products.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
        self.passes += 1

    def metric(self, layers: tuple[int, int]) -> dict[str, _Float64]:
        """F itself: e' F e is the predicted mean KL of an error e in every coded token.

        Returns: stream -> (layers, heads, dim, dim); empty where nothing was measured.
        """
        if not self.passes:
            return {}
        return {name: s[layers[0] : layers[1]] / self.passes for name, s in self.sums.items()}

    def weights(self, layers: tuple[int, int], ridge: float) -> dict[str, FloatArray]:
        """Matrices A for `fit_group`, so that squared error in A x is predicted KL.

        A'A = F + ridge * tr(F)/dim * I: the ridge keeps directions that few samples
        have seen from being thrown away.

        Returns: stream -> (layers, heads, dim, dim) float32, upper triangular.
        """
        made = {}
        for name, fisher in self.metric(layers).items():
            dim = fisher.shape[-1]
            trace = np.trace(fisher, axis1=-2, axis2=-1)[..., None, None] / dim
            floor = np.finfo(np.float32).tiny ** 0.5  # a head that nothing listens to
            metric = fisher + (ridge * trace + floor) * np.eye(dim)
            made[name] = np.linalg.cholesky(metric).swapaxes(-1, -2).astype(np.float32)
        return made


@dataclass(frozen=True, slots=True, eq=False)
class FisherPass:
    """One backward pass.

    Attributes:
        products: stream -> (layers, heads, dim, dim), summed over tokens.
        energy: stream -> (layers, tokens), how much each token matters; NaN for those
            that are not coded coarsely.
    """

    products: dict[str, _Float64]
    energy: Mapping[str, _Float64]

    def importance(self, layers: tuple[int, int]) -> _Float64:
        """(tokens,) how much each token's cache in these layers matters, all streams."""
        parts = [energy[layers[0] : layers[1]].sum(axis=0) for energy in self.energy.values()]
        total: _Float64 = np.sum(parts, axis=0)
        return total


def unrotated(gradient: mx.array, spec: RopeSpec | None) -> FloatArray:
    """Gradients with respect to keys before rotation.

    Args:
        gradient: (1, heads, tokens, dim), with respect to what the cache holds.
        spec: how the layer rotates, or None.
    Returns: (heads, tokens, dim).
    """
    g = np.array(gradient[0].astype(mx.float32))
    if spec is not None:
        g = undo(g, spec, positions_of((0, g.shape[1])))
        # The gradient goes through the transposed rotation, which scales as it does.
        g[..., : spec.dims] *= spec.key_scale**2
    return g


def outer_products(gradient: FloatArray, weight: _Float64 | None = None) -> _Float64:
    """Sum of outer products over the tokens that are coded coarsely.

    Args:
        gradient: (heads, tokens, dim).
        weight: (tokens,), or None for 1.
    Returns: (heads, dim, dim).
    """
    coded = _coded(gradient).astype(np.float64)
    right = coded if weight is None else coded * _coded(weight[None])[0][:, None]
    product: _Float64 = coded.transpose(0, 2, 1) @ right
    return product


def token_energy(gradient: FloatArray) -> _Float64:
    """How much each token matters to a layer: every head's mean token counts as 1.

    Args:
        gradient: (heads, tokens, dim).
    Returns: (tokens,), NaN for those that are not coded coarsely.
    """
    squares = np.square(gradient, dtype=np.float64).sum(axis=2)
    means = _coded(squares).mean(axis=1, keepdims=True)
    shares = np.divide(squares, means, out=np.zeros_like(squares), where=means > 0)
    out = np.full(squares.shape[1], np.nan)
    _coded(out[None])[...] = _coded(shares).sum(axis=0)
    return out


def _coded(values: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    """(heads, tokens, ...) without the sinks and the window; a view."""
    return values[:, SINK_TOKENS : values.shape[1] - WINDOW_TOKENS]


def _cache_of(cache: Sequence[Any], rows: Sequence[Rows]) -> list[Any]:
    """Caches whose rows only append, so that gradients flow to what they were given."""
    given = iter(rows)
    made = []
    for layer in cache:
        held = any(rows_adapter(leaf) for leaf in leaves(layer))
        arrays = iter(next(given).values()) if held else iter(())
        made.append(_layer_of(layer, arrays))
    return made


def _layer_of(layer: Any, arrays: Iterator[mx.array]) -> Any:
    if type(layer).__name__ == "CacheList":
        return type(layer)(*(_layer_of(child, arrays) for child in layer.caches))
    if rows_adapter(layer) is None:
        return copy.deepcopy(layer)
    make: Any = ConcatenateKVCache
    made = make()
    made.keys = next(arrays)
    empty = layer.values.shape[3] == 0 if isinstance(layer.values, mx.array) else False
    made.values = mx.zeros((*made.keys.shape[:3], 0)) if empty else next(arrays)
    made.offset = made.keys.shape[2]
    return made


def _log_likelihood(
    model: Any, tokens: Sequence[int], noise: mx.array, cache: Sequence[Any]
) -> Any:
    given = mx.array([list(tokens)])

    def summed(rows: Sequence[Rows]) -> mx.array:
        scores = model(given, cache=_cache_of(cache, rows))[0].astype(mx.float32)
        # Gumbel's trick: the largest of scores plus noise is a draw from their softmax.
        drawn = mx.stop_gradient(mx.argmax(scores + noise, axis=-1))
        chosen = mx.take_along_axis(scores, drawn[:, None], axis=-1)[:, 0]
        return (chosen - mx.logsumexp(scores, axis=-1)).sum()

    return summed


def _vocabulary(
    model: Any, token: Sequence[int], cache: Sequence[Any], rows: Sequence[Rows]
) -> int:
    logits = model(mx.array([list(token)]), cache=_cache_of(cache, rows))
    return int(logits.shape[-1])  # lazy: shapes only
