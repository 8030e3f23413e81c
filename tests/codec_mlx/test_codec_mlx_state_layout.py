"""Which part of each state a rank has: told by shapes and weights of real models."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from model_zoo import config_of, go_on, model_of, prefilled, save_model, tokens_of

from kvferry.codec.base import PageTensors
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.leaves import state_adapter
from kvferry.codec.mlx.load import load_model
from kvferry.codec.mlx.parts import parts_of
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.refill import restore
from kvferry.codec.mlx.state_layout import divided_order, state_layout
from kvferry.codec.state_parts import RINGS, ArrayPart, StateLayout, parts_wanted

HELD = 70
# What a rank divides of recurrent state, and the pieces that it divides one by one.
DIVIDED: Mapping[str, Mapping[str, tuple[int, tuple[int, ...]]]] = {
    "qwen3_next": {"state.0.3d": (1, (64, 64, 128)), "state.1.4d": (0, (4,))},
    "lfm2": {"state.0.3d": (1, (64,))},
    "gpt_oss": {},
    "gemma3_text": {},
}


class Place:
    """What ``shard`` of a model asks a group for."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def weights(layer: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(layer.parameters()))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_order_of_a_divided_convolution_is_read_off_its_weights(rank: int) -> None:
    whole, divided = model_of("qwen3_5"), model_of("qwen3_5")
    divided.shard(Place(rank, 2))
    mine, all_ = weights(divided.layers[0]), weights(whole.layers[0])
    assert divided_order(mine, all_, 256, 128) == (
        (32 * rank, 32), (64 + 32 * rank, 32), (128 + 64 * rank, 64),
    )  # fmt: skip
    assert divided_order(mine, all_, 4, 2) == ((2 * rank, 2),)
    assert divided_order(mine, all_, 12, 6) is None
    # Rows that are alike tell nothing, and two weights must not contradict each other.
    same = {name: mx.ones_like(w) for name, w in mine.items()}
    assert divided_order(same, {n: mx.ones_like(w) for n, w in all_.items()}, 256, 128) is None
    other = {**mine, "linear_attn.conv1d.weight": mine["linear_attn.conv1d.weight"][::-1]}
    assert divided_order(other, all_, 256, 128) is None


def test_a_model_that_nobody_shares_is_told_whole(tmp_path: Path) -> None:
    save_model("qwen3_5", tmp_path)
    loaded = load_model(str(tmp_path))
    shape = describe(loaded.model, loaded.config)
    layout = state_layout(loaded, shape, (0, 2), (0, 1))
    assert layout.told
    assert not any(part.divided for layer in layout.layers for part in layer.values() if part)


def test_what_the_live_model_does_not_say_is_not_told(tmp_path: Path) -> None:
    """Its states are whole although it is said to be one of two, or it is not there at all."""
    save_model("lfm2", tmp_path)
    loaded = load_model(str(tmp_path))
    shape = describe(loaded.model, loaded.config)
    for layer in loaded.model.layers:
        if not layer.is_attention_layer:
            layer.conv.hidden_size = 32
            layer.conv.conv.weight = layer.conv.conv.weight[:32]
    layout = state_layout(replace(loaded, whole=False), shape, (0, 2), (0, 2))
    assert not layout.told


def layout_of(name: str, model: Any, rank: int, size: int) -> StateLayout:
    """As ranks divide it that `state_layout` has looked at."""
    layers = []
    for state in describe(model, config_of(name)).states:
        parts: dict[str, ArrayPart | None] = {}
        for stream, whole in state.arrays.items():
            kinds = {stream: (0, (whole[0],))} if stream in RINGS else DIVIDED[name]
            axis, segments = kinds.get(stream, (0, ()))
            runs, at = [], 0
            for segment in segments:
                runs.append((at + rank * segment // size, segment // size))
                at += segment
            alone = size == 1 or not segments
            parts[stream] = ArrayPart(whole, axis, ((0, whole[axis]),) if alone else tuple(runs))
        layers.append(parts)
    return StateLayout(0, (rank, size), layers)


def cut(layout: StateLayout, cache: list[Any]) -> list[Any]:
    """The states of one rank, in caches of their own."""
    found = []
    for layer, leaf in enumerate(parts_of(cache).states):
        arrays = {}
        for name, array in state_adapter(leaf).read(leaf).items():
            part = layout.of(layer)[name]
            assert part is not None
            places = np.concatenate([np.arange(a, a + n) for a, n in part.runs])
            arrays[name] = mx.take(array, mx.array(places), axis=part.axis + 1)
        found.append(empty_like(leaf))
        state_adapter(leaf).fill(found[-1], arrays, HELD)
    return found


def empty_like(leaf: Any) -> Any:
    return type(leaf)(leaf.max_size, leaf.keep) if hasattr(leaf, "keep") else type(leaf)(2)


@pytest.mark.parametrize("name", DIVIDED)
def test_states_of_real_models_go_from_any_number_of_ranks_to_any_other(name: str) -> None:
    model = model_of(name)
    cache = prefilled(model, tokens_of(HELD))
    shape = describe(model, config_of(name))
    whole = adapters.snapshot(cache, HELD, latent=shape.latent)
    rows = [whole.page(whole.layers, (0, HELD))]
    unbroken = go_on(model, prefilled(model, tokens_of(HELD)), tokens_of(4, 3), [1] * 4)
    for writers in (1, 2):
        stored: list[PageTensors] = []
        for rank in range(writers):
            layout = layout_of(name, model, rank, writers)
            held = adapters.snapshot(cut(layout, cache), HELD, layout=layout)
            stored += held.state_pages((0, HELD), rank)
        for readers in (1, 2):
            for rank in range(readers):
                layout = layout_of(name, model, rank, readers)
                first, last = parts_wanted(layout.part, writers)
                fetched = [page for page in stored if first <= page.heads[0] < last]
                joined = layout.join(fetched, writers)
                assert joined is not None
                mine = cut(layout, cache)
                fresh = [empty_like(leaf) for leaf in mine]
                restore(fresh, [], states=joined, tokens=HELD)
                for leaf, back in zip(mine, fresh, strict=True):
                    arrays = state_adapter(back).read(back)
                    for stream, array in state_adapter(leaf).read(leaf).items():
                        np.testing.assert_array_equal(np.array(arrays[stream]), np.array(array))
            if readers == 1:
                again = make_prompt_cache(model)
                restore(again, rows, states=joined, tokens=HELD)
                np.testing.assert_array_equal(
                    go_on(model, again, tokens_of(4, 3), [1] * 4), unbroken
                )
