"""Which blobs a restore picks, and how their tensors come together."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.cluster.repository import BlobInfo, CodecInfo, LookupResult, TailFound
from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.errors import IdentityMismatchError
from kvferry.node.restore import RUN_PAGES, Assembly, choose_pieces, plan_restore, runs_of
from kvferry.proto.keys import BlobKey, page_keys, root_key, tail_key

ROOT = root_key(b"s" * 16, b"m" * 32)


def info(
    layers: tuple[int, int],
    page: bytes = b"p" * 32,
    kind: str = "page",
    size: int = 10,
    heads: tuple[int, int] = (0, 3),
) -> BlobInfo:
    key = BlobKey(kind, page, layers, heads, "raw.1-0123456789abcdef")
    return BlobInfo(
        key=key,
        size=size,
        codec=CodecInfo(name="raw", version=1),
        model_id=b"m" * 32,
        previous_key=b"r" * 32,
        tokens=(0, 256),
        layers=layers,
        heads=heads,
        model_layers=30,
        model_heads=3,
    )


spans = st.tuples(st.integers(0, 11), st.integers(1, 12)).filter(lambda s: s[0] < s[1])
head_spans = st.tuples(st.integers(0, 3), st.integers(1, 4)).filter(lambda s: s[0] < s[1])


@given(st.lists(spans, max_size=8), spans)
def test_pieces_cover_exactly_what_is_wanted_or_there_are_none(
    blobs: list[tuple[int, int]], wanted: tuple[int, int]
) -> None:
    pieces = choose_pieces([info(b) for b in blobs], wanted, (0, 3))
    coverable = all(any(a <= layer < b for a, b in blobs) for layer in range(wanted[0], wanted[1]))
    assert (pieces is not None) == coverable
    if pieces is not None:
        taken = [layer for p in pieces for layer in range(*p.cut)]
        assert taken == list(range(*wanted))
        for piece in pieces:
            assert piece.info.layers[0] <= piece.cut[0] < piece.cut[1] <= piece.info.layers[1]


@settings(max_examples=200)
@given(st.lists(st.tuples(spans, head_spans), max_size=12, unique=True), spans, head_spans)
def test_any_split_reads_what_any_others_stored(
    blobs: list[tuple[tuple[int, int], tuple[int, int]]],
    layers: tuple[int, int],
    heads: tuple[int, int],
) -> None:
    """Pipeline and tensor parallel ranks, in any mixture: pieces cover all, each cell once."""
    wanted = {(la, he) for la in range(*layers) for he in range(*heads)}
    stored = {(la, he) for a, b in blobs for la in range(*a) for he in range(*b)}
    pieces = choose_pieces([info(a, heads=b) for a, b in blobs], layers, heads)
    assert (pieces is not None) == (wanted <= stored)
    if pieces is None:
        return
    cells = [(la, he) for p in pieces for la in range(*p.cut) for he in range(*p.heads)]
    assert sorted(cells) == sorted(wanted)
    whole = np.arange(12 * 4 * 5 * 2, dtype=np.float32).reshape(12, 4, 5, 2)
    assembly = Assembly(5, layers, heads)
    for piece in pieces:
        a, b = piece.info.layers, piece.info.heads
        data = whole[slice(*a), slice(*b)]
        stream = Stream("k", data, DType.FLOAT32)
        page = PageTensors(a, b, (0, 5), {"k": stream})
        assembly.add(page.cut_layers(piece.cut).cut_heads(piece.heads))
    found = assembly.upto(5).streams["k"].data
    np.testing.assert_array_equal(found, whole[slice(*layers), slice(*heads)])


def test_of_two_codings_the_smaller_is_fetched() -> None:
    pieces = choose_pieces([info((0, 15), size=90), info((0, 15), size=9)], (0, 10), (0, 3))
    assert pieces is not None
    assert [p.info.size for p in pieces] == [9]


def test_blobs_that_lack_heads_are_not_used() -> None:
    assert choose_pieces([info((0, 15))], (0, 15), (0, 4)) is None


def _found(pages: int, tails: list[TailFound]) -> LookupResult:
    return LookupResult(pages=[[info((0, 30))] for _ in range(pages)], tails=tails)


def _tail(previous: bytes, tokens: list[int]) -> TailFound:
    key = tail_key(previous, tokens)
    blob = replace(info((0, 30), key, "tail"), previous_key=previous)
    return TailFound(tail_key=key, tokens=len(tokens), blobs=[blob])


def test_a_tail_counts_only_for_exactly_its_tokens() -> None:
    tokens = list(range(600))
    keys = page_keys(ROOT, tokens)
    good = _tail(keys[-1], tokens[512:580])
    other_tokens = _tail(keys[-1], [9] * 80)
    other_place = _tail(keys[0], tokens[512:590])
    too_long = _tail(keys[-1], [*tokens[512:], 7])
    found = _found(2, [other_tokens, good, other_place, too_long])
    plan = plan_restore(found, keys, ROOT, tokens, 256, (0, 30), (0, 3))
    assert plan.has_tail
    assert plan.tokens == 580


def test_a_tail_may_begin_before_the_pages_of_another_conversation_end() -> None:
    tokens = list(range(600))
    keys = page_keys(ROOT, tokens)
    longer, within = _tail(keys[0], tokens[256:590]), _tail(keys[0], tokens[256:500])
    plan = plan_restore(_found(2, [within, longer]), keys, ROOT, tokens, 256, (0, 30), (0, 3))
    assert [segment.tokens for segment in plan.segments] == [(0, 256), (256, 590)]
    assert plan.has_tail
    plan = plan_restore(_found(2, [within]), keys, ROOT, tokens, 256, (0, 30), (0, 3))
    assert (plan.tokens, plan.has_tail) == (512, False)


def test_a_tail_without_pages_hangs_on_the_root() -> None:
    tokens = list(range(300))
    plan = plan_restore(
        _found(0, [_tail(ROOT, tokens[:200])]), page_keys(ROOT, tokens), ROOT, tokens, 256,
        (0, 30), (0, 3),
    )  # fmt: skip
    assert plan.tokens == 200


def test_a_page_that_this_shard_cannot_cover_ends_the_plan() -> None:
    tokens = list(range(600))
    keys = page_keys(ROOT, tokens)
    found = LookupResult(pages=[[info((0, 30))], [info((0, 10))]], tails=[_tail(keys[1], [1])])
    plan = plan_restore(found, keys, ROOT, tokens, 256, (5, 20), (0, 3))
    assert plan.tokens == 256
    assert not plan.has_tail


def test_assembled_tensors_are_every_layer_and_token_in_its_place() -> None:
    """Each value names its own layer, head and token; after assembly all are at home."""

    def tensors(layers: tuple[int, int], tokens: tuple[int, int]) -> PageTensors:
        grid = np.meshgrid(
            np.arange(*layers), np.arange(3), np.arange(*tokens), np.arange(4), indexing="ij"
        )
        data = (grid[0] * 1000 + grid[2] + grid[1] / 4 + grid[3] / 64).astype(np.float32)
        streams = {n: Stream(n, data, DType.FLOAT32) for n in ("k", "v")}
        return PageTensors(layers, (0, 3), tokens, streams)

    plan = plan_restore(
        LookupResult(
            pages=[
                [info((0, 5), b"a" * 32), info((5, 9), b"a" * 32)],
                [info((0, 9), b"b" * 32)],
            ]
        ),
        [b"a" * 32, b"b" * 32],
        ROOT,
        list(range(512)),
        256,
        (2, 8),
        (0, 3),
    )
    assembly = Assembly(512, (2, 8), (0, 3))
    for segment in reversed(plan.segments):
        for piece in segment.pieces:
            assembly.add(tensors(piece.cut, segment.tokens))
    for end in (256, 512):
        whole, expected = assembly.upto(end), tensors((2, 8), (0, end))
        for name in ("k", "v"):
            np.testing.assert_array_equal(whole.streams[name].data, expected.streams[name].data)
    other = tensors((2, 8), (0, 512))
    halves = {
        n: Stream.from_float32(n, s.float32(), DType.FLOAT16) for n, s in other.streams.items()
    }
    with pytest.raises(IdentityMismatchError, match="float16"):
        assembly.add(PageTensors((2, 8), (0, 3), (0, 512), halves))


@given(st.integers(1, 40), st.booleans())
def test_runs_are_the_plan_with_early_tokens_first(pages: int, tail: bool) -> None:
    tokens = list(range(256 * pages + 50))
    keys = page_keys(ROOT, tokens)
    spans = [(0, 12), (12, 30)]
    found = LookupResult(
        pages=[[info(span, key) for span in spans] for key in keys],
        tails=[_tail(keys[-1], tokens[256 * pages :])] if tail else [],
    )
    plan = plan_restore(found, keys, ROOT, tokens, 256, (5, 20), (0, 3))
    runs = runs_of(plan)
    parts = [part for run in runs for part in run.parts]
    assert sorted(str(p.info.key) for _, p in parts) == sorted(
        str(p.info.key) for p in plan.pieces()
    )
    assert all(piece.cut == run.cut for run in runs for _, piece in run.parts)
    assert all(len(run.parts) <= RUN_PAGES for run in runs)
    starts = [min(segment.tokens[0] for segment, _ in run.parts) for run in runs]
    assert starts == sorted(starts)
