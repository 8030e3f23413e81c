import os
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.errors import (
    BlobTooLargeError,
    CorruptBlobError,
    InvalidKeyError,
    UnsupportedVersionError,
)
from kvferry.proto import container
from kvferry.proto.container import Limits, SectionData
from kvferry.proto.v1 import blob_pb2


def header(**changes: object) -> blob_pb2.BlobHeader:
    values: dict[str, object] = {
        "kind": blob_pb2.BLOB_KIND_PAGE,
        "model_id": bytes(32),
        "page_key": bytes(range(32)),
        "previous_key": bytes(32),
        "token_end": 256,
        "layer_end": 2,
        "head_end": 1,
        "model_layers": 2,
        "model_heads": 1,
        "codec": blob_pb2.CodecSpec(name="raw", version=1, params_json="{}"),
        "streams": [blob_pb2.StreamInfo(name="k", shape=[2, 1, 256, 8], dtype="float16")],
    }
    return blob_pb2.BlobHeader(**{**values, **changes})  # type: ignore[arg-type]


def section(name: str, data: bytes) -> SectionData:
    return SectionData(name, data, len(data))


BLOB = container.pack(header(), [section("k/raw", b"abcdef"), section("v/raw", b"")])


def seal(head: blob_pb2.BlobHeader, payload: bytes) -> bytes:
    """Frame a header as it stands, its section table untouched."""
    raw = head.SerializeToString()
    body = container.MAGIC + len(raw).to_bytes(4, "little") + raw + payload
    return body + blake3(body).digest()


def table(*rows: tuple[str, int, int, int], payload: bytes = b"abcdef") -> bytes:
    """A blob whose section table says (name, offset, length, raw length)."""
    head = header(format_version=1)
    for name, offset, length, raw in rows:
        data = payload[offset : offset + length] if offset < 1 << 32 else b""
        head.sections.add(
            name=name,
            offset=offset,
            length=length,
            raw_length=raw,
            checksum=container.checksum(data),
        )
    return seal(head, payload)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.text(min_size=1, max_size=12), st.binary(max_size=200)),
        max_size=8,
        unique_by=lambda p: p[0],
    ),
    producer=st.text(max_size=20),
)
def test_what_is_packed_is_read(parts: list[tuple[str, bytes]], producer: str) -> None:
    data = container.pack(header(producer=producer), [section(*part) for part in parts])
    blob = container.parse(memoryview(data))
    assert {name: bytes(s.data) for name, s in blob.sections.items()} == dict(parts)
    assert blob.header.producer == producer
    assert blob.size == len(data)
    assert data == container.pack(blob.header, list(blob.sections.values()))
    assert container.key_of(container.read_header(data)).page_key == bytes(range(32))
    assert all(finding.ok for finding in container.examine(data))


def test_header_is_read_from_the_start_alone() -> None:
    needed = container.header_bytes_needed(BLOB[: container.PREFIX_BYTES])
    head = container.read_header(BLOB[:needed], size=len(BLOB))
    assert [s.name for s in head.sections] == ["k/raw", "v/raw"]
    with pytest.raises(CorruptBlobError):
        container.read_header(BLOB[:needed])
    with pytest.raises(CorruptBlobError):
        container.read_header(BLOB[:needed], size=len(BLOB) + 1)


@pytest.mark.parametrize("cut", range(len(BLOB)))
def test_every_truncation_is_refused(cut: int) -> None:
    with pytest.raises(CorruptBlobError):
        container.parse(BLOB[:cut])
    assert not all(finding.ok for finding in container.examine(BLOB[:cut]))


@pytest.mark.parametrize("position", range(len(BLOB)))
def test_every_flipped_bit_is_refused(position: int) -> None:
    for bit in range(8):
        data = bytearray(BLOB)
        data[position] ^= 1 << bit
        with pytest.raises((CorruptBlobError, UnsupportedVersionError)):
            container.parse(bytes(data))
        assert not all(finding.ok for finding in container.examine(bytes(data)))


@pytest.mark.parametrize("extra", [b"\0", b"more", BLOB])
def test_bytes_after_the_end_are_refused(extra: bytes) -> None:
    with pytest.raises(CorruptBlobError):
        container.parse(BLOB + extra)


TERA = 1 << 40


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", CorruptBlobError),
        (b"GGUF" * 100, CorruptBlobError),
        (container.MAGIC_NAME + b"\x02" + BLOB[8:], UnsupportedVersionError),
        (container.MAGIC + b"\xff\xff\xff\xff" + bytes(100), BlobTooLargeError),
        (seal(header(format_version=2), b""), UnsupportedVersionError),
        (seal(header(format_version=0), b""), UnsupportedVersionError),
        (table(("k", 0, TERA, TERA)), CorruptBlobError),
        (table(("k", 0, 2**64 - 1, 1)), CorruptBlobError),
        (table(("k", 0, 6, TERA)), BlobTooLargeError),
        (table(("k", 0, 3, 2**63), ("v", 3, 3, 2**63)), BlobTooLargeError),
        (table(("k", 0, 4, 4), ("v", 3, 3, 3)), CorruptBlobError),
        (table(("k", 0, 3, 3), ("v", 4, 2, 2)), CorruptBlobError),
        (table(("k", 1, 5, 5)), CorruptBlobError),
        (table(("k", TERA, 6, 6)), CorruptBlobError),
        (table(("k", 0, 5, 5)), CorruptBlobError),
        (table(("k", 0, 3, 3), ("k", 3, 3, 3)), CorruptBlobError),
        (table(payload=b"left over"), CorruptBlobError),
        (table(*((f"k{i}", 0, 0, 0) for i in range(2049)), payload=b""), BlobTooLargeError),
    ],
)
def test_hostile_frames_are_refused(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        container.parse(data)
    assert not all(finding.ok for finding in container.examine(data))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_id": b""},
        {"model_id": bytes(31)},
        {"page_key": bytes(33)},
        {"previous_key": b"x"},
        {"previous_key": b""},
        {"rope_fingerprint": b"x"},
        {"kind": blob_pb2.BLOB_KIND_UNSPECIFIED},
        {"kind": 77},
        {"token_start": 256},
        {"token_end": 2**63},
        {"layer_start": 2},
        {"layer_end": 3},
        {"head_end": 2},
        {"head_end": 0},
        {"model_layers": 2**32 - 1, "layer_end": 2**32 - 1},
        {"model_layers": 2**32 - 1},
        {"streams": [blob_pb2.StreamInfo(name=f"s{i}") for i in range(65)]},
        {"codec": blob_pb2.CodecSpec()},
        {"codec": blob_pb2.CodecSpec(name="../etc", version=1)},
        {"codec": blob_pb2.CodecSpec(name="raw", version=2**31)},
        {"codec": blob_pb2.CodecSpec(name="raw", version=1, params_json="[1]")},
        {"codec": blob_pb2.CodecSpec(name="raw", version=1, params_json="{")},
        {"codec": blob_pb2.CodecSpec(name="raw", version=1, params_json='{"a":NaN}')},
        {"codec": blob_pb2.CodecSpec(name="raw", version=1, params_json='{"a":1e999}')},
        {"codec": blob_pb2.CodecSpec(name="raw", version=1, params_json='{"a":"\\ud800"}')},
        {"codec": blob_pb2.CodecSpec(name="raw", version=1, params_json="[" * 50_000)},
        {"codec": blob_pb2.CodecSpec(name="raw", version=1, params_json='{"a":%s}' % ("9" * 5000))},
        {"codec": blob_pb2.CodecSpec(name="raw", version=1, calibration_id=b"x")},
    ],
)
def test_headers_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    data = container.pack(header(**changes), [section("k/raw", b"abcdef")])
    with pytest.raises(CorruptBlobError):
        container.read_header(data)
    assert not all(finding.ok for finding in container.examine(data))


def test_a_header_that_is_no_message_is_refused() -> None:
    for raw in (b"\xff" * 20, b"\x08", b"\x1a\xff\xff\xff\xff\x0f", b"\x92\x01\x02\xff\xfe"):
        body = container.MAGIC + len(raw).to_bytes(4, "little") + raw
        with pytest.raises((CorruptBlobError, UnsupportedVersionError)):
            container.parse(body + blake3(body).digest())


def test_a_section_checksum_counts_even_where_the_digest_fits() -> None:
    head = header(format_version=1)
    head.sections.add(name="k", length=6, raw_length=6, checksum=container.checksum(b"abcdeF"))
    with pytest.raises(CorruptBlobError, match="checksum"):
        container.parse(seal(head, b"abcdef"))


def test_caps_are_the_callers() -> None:
    for limits in (
        Limits(max_blob=len(BLOB) - 1),
        Limits(max_header=10),
        Limits(max_sections=1),
        Limits(max_raw=5),
        Limits(max_streams=0),
    ):
        with pytest.raises(BlobTooLargeError):
            container.parse(BLOB, limits)


def test_key_of_a_bad_header_names_the_problem() -> None:
    with pytest.raises(InvalidKeyError, match="codec"):
        container.key_of(header(codec=blob_pb2.CodecSpec(name="Raw", version=1)))


GUARD = """
import resource, sys
from pathlib import Path
from kvferry.errors import CodecError
from kvferry.proto import container
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    data = path.read_bytes()
    try:
        container.parse(data)
    except CodecError as exc:
        str(exc)
    else:
        raise SystemExit(f"{path} was taken")
    container.examine(data)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
print(grown if sys.platform != "darwin" else grown // 1024)
"""


def test_hostile_sizes_take_no_memory(tmp_path: Path) -> None:
    many = header(format_version=1)
    for _ in range(60_000):
        many.sections.add()
    frames = [
        table(("k", 0, TERA, TERA)),
        table(("k", 0, 6, TERA)),
        table(("k", 0, 3, 2**63), ("v", 3, 3, 2**63)),
        container.MAGIC + b"\xff\xff\xff\xff" + bytes(100),
        container.pack(header(token_end=TERA * 4), []),
        seal(many, b""),
    ]
    for index, data in enumerate(frames):
        (tmp_path / str(index)).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", GUARD, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert int(done.stdout) < 40_000, "KiB grown while refusing"
