"""Which part of each state a tensor-parallel rank has, found out from the live model.

The shapes of its states are compared with those of the whole model. In what order an axis
was divided is read off the weights of the layer: rows of the rank's are looked up among
those of the model's files. Nothing is assumed of how the engine divides a layer.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from kvferry.codec.mlx.leaves import state_adapter
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.parts import parts_of
from kvferry.codec.mlx.probe import probed
from kvferry.codec.mlx.shape import ModelShape
from kvferry.codec.state_parts import RINGS, ArrayPart, Run, StateLayout

log = logging.getLogger(__name__)

_MOST_VALUES = 1 << 26
_WEIGHTS_READ = 4
Weights = Mapping[str, mx.array]


def state_layout(
    loaded: LoadedModel, shape: ModelShape, states: tuple[int, int], part: tuple[int, int]
) -> StateLayout:
    """Of the state layers ``states`` of a rank that holds ``part`` (rank, of how many).

    Where a part cannot be told, states come back to as many ranks as stored them.
    """
    wanted = shape.states[slice(*states)]
    if part[1] == 1 or not wanted:
        alone = [{n: _undivided(n, s) for n, s in state.arrays.items()} for state in wanted]
        return StateLayout(states[0], part, alone)
    try:
        leaves = parts_of(probed(loaded.model)).states
        local = [
            {n: tuple(a.shape[1:]) for n, a in state_adapter(leaf).read(leaf).items()}
            for leaf in leaves
        ]
    except Exception as exc:  # layers without weights fail in as many ways as there are models
        log.info("parts of states: %s", exc)
        local = []
    if [set(arrays) for arrays in local] != [set(state.arrays) for state in wanted]:
        return StateLayout(states[0], part, [dict.fromkeys(state.arrays) for state in wanted])
    files = _FileWeights(loaded)
    layers: list[Mapping[str, ArrayPart | None]] = []
    places = shape.state_layers[slice(*states)]
    for state, arrays, layer in zip(wanted, local, places, strict=True):
        found: dict[str, ArrayPart | None] = {}
        for name, whole in state.arrays.items():
            found[name] = _part(name, whole, arrays[name], part, files, layer)
        layers.append(found)
    return StateLayout(states[0], part, layers)


def _undivided(name: str, whole: tuple[int, ...]) -> ArrayPart:
    return ArrayPart(whole, 0, ((0, whole[0]),) if whole else ())


def _part(
    name: str,
    whole: tuple[int, ...],
    local: tuple[int, ...],
    part: tuple[int, int],
    files: "_FileWeights",
    layer: int,
) -> ArrayPart | None:
    if whole == local:
        return _undivided(name, whole)
    axes = [axis for axis, (a, b) in enumerate(zip(whole, local, strict=False)) if a != b]
    if len(whole) != len(local) or len(axes) != 1:
        return None
    (axis,) = axes
    if whole[axis] != part[1] * local[axis]:
        return None
    if name in RINGS:  # as the rows of other layers: KV heads in order
        return ArrayPart(whole, 0, ((part[0] * local[0], local[0]),)) if axis == 0 else None
    runs = files.order(layer, whole[axis], local[axis])
    return None if runs is None else ArrayPart(whole, axis, runs)


class _FileWeights:
    """The model's weights as its files have them, read where they are needed."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._whole: Weights | None = None
        self._known: dict[tuple[int, int, int], tuple[Run, ...] | None] = {}

    def order(self, layer: int, whole: int, local: int) -> tuple[Run, ...] | None:
        """Runs of an axis of ``whole`` places of which the rank has ``local``; None: not told."""
        key = (layer, whole, local)
        if key not in self._known:
            try:
                self._known[key] = self._found(layer, whole, local)
            except Exception as exc:  # files of any kind, by any model's own conversion
                log.info("layer %d: how %d places are divided: %s", layer, whole, exc)
                self._known[key] = None
        return self._known[key]

    def _found(self, layer: int, whole: int, local: int) -> tuple[Run, ...] | None:
        model = self._loaded.model
        module = model.layers[layer]
        prefix = next((name for name, found in model.named_modules() if found is module), None)
        if prefix is None:
            return None
        if self._whole is None:
            self._whole = _read(self._loaded)
        held = dict(tree_flatten(module.parameters()))
        theirs = {name: self._whole.get(f"{prefix}.{name}") for name in held}
        return divided_order(held, {n: w for n, w in theirs.items() if w is not None}, whole, local)


def _read(loaded: LoadedModel) -> Weights:
    weights: dict[str, mx.array] = {}
    for path in loaded.weight_files:
        read: Any = mx.load(str(path))  # lazily: an array is read when it is looked at
        weights |= read
    sanitize = getattr(loaded.model, "sanitize", None)
    return weights if sanitize is None else sanitize(weights)


def divided_order(held: Weights, whole: Weights, places: int, local: int) -> tuple[Run, ...] | None:
    """In what order a rank's ``local`` of ``places`` are, told by a layer's weights.

    Args:
        held, whole: the layer's weights on the rank and altogether, by name.
    Returns: runs (start, length); None where no weight tells, or two tell otherwise.
    """
    told: set[tuple[Run, ...]] = set()
    for axis, mine, all_ in islice(_comparable(held, whole, places, local), _WEIGHTS_READ):
        order = _order(_rows(mine, axis), _rows(all_, axis))
        if order is not None:
            told.add(_runs(order))
    return told.pop() if len(told) == 1 else None


def _comparable(
    held: Weights, whole: Weights, places: int, local: int
) -> Iterator[tuple[int, mx.array, mx.array]]:
    """Weights that are divided just so, the smallest first."""
    for name in sorted(whole, key=lambda name: (whole[name].size, name)):
        mine, all_ = held.get(name), whole[name]
        if mine is None or mine.ndim != all_.ndim or all_.size > _MOST_VALUES:
            continue
        axes = [a for a in range(all_.ndim) if mine.shape[a] != all_.shape[a]]
        if len(axes) == 1 and (all_.shape[axes[0]], mine.shape[axes[0]]) == (places, local):
            yield axes[0], mine, all_


def _rows(weight: mx.array, axis: int) -> "np.ndarray[Any, Any]":
    if weight.dtype in (mx.float16, mx.bfloat16):
        weight = weight.astype(mx.float32)  # a CPU's model holds them so; exact
    host = np.array(weight)
    return np.ascontiguousarray(np.moveaxis(host, axis, 0)).reshape(host.shape[axis], -1)


def _order(mine: "np.ndarray[Any, Any]", whole: "np.ndarray[Any, Any]") -> list[int] | None:
    """Which row of ``whole`` each of ``mine`` is; None where two are alike, or one is none."""
    if mine.dtype != whole.dtype:
        return None
    places = {row.tobytes(): index for index, row in enumerate(whole)}
    if len(places) < len(whole):
        return None
    found = [places.get(row.tobytes(), -1) for row in mine]
    return None if min(found) < 0 or len(set(found)) < len(found) else found


def _runs(order: Sequence[int]) -> tuple[Run, ...]:
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(order)) if b != a + 1), len(order)]
    return tuple((order[a], b - a) for a, b in pairwise(cuts))
