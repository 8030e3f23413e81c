"""States stored by any number of ranks, put together for any other: every bit in its place."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.base import RING_KEYS, RING_VALUES, DType, PageTensors, Stream
from kvferry.codec.state_parts import ArrayPart, StateLayout, parts_wanted

CONV, HEADS, NORM = "state.0.3d", "state.1.4d", "state.2.2d"
KINDS = ({CONV: (3, 96), HEADS: (12, 5, 2), NORM: (7,)},)
# Queries, keys and values, each divided among the ranks.
SEGMENTS = (24, 24, 48)
SIZES = st.sampled_from([1, 2, 3, 4, 6, 12])
PLACES = {CONV: (1, SEGMENTS), HEADS: (0, (12,)), RING_KEYS: (0, (12,)), RING_VALUES: (0, (12,))}


def part_of(name: str, whole: tuple[int, ...], rank: int, size: int) -> ArrayPart:
    if name not in PLACES:
        return ArrayPart(whole, 0, ((0, whole[0]),))
    axis, segments = PLACES[name]
    at, runs = 0, []
    for segment in segments:
        each = segment // size
        runs.append((at + rank * each, each))
        at += segment
    if size == 1:
        runs = [(0, whole[axis])]
    return ArrayPart(whole, axis, tuple(runs))


def layout_of(rank: int, size: int) -> StateLayout:
    """Of two recurrent layers and one of rings, counted from 4."""
    kinds = (KINDS[0], KINDS[0], {RING_KEYS: (12, 1, 4), RING_VALUES: (12, 1, 4)})
    layers = [{n: part_of(n, s, rank, size) for n, s in kind.items()} for kind in kinds]
    return StateLayout(4, (rank, size), layers)


def whole_pages() -> list[PageTensors]:
    rng = np.random.default_rng(6)

    def page(layers: tuple[int, int], arrays: dict[str, tuple[int, ...]]) -> PageTensors:
        streams = {}
        for name, shape in arrays.items():
            padded = (layers[1] - layers[0], *(1,) * (3 - len(shape)), *shape)
            values = rng.standard_normal(padded, dtype=np.float32)
            streams[name] = Stream(name, values, DType.FLOAT32)
        return PageTensors(layers, (0, 1), (256, 300), streams)

    rings = {RING_KEYS: (12, 9, 4), RING_VALUES: (12, 9, 4)}
    return [page((4, 6), KINDS[0]), page((6, 7), rings)]


def local(pages: list[PageTensors], layout: StateLayout) -> list[PageTensors]:
    """As the rank of ``layout`` has them."""
    rank = layout.part[0]
    made = []
    for page in pages:
        streams = {}
        for name, stream in page.streams.items():
            part = layout.of(page.layers[0])[name]
            assert part is not None
            at = part.axis + 4 - len(part.whole)
            rows = [np.arange(start, start + length) for start, length in part.runs]
            streams[name] = Stream(name, stream.data.take(np.concatenate(rows), at), stream.dtype)
        made.append(PageTensors(page.layers, (rank, rank + 1), page.tokens, streams))
    return made


def stored(size: int) -> list[PageTensors]:
    layouts = [layout_of(rank, size) for rank in range(size)]
    return [at.split(page) for at in layouts for page in local(whole_pages(), at)]


def by_layer(pages: list[PageTensors]) -> dict[tuple[int, str], np.ndarray]:
    return {
        (layer, name): stream.data[index]
        for page in pages
        for index, layer in enumerate(range(*page.layers))
        for name, stream in page.streams.items()
    }


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.data())
def test_any_number_of_ranks_reads_what_any_other_stored(
    writers: int, readers: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, readers - 1))
    layout = layout_of(rank, readers)
    first, last = parts_wanted(layout.part, writers)
    fetched = [page for page in stored(writers) if first <= page.heads[0] < last]
    joined = layout.join(data.draw(st.permutations(fetched)), writers)
    assert joined is not None
    expected, found = by_layer(local(whole_pages(), layout)), by_layer(joined)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)


@given(st.sampled_from([2, 3, 4, 6]), st.sampled_from([1, 2, 3, 4]), st.data())
def test_without_a_part_that_is_needed_there_is_nothing(
    writers: int, readers: int, data: st.DataObject
) -> None:
    layout = layout_of(data.draw(st.integers(0, readers - 1)), readers)
    lost = data.draw(st.sampled_from(range(*parts_wanted(layout.part, writers))))
    assert layout.join([p for p in stored(writers) if p.heads[0] != lost], writers) is None


def test_only_the_parts_that_are_needed_are_fetched() -> None:
    assert [parts_wanted((rank, 4), 2) for rank in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert [parts_wanted((rank, 2), 4) for rank in range(2)] == [(0, 2), (2, 4)]
    assert parts_wanted((1, 3), 2) == (0, 2)


def test_what_cannot_be_told_comes_back_to_its_like_only() -> None:
    untold = [dict.fromkeys(KINDS[0])] * 2
    here = StateLayout(4, (1, 2), untold)
    assert not here.told
    pages = [local(whole_pages()[:1], layout_of(rank, 2))[0] for rank in range(2)]
    kept = [here.split(page) for page in pages]
    joined = here.join(kept[1:], 2)
    assert joined is not None
    for key, array in by_layer(pages[1:]).items():
        np.testing.assert_array_equal(by_layer(joined)[key], array)
    assert here.join(kept[:1], 2) is None
    assert here.join(whole_pages()[:1], 1) is None
    # And who can tell its own part cannot tell theirs.
    assert layout_of(0, 1).join(kept, 2) is None


def test_states_that_one_rank_holds_are_left_as_they_are() -> None:
    layout, pages = layout_of(0, 1), whole_pages()
    joined = layout.join([layout.split(page) for page in pages], 1)
    assert joined is not None
    for before, after in zip(pages, joined, strict=True):
        assert all(after.streams[n].data is s.data for n, s in before.streams.items())
