import numpy as np
import pytest
from blake3 import blake3
from codec_samples import bits, decoded, meta_for, random_page, restored
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.bitpack import BitpackCodec
from kvferry.codec.bitpack_pages import MIN_RUN, PageLayout, pack_pages, unpack_pages
from kvferry.codec.blob import decode_blob, encode_blob
from kvferry.codec.registry import make_codec
from kvferry.errors import ConfigError, CorruptBlobError
from kvferry.proto import container
from kvferry.proto.container import SectionData
from kvferry.proto.keys import SINK_TOKENS

ROUNDING = {DType.FLOAT16: 2.0**-10, DType.BFLOAT16: 2.0**-8, DType.FLOAT32: 2.0**-20}


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 5),
    tokens=st.one_of(st.integers(1, 80), st.integers(81, 900)),
    dim=st.sampled_from([1, 2, 7, 32, 64, 80, 576]),
    level_bits=st.sampled_from([6, 8]),
    kb=st.sampled_from([16, 23, 64]),
    scale=st.sampled_from([0.0, 1e-38, 1e-9, 1.0, 3e4, 1e36]),
    offset=st.sampled_from([0.0, 5.0, -6e4]),
    seed=st.integers(0, 9),
)
def test_error_is_within_half_a_step_of_the_range_it_is_coded_in(
    rows: int,
    tokens: int,
    dim: int,
    level_bits: int,
    kb: int,
    scale: float,
    offset: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, tokens, dim)) * scale + offset
    values = values.astype(np.float32)
    layout = PageLayout(rows, tokens, dim, level_bits, kb * 1024)
    pages = pack_pages(values, layout)
    assert len(pages) == layout.pages
    back = unpack_pages(pages, layout, (0, rows), "k")
    for run in range(layout.runs):
        part = slice(run * layout.run_tokens, (run + 1) * layout.run_tokens)
        here = values[:, part]
        axis = 1 if layout.by_channel else 2
        span = here.max(axis=axis, keepdims=True) - here.min(axis=axis, keepdims=True)
        half = 0.506 * span / (2**level_bits - 1)  # ends may be rounded outwards
        slack = 2.0**-22 * np.abs(here).max() + 2e-35
        assert (np.abs(back[:, part] - here) <= half + slack).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    tokens=st.integers(1, 700),
    dim=st.sampled_from([16, 64, 128]),
    kb=st.integers(16, 64),
    cut=st.tuples(st.integers(0, 39), st.integers(1, 40)),
)
def test_rows_are_read_from_their_own_pages_which_are_of_the_size_asked_for(
    rows: int, tokens: int, dim: int, kb: int, cut: tuple[int, int]
) -> None:
    wanted = (min(cut[0], rows - 1), min(rows, cut[0] + cut[1]))
    values = np.random.default_rng(rows).standard_normal((rows, tokens, dim)).astype(np.float32)
    layout = PageLayout(rows, tokens, dim, 6, kb * 1024)
    pages = pack_pages(values, layout)
    assert max(map(len, pages)) <= kb * 1024
    if layout.pages > 1:  # pages are filled, the last one as far as there is something
        assert len(pages[0]) > kb * 1024 / 2.1
    first, last = layout.pages_of(wanted)
    found = unpack_pages(pages[first:last], layout, wanted, "k")
    whole = unpack_pages(pages, layout, (0, rows), "k")
    assert (found == whole[slice(*wanted)]).all()


def test_a_layer_is_decoded_without_the_pages_of_others() -> None:
    page = random_page(layers=(4, 12), heads=(0, 3), tokens=(256, 512), dim=64)
    codec = BitpackCodec()
    key, data = encode_blob(codec, page, meta_for())
    whole = decoded(data, key, page.tokens)
    blob = container.parse(data)
    layout = PageLayout(24, 256, 64, 6, 32 * 1024)
    kept = {str(i) for i in range(*layout.pages_of((9, 15)))}  # layers 7 and 8
    assert len(kept) < layout.pages / 2
    torn = [
        s if s.name.partition("/")[2] in kept else SectionData(s.name, b"torn", 4)
        for s in blob.sections.values()
    ]
    data = container.pack(blob.header, torn)
    found = decoded(data, key, page.tokens, cut=(7, 9))
    assert bits(found) == bits(whole.cut_layers((7, 9)))
    with pytest.raises(CorruptBlobError, match="page"):
        decoded(data, key, page.tokens, cut=(6, 9))


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("tokens", [(0, 3), (0, 4), (0, 5), (2, 70), (256, 512)])
def test_first_tokens_are_exact_and_the_others_near(dtype: DType, tokens: tuple[int, int]) -> None:
    page = random_page(tokens=tokens, dtype=dtype)
    found = restored(BitpackCodec(8), page)
    exact = max(0, min(SINK_TOKENS, tokens[1]) - tokens[0])
    for name, stream in page.streams.items():
        before, after = stream.float32(), found.streams[name].float32()
        kept = before[:, :, :exact]
        assert (after[:, :, :exact] == kept.astype(np.float16).astype(np.float32)).all()
        assert np.abs(after - before).max() <= 8 / 255 / 2 + 5 * ROUNDING[dtype]


def test_states_have_no_first_tokens() -> None:
    data = np.random.default_rng(0).standard_normal((2, 3, 50, 16)).astype(np.float32)
    page = PageTensors((0, 2), (0, 1), (0, 9), {"state.k": Stream("state.k", data, DType.FLOAT32)})
    found = restored(BitpackCodec(8), page)
    assert 0 < np.abs(found.streams["state.k"].data - data).max() < 0.02


def test_one_wide_channel_costs_the_others_nothing() -> None:
    """As rotated keys have them; a range for a whole head would lose the others."""
    page = random_page(tokens=(4, 260), dim=64)
    for stream in page.streams.values():
        stream.data[..., 5] *= 1000
    found = restored(BitpackCodec(6), page)
    for name, stream in page.streams.items():
        error = np.abs(found.streams[name].float32() - stream.float32())
        assert np.delete(error, 5, axis=3).max() < 0.1


def test_six_and_eight_bits_cost_what_they_say() -> None:
    page = random_page(layers=(0, 8), heads=(0, 3), tokens=(256, 512), dim=64)
    for level_bits in (6, 8):
        _, data = encode_blob(BitpackCodec(level_bits), page, meta_for())
        spent = 8 * len(data) / (page.raw_bytes_fp16 / 2)
        assert level_bits + 0.125 < spent < level_bits + 0.16


def test_options_are_checked_and_told() -> None:
    assert make_codec("bitpack", {}).params["bits"] == 6
    codec = make_codec("bitpack", {"bits": "8", "page_size_kb": "64"})
    assert codec.params == {"bits": 8, "page_size_kb": 64, "sinks": 4}
    for wrong in ({"bits": 7}, {"page_size_kb": 15}, {"page_size_kb": "big"}, {"size": 32}):
        with pytest.raises(ConfigError):
            make_codec("bitpack", wrong)


def test_a_range_that_is_none_is_refused() -> None:
    page = random_page(layers=(0, 1), heads=(0, 1), tokens=(4, 40), dim=16)
    key, data = encode_blob(BitpackCodec(), page, meta_for())
    blob = container.parse(data)
    section = blob.sections["k/0"]
    for ends in ((np.nan, 1.0), (1.0, np.inf), (1.0, -1.0)):
        forged = np.frombuffer(section.data, dtype=np.uint8).copy()
        head = forged[: 4 * 16].view("<f2")
        head[0], head[16] = ends
        changed = [
            SectionData(s.name, forged.tobytes() if s is section else s.data, s.raw_length)
            for s in blob.sections.values()
        ]
        with pytest.raises(CorruptBlobError, match="range"):
            decoded(container.pack(blob.header, changed), key, page.tokens)


def test_a_wider_page_of_float32_ranges_reads_as_well() -> None:
    """Channels whose range float16 cannot tell."""
    values = np.full((2, MIN_RUN, 8), 3e5, np.float32)
    values[..., ::2] += np.random.default_rng(0).random((2, MIN_RUN, 4)).astype(np.float32)
    layout = PageLayout(2, MIN_RUN, 8, 8, 16 * 1024)
    pages = pack_pages(values, layout)
    assert [len(page) for page in pages] == [layout.page_sizes(0)[1]]
    np.testing.assert_allclose(unpack_pages(pages, layout, (0, 2), "k"), values, atol=0.05)


def test_pages_of_many_tokens_are_the_same_on_every_machine() -> None:
    """The golden blobs have too few tokens for ranges of channels."""
    at = np.arange(3 * 300 * 20, dtype=np.uint32).reshape(3, 300, 20)
    values = ((at * np.uint32(2_654_435_761)) >> np.uint32(21)).astype(np.float32) / 256 - 4
    for level_bits, digest in ((6, "17957a0e314b6e47"), (8, "575f7f0f0005d5d8")):
        pages = pack_pages(values, PageLayout(3, 300, 20, level_bits, 16 * 1024))
        assert blake3(b"".join(pages)).hexdigest()[:16] == digest


def test_params_of_a_stranger_are_refused() -> None:
    page = random_page(tokens=(4, 40))
    key, data = encode_blob(BitpackCodec(), page, meta_for())
    for params in (
        '{"bits":7,"page_size_kb":32,"sinks":4}',
        '{"bits":6,"page_size_kb":0,"sinks":4}',
        '{"bits":6,"page_size_kb":32,"sinks":-1}',
        '{"bits":6,"page_size_kb":32}',
    ):
        blob = container.parse(data)
        blob.header.codec.params_json = params
        forged = container.pack(blob.header, list(blob.sections.values()))
        with pytest.raises(CorruptBlobError):
            decode_blob(
                forged,
                key=container.key_of(container.read_header(forged)),
                model_id=meta_for().model_id,
                tokens=page.tokens,
                cut=None,
                calibrations=None,  # type: ignore[arg-type]
            )
    assert decoded(data, key, page.tokens).tokens == page.tokens
