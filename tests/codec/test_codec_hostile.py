"""Bytes from a stranger: documented errors, no crash, no hang, no memory for lies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from codec_samples import decoded, meta_for, page_of, random_calibration, rope_spec
from hostile_samples import damaged, section_lies

from kvferry.codec.base import DType
from kvferry.codec.blob import encode_blob
from kvferry.codec.registry import make_codec
from kvferry.errors import CodecError, CorruptBlobError
from kvferry.proto import container
from kvferry.proto.container import SectionData
from kvferry.proto.v1 import blob_pb2

KNOWN = random_calibration(dim=8, rank=4, layers=(0, 1), heads=(0, 1), rope=rope_spec(8))
SMALL = {
    name: encode_blob(
        make_codec(name, options, KNOWN), page_of(KNOWN, (0, 7), DType.FLOAT16), meta_for()
    )
    for name, options in (
        ("raw", {}),
        ("zstd", {}),
        ("affine", {}),
        ("bitpack", {}),
        ("ferry", {"step": 0.5}),
        ("streaming", {"ratio": 2, "sinks": 1}),
        ("random", {"ratio": 2}),
    )
}


def decode(name: str, data: bytes) -> None:
    decoded(data, SMALL[name][0], (0, 7), KNOWN)


@pytest.mark.parametrize("name", list(SMALL))
def test_truncation_at_every_byte_and_every_flipped_bit(name: str) -> None:
    data = SMALL[name][1]
    decode(name, data)
    for bad in damaged(data):
        with pytest.raises(CodecError):
            decode(name, bad)


@pytest.mark.parametrize("name", list(SMALL))
def test_sections_that_lie_behind_good_checksums(name: str) -> None:
    for lie in section_lies(SMALL[name][1]):
        with pytest.raises(CorruptBlobError):
            decode(name, lie)


def test_one_codecs_bytes_under_anothers_name() -> None:
    for name, (_, data) in SMALL.items():
        for other in SMALL:
            if other == name:
                continue
            blob = container.parse(data)
            spec = container.parse(SMALL[other][1]).header.codec
            blob.header.codec.CopyFrom(spec)
            with pytest.raises(CodecError):
                decode(other, container.pack(blob.header, list(blob.sections.values())))


GUARD = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from fuzz_decoder import ADDRESS_SPACE, decode
import random
if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[2]).iterdir()):
    end = decode(path.read_bytes(), random.Random(0))
    assert end.endswith("Error"), (path, end)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
print(grown if sys.platform != "darwin" else grown // 1024)
"""


def run_alone(*arguments: str) -> str:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-X", "faulthandler", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_hostile_headers_take_no_memory(tmp_path: Path) -> None:
    """Tensors, frames and tables that claim gigabytes to terabytes."""
    cases: list[bytes] = []
    for _, data in SMALL.values():
        for tokens, dim in ((7, 65_536), (7, 2**32 - 1), (2**31, 8), (2**32 - 1, 65_536)):
            blob = container.parse(data)
            blob.header.token_start, blob.header.token_end = 0, tokens
            for stream in blob.header.streams:
                stream.shape[2:] = [tokens, dim]
            sections = [SectionData(s.name, s.data, 1 << 28) for s in blob.sections.values()]
            cases.append(container.pack(blob.header, sections))
    frame = bytes.fromhex("28b52ffd") + bytes([0b11100000]) + (1 << 40).to_bytes(8, "little")
    blob = container.parse(SMALL["zstd"][1])
    sections = [
        SectionData(s.name, frame + b"\3\0\0", s.raw_length) for s in blob.sections.values()
    ]
    cases.append(container.pack(blob.header, sections))
    for index, data in enumerate(cases):
        (tmp_path / f"{index}.kvferry").write_bytes(data)
    grown = run_alone("-c", GUARD, str(Path(__file__).parent), str(tmp_path))
    assert int(grown) < 40_000, "KiB grown while refusing"


def test_fuzzing_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = Path(__file__).parent / "fuzz_decoder.py"
    printed = run_alone(str(script), "5", "2024")
    count, _, ends = printed.partition(" ")
    assert int(count) > 200
    assert "CorruptBlobError" in ends
    assert "'page'" in ends  # some mutations are harmless, so decoders were reached
    assert "CalibrationCorruptError" in ends


def test_unknown_fields_of_a_later_version_are_no_obstacle() -> None:
    blob = container.parse(SMALL["raw"][1])
    raw = blob.header.SerializeToString() + bytes.fromhex("9a0601ff")  # field 99, one byte
    later = blob_pb2.BlobHeader.FromString(raw)
    decode("raw", container.pack(later, list(blob.sections.values())))
