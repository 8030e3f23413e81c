import numpy as np
import pytest

from kvferry.codec.bitpack_direct import BitPackedKVCache
from kvferry.errors import ConfigError, CorruptBlobError, UnsupportedTensorError


def sample(dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """(batch, heads, tokens, dim), as the seed's own test has them."""
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((1, 32, 128, 96)).astype(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("num_bits", "most"), [(6, 0.03), (8, 0.01)])
def test_error_is_what_the_bits_allow(dtype: type, num_bits: int, most: float) -> None:
    """Of normal numbers 8 bits lose less than 1 %; 6 bits cannot: a step is 8 % of one."""
    cache = BitPackedKVCache(num_bits=num_bits, page_size_kb=32)
    exact = sample(dtype)
    packed = cache.compress_kv(*exact)
    for before, after, held in zip(exact, cache.decompress_kv(*packed), packed, strict=True):
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        error = np.abs(after.astype(np.float32) - before).mean() / np.abs(before).mean()
        assert 0.5 * most < error < most
        spent = 8 * held.nbytes / before.size
        assert num_bits < spent < num_bits + 0.3
        assert all(len(page) <= 32 * 1024 for page in held.pages)


def test_some_heads_are_read_alone() -> None:
    k, v = sample()
    packed, _ = BitPackedKVCache().compress_kv(k, v)
    part = packed.unpack((5, 9)).data
    whole = packed.unpack().data
    assert part.shape == (1, 4, 128, 96)
    assert (part == whole[:, 5:9]).all()


def test_what_cannot_be_packed_is_refused() -> None:
    k, v = sample()
    cache = BitPackedKVCache()
    for wrong in (k.astype(np.float64), k[0], k[:, :, :0]):
        with pytest.raises(UnsupportedTensorError, match="'v'"):
            cache.compress_kv(k, wrong)
    k[0, 3, 7, 2] = np.nan
    with pytest.raises(UnsupportedTensorError, match="'k'"):
        cache.compress_kv(k, v)


def test_a_page_that_was_cut_off_is_told() -> None:
    packed, _ = BitPackedKVCache().compress_kv(*sample())
    torn = type(packed)(packed.shape, packed.dtype, packed.layout, (b"", *packed.pages[1:]))
    with pytest.raises(CorruptBlobError, match="page 0"):
        torn.unpack()
    assert torn.unpack((30, 32)).data.shape == (1, 2, 128, 96)


@pytest.mark.parametrize("rows", [(0, 0), (2, 1), (-1, 1), (30, 33)])
def test_rows_that_there_are_not_are_refused(rows: tuple[int, int]) -> None:
    packed, _ = BitPackedKVCache().compress_kv(*sample())
    with pytest.raises(ConfigError, match="rows"):
        packed.unpack(rows)
