"""Pages that lack tokens: what they may say, and what is refused."""

from collections.abc import Callable

import numpy as np
import pytest
from codec_samples import bits, decoded, meta_for, random_page, restored

from kvferry.codec.base import PageTensors, Stream, drops_tokens
from kvferry.codec.blob import encode_blob
from kvferry.codec.join import join_layers, join_tokens
from kvferry.codec.kept import Kept
from kvferry.codec.registry import CODECS, make_codec
from kvferry.errors import CorruptBlobError, UnsupportedTensorError
from kvferry.proto import container
from kvferry.proto.container import SectionData
from kvferry.proto.v1 import blob_pb2

TOKENS = (256, 296)
KEY, DATA = encode_blob(
    make_codec("streaming", {"ratio": 4}), random_page(tokens=TOKENS), meta_for()
)


def with_kept(page: PageTensors, count: int, kept: Kept) -> PageTensors:
    streams = {n: Stream(n, s.data[:, :, :count], s.dtype) for n, s in page.streams.items()}
    return PageTensors(page.layers, page.heads, page.tokens, streams, kept)


def positions(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(
    "kept",
    [
        Kept(positions(3, 2)),
        Kept(positions(2, 2)),
        Kept(positions(-1, 2)),
        Kept(positions(0, 40)),
        Kept(np.array([0, 1], dtype=np.int32)),
        Kept(np.zeros((2, 1, 2), dtype=np.int64)),
        Kept(positions(1, 2), np.ones((2, 2, 2), dtype=np.float32)),
        Kept(np.ones((2, 2, 2), dtype=np.int64), np.full((2, 2, 2), np.nan, dtype=np.float32)),
        Kept(np.ones((2, 2, 2), dtype=np.int64), np.full((2, 2, 2), -1, dtype=np.float32)),
        Kept(np.ones((2, 2, 2), dtype=np.int64), np.zeros((2, 2, 2), dtype=np.float32)),
        Kept(np.ones((2, 2, 2), dtype=np.int64), np.full((2, 2, 2), 30, dtype=np.float32)),
        Kept(np.ones((2, 2, 2), dtype=np.int64), np.ones((2, 2, 3), dtype=np.float32)),
        Kept(np.ones((2, 2, 2), dtype=np.int64), np.ones((2, 2, 2))),
    ],
)
def test_a_page_refuses_entries_that_cannot_be(kept: Kept) -> None:
    with pytest.raises(UnsupportedTensorError, match="kept"):
        with_kept(random_page(), 2, kept)


def test_codecs_that_keep_all_tokens_store_no_page_that_lacks_some() -> None:
    page = random_page().take(positions(1, 5, 9))
    assert page.entries == 3
    for name in CODECS:
        if name in ("raw", "zstd", "affine"):
            assert not drops_tokens(CODECS[name])
            with pytest.raises(UnsupportedTensorError, match="lack tokens"):
                encode_blob(make_codec(name, {}), page, meta_for())


def test_the_header_says_how_many_entries_there_are() -> None:
    header = container.parse(DATA).header
    assert [list(stream.shape) for stream in header.streams] == [[2, 2, 10, 32]] * 2
    assert (header.token_start, header.token_end) == TOKENS
    page = decoded(DATA, KEY, TOKENS)
    assert page.kept is not None
    np.testing.assert_array_equal(page.kept.positions, np.arange(286, 296))


def forged(change: Callable[[blob_pb2.BlobHeader, dict[str, SectionData]], None]) -> bytes:
    blob = container.parse(DATA)
    sections = dict(blob.sections)
    change(blob.header, sections)
    return container.pack(blob.header, list(sections.values()))


def _shapes(count: int) -> Callable[[blob_pb2.BlobHeader, dict[str, SectionData]], None]:
    def change(header: blob_pb2.BlobHeader, _: dict[str, SectionData]) -> None:
        for stream in header.streams:
            stream.shape[2] = count

    return change


def _one_shape(header: blob_pb2.BlobHeader, _: dict[str, SectionData]) -> None:
    header.streams[1].shape[2] = 9


def _bitmap(data: bytes) -> Callable[[blob_pb2.BlobHeader, dict[str, SectionData]], None]:
    def change(_: blob_pb2.BlobHeader, sections: dict[str, SectionData]) -> None:
        sections["kept/tokens"] = SectionData("kept/tokens", data, len(data))

    return change


def _no_bitmap(_: blob_pb2.BlobHeader, sections: dict[str, SectionData]) -> None:
    del sections["kept/tokens"]


@pytest.mark.parametrize(
    "change",
    [
        _shapes(0),
        _shapes(9),
        _shapes(11),
        _shapes(41),
        _shapes((1 << 32) - 1),
        _one_shape,
        _bitmap(b""),
        _bitmap(b"\xff" * 5),
        _bitmap(b"\x00\x00\x00\x00\xff\x03"),
        _bitmap(b"\x00\x00\x00\x00\xff"),
        _no_bitmap,
    ],
)
def test_forged_entries_are_refused(
    change: Callable[[blob_pb2.BlobHeader, dict[str, SectionData]], None],
) -> None:
    with pytest.raises(CorruptBlobError):
        decoded(forged(change), KEY, TOKENS)


@pytest.mark.parametrize("count", [41, (1 << 32) - 1])
def test_more_entries_than_tokens_are_refused_by_the_header_alone(count: int) -> None:
    with pytest.raises(CorruptBlobError, match="does not fit the ranges"):
        decoded(forged(_shapes(count)), KEY, TOKENS)


def test_a_codec_that_keeps_all_tokens_is_not_believed_to_lack_some() -> None:
    key, data = encode_blob(make_codec("raw", {}), random_page(tokens=TOKENS), meta_for())
    blob = container.parse(data)
    for stream in blob.header.streams:
        stream.shape[2] = 10
    with pytest.raises(CorruptBlobError, match="does not fit"):
        decoded(container.pack(blob.header, list(blob.sections.values())), key, TOKENS)


def test_layers_that_kept_other_tokens_are_padded_with_entries_of_no_weight() -> None:
    a = random_page(layers=(0, 1)).take(positions(0, 7, 9))
    b = random_page(layers=(1, 2), seed=1).take(positions(2, 8))
    whole = join_layers([a, b])
    assert whole.kept is not None
    assert whole.kept.weights is not None
    np.testing.assert_array_equal(whole.kept.positions[:, 0], [[0, 7, 9], [2, 8, 8]])
    np.testing.assert_array_equal(whole.kept.weights[:, 1], [[1, 1, 1], [1, 1, 0]])
    same = join_layers([a, random_page(layers=(1, 2), seed=1).take(positions(0, 7, 9))])
    assert same.kept is not None
    np.testing.assert_array_equal(same.kept.positions, [0, 7, 9])
    with pytest.raises(UnsupportedTensorError, match="differ"):
        join_layers([a, random_page(layers=(1, 2)).take(positions(1), contiguous=True)])


def test_pages_that_follow_each_other_join_with_all_their_tokens() -> None:
    first = random_page().take(positions(1, 39))
    after = random_page(tokens=(40, 43), seed=1)
    whole = join_tokens([first, after])
    assert whole.kept is not None
    np.testing.assert_array_equal(whole.kept.positions, [1, 39, 40, 41, 42])
    assert bits(whole.cut_heads((1, 2)))["k"] == b"".join(
        np.concatenate([p.streams["k"].data[layer, 1] for p in (first, after)]).tobytes()
        for layer in (0, 1)
    )
    wide = Kept(np.broadcast_to(positions(1, 39), (2, 2, 2)), np.full((2, 2, 2), 7, np.float32))
    merged = join_tokens([with_kept(random_page(), 2, wide), after])
    assert merged.kept is not None
    assert merged.kept.weights is not None
    np.testing.assert_array_equal(merged.kept.weights[1, 1], [7, 7, 1, 1, 1])


def test_pages_that_lack_tokens_are_not_cut_by_tokens() -> None:
    page = restored(make_codec("random", {"ratio": 2}), random_page())
    assert page.cut_layers((1, 2)).entries == 20
    with pytest.raises(UnsupportedTensorError, match="not cut"):
        page.cut_tokens((0, 5))
