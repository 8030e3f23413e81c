"""A blob of the published codec that lies behind good checksums."""

import zlib
from collections.abc import Callable

import numpy as np
import pytest
from codec_samples import decoded, meta_for, page_of, rope_spec
from hostile_samples import damaged, section_lies
from kvtc_samples import kvtc_calibration

from kvferry.codec.base import DType
from kvferry.codec.blob import encode_blob
from kvferry.codec.kvtc_pack import raw_size
from kvferry.codec.kvtc_plan import BitPlan
from kvferry.codec.registry import make_codec
from kvferry.errors import CodecError, CorruptBlobError
from kvferry.proto import container
from kvferry.proto.container import SectionData
from kvferry.proto.keys import canonical_json

KNOWN = kvtc_calibration(dim=8, rank=20, layers=(0, 2), heads=(0, 1), rope=rope_spec(8))
SMALL = {
    entropy: encode_blob(
        make_codec("kvtc", {"ratio": 2, "entropy": entropy}, KNOWN),
        page_of(KNOWN, (0, 9), DType.FLOAT16),
        meta_for(),
    )
    for entropy in ("zlib", "zstd")
}


def decode(entropy: str, data: bytes, *, moved: bool = False) -> None:
    """``moved``: ask for the key that the forged parameters have."""
    key = container.key_of(container.read_header(data)) if moved else SMALL[entropy][0]
    decoded(data, key, (0, 9), KNOWN)


@pytest.mark.parametrize("entropy", list(SMALL))
def test_truncation_at_every_byte_and_a_flip_in_each(entropy: str) -> None:
    data = SMALL[entropy][1]
    decode(entropy, data)
    for bad in damaged(data, flips=1):
        with pytest.raises(CodecError):
            decode(entropy, bad)


@pytest.mark.parametrize("entropy", list(SMALL))
def test_sections_that_lie(entropy: str) -> None:
    data = SMALL[entropy][1]
    assert set(container.parse(data).sections) == {"k/q", "k/sinks", "v/q", "v/sinks"}
    for lie in section_lies(data, zlib.compress(bytes(1 << 26))):
        with pytest.raises(CorruptBlobError):
            decode(entropy, lie)


Change = Callable[[dict[str, object]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.pop("plan"),
        lambda p: p.pop("entropy"),
        lambda p: p.update(more=1),
        lambda p: p.update(sinks=-1),
        lambda p: p.update(sinks=5),
        lambda p: p.update(sinks=1 << 40),
        lambda p: p.update(sinks="4"),
        lambda p: p.update(entropy="lzma"),
        lambda p: p.update(entropy=["zlib"]),
        lambda p: p.update(entropy="zstd"),
        lambda p: p.update(plan=[]),
        lambda p: p.update(plan={"k": p["plan"]["k"]}),
        lambda p: p["plan"].update(k={}),
        lambda p: p["plan"].update(k=[]),
        lambda p: p["plan"].update(k=[[8, 1, 21]]),
        lambda p: p["plan"].update(k=[[8, 64, 1]]),
        lambda p: p["plan"].update(k=[[8, 1, 1 << 50]]),
        lambda p: p["plan"].update(k=[[8, 1, 1.5]]),
        lambda p: p["plan"].update(k=[[1, 1, 1]]),
        lambda p: p["plan"].update(k=p["plan"]["k"] * 2),
    ],
)
def test_parameters_that_lie(change: Change) -> None:
    blob = container.parse(SMALL["zlib"][1])
    params = container.codec_params(blob.header)
    change(params)
    blob.header.codec.params_json = canonical_json(params).decode()
    forged = container.pack(blob.header, list(blob.sections.values()))
    with pytest.raises(CorruptBlobError):
        decode("zlib", forged, moved=True)


@pytest.mark.parametrize("half", [0x7E00, 0x7C00, 0xFC00])
@pytest.mark.parametrize("place", ["shift", "scale"])
def test_shifts_and_scales_that_are_no_numbers(place: str, half: int) -> None:
    blob = container.parse(SMALL["zlib"][1])
    params = container.codec_params(blob.header)
    plan = BitPlan.from_json(params["plan"]["k"])  # type: ignore[index]
    raw = bytearray(zlib.decompress(bytes(blob.sections["k/q"].data)))
    assert len(raw) == raw_size(plan, 5)
    count = 5 * len(plan.stored)
    at = 0 if place == "shift" else 2 * count
    raw[at : at + count] = np.full(count, half & 0xFF, dtype=np.uint8).tobytes()
    raw[at + count : at + 2 * count] = np.full(count, half >> 8, dtype=np.uint8).tobytes()
    forged = SectionData("k/q", zlib.compress(bytes(raw)), len(raw))
    sections = [forged if s.name == "k/q" else s for s in blob.sections.values()]
    with pytest.raises(CorruptBlobError, match="NaN or infinite"):
        decode("zlib", container.pack(blob.header, sections))
