"""Mutate real blobs, mend their checksums, decode: ``python fuzz_decoder.py SECONDS SEED``.

Whatever the bytes are, the answer is a page or one of the documented errors. The
address space is capped, so memory taken for a lie about sizes ends the run. Prints the
number of cases and how they ended.
"""

import collections
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from codec_samples import MODEL_ID, Calibrations, meta_for, page_of, random_calibration, rope_spec

from kvferry.codec.base import DType, PageTensors
from kvferry.codec.blob import StoredBlob, decode_blob, decode_blobs, encode_blob
from kvferry.codec.calibration import (
    CalibrationSet,
    CurvePoint,
    GroupCalibration,
    GroupEntry,
)
from kvferry.codec.registry import make_codec
from kvferry.errors import FerryError
from kvferry.proto import container
from kvferry.proto.container import SectionData
from kvferry.proto.v1 import blob_pb2

ADDRESS_SPACE = 3 << 30
SLOW_SECONDS = 5.0
KNOWN = random_calibration(dim=16, rank=12, rope=rope_spec(16), importance=True)
SOURCE = Calibrations(KNOWN)
INTERESTING = (0, 1, 2, 3, 4, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


def samples() -> list[bytes]:
    made = []
    for name, options in (
        ("raw", {}),
        ("zstd", {}),
        ("affine", {"bits": 8}),
        ("affine", {"bits": 3}),
        ("bitpack", {"bits": 6}),
        ("ferry", {"step": 0.5}),
        ("streaming", {"ratio": 2}),
        ("random", {"ratio": 2, "positions": "original"}),
    ):
        codec = make_codec(name, options, KNOWN)
        for span, dtype in (((0, 20), DType.FLOAT16), ((64, 90), DType.BFLOAT16)):
            made.append(encode_blob(codec, page_of(KNOWN, span, dtype), meta_for())[1])
    known = CalibrationSet(
        model_id=MODEL_ID,
        model_layers=2,
        model_heads=2,
        groups=(GroupEntry(KNOWN.id, KNOWN.layers, KNOWN.heads),),
        curve=(CurvePoint(1.0, 2.0, 0.01),),
    )
    return [*made, KNOWN.to_blob()[1], known.to_blob()[1]]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few flips, overwrites, cuts or insertions, mostly near the start."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(min(len(out), rng.choice((8, 64, 1 << 30)))) if out else 0
        kind = rng.random()
        if kind < 0.4 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind < 0.7 and out:
            out[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind < 0.85:
            del out[at : at + rng.choice((1, 4, 1 << 30))]
        else:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 40)))
    return bytes(out)


def mutate_header(header: blob_pb2.BlobHeader, rng: random.Random) -> None:
    """Change one field, or swap, drop or repeat a stream."""
    kind = rng.randrange(6)
    if kind == 0:
        name = rng.choice(
            ["token_start", "token_end", "layer_start", "layer_end", "head_start", "head_end"]
        )
        setattr(header, name, rng.choice(INTERESTING))
    elif kind == 1 and header.streams:
        stream = rng.choice(list(header.streams))
        if stream.shape:
            stream.shape[rng.randrange(len(stream.shape))] = rng.choice(INTERESTING)
    elif kind == 2 and header.streams:
        rng.choice(list(header.streams)).dtype = rng.choice(["float16", "bfloat16", "float32", "x"])
    elif kind == 3:
        header.codec.name = rng.choice(["raw", "zstd", "affine", "bitpack", "ferry"])
    elif kind == 4:
        text = header.codec.params_json
        number = rng.choice(["0", "-1", "1e9", "1e99", "999999999999", "null", '"8"', "[]", "2"])
        digits = [i for i, c in enumerate(text) if c.isdigit()]
        if digits:
            at = rng.choice(digits)
            header.codec.params_json = text[:at] + number + text[at + 1 :]
    elif header.streams:
        if rng.random() < 0.5:
            del header.streams[rng.randrange(len(header.streams))]
        else:
            header.streams.add(name=rng.choice(["k", "v", "w"]), shape=[2, 2, 20, 16])


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Sometimes the file as it is, mostly its parts with everything sealed again."""
    if rng.random() < 0.1:
        return mutate_bytes(data, rng)
    blob = container.parse(data)
    sections = list(blob.sections.values())
    if rng.random() < 0.35:
        mutate_header(blob.header, rng)
    if rng.random() < 0.75:
        index = rng.randrange(len(sections))
        old = sections[index]
        raw = old.raw_length
        if rng.random() < 0.2:
            raw = rng.choice((0, 1, raw // 2, raw * 2, raw + 1, 2**30, 2**62))
        changed = mutate_bytes(bytes(old.data), rng)
        if blob.header.kind == blob_pb2.BLOB_KIND_CALIBRATION and rng.random() < 0.8:
            raw = len(changed)
        sections[index] = SectionData(old.name, changed, raw)
    if rng.random() < 0.05:
        sections.append(SectionData(rng.choice(["k+v/q", "k+v/steps", "x", "k/raw"]) + "2", b"", 0))
    if rng.random() < 0.05:
        del sections[rng.randrange(len(sections))]
    if blob.header.kind == blob_pb2.BLOB_KIND_CALIBRATION and rng.random() < 0.9:
        from kvferry.codec import calibration_format as fmt

        by_name = {s.name: bytes(s.data) for s in sections}
        text, raw_bytes = by_name.get("description", b""), by_name.get("tensors", b"")
        blob.header.page_key = fmt._digest(text, raw_bytes)
    return container.pack(blob.header, sections)


def decode(data: bytes, rng: random.Random) -> str:
    """One case, by the door that such a blob comes in through."""
    try:
        header = container.read_header(data)
        if header.kind == blob_pb2.BLOB_KIND_CALIBRATION:
            cls = CalibrationSet if header.codec.name == "manifest" else GroupCalibration
            found = cls.from_blob(data)
            if isinstance(found, GroupCalibration):
                for bundle in found.bundles.values():
                    assert np.isfinite(bundle.fold.decode).all()
            return "calibration"
        key, tokens = container.key_of(header), (header.token_start, header.token_end)
        if rng.random() < 0.3:
            blobs = [StoredBlob(data, key, tokens)] * 2
            pages = decode_blobs(blobs, model_id=MODEL_ID, cut=None, calibrations=SOURCE)
            for page in pages:
                if not isinstance(page, PageTensors):
                    raise page
        else:
            page = decode_blob(
                data, key=key, model_id=MODEL_ID, tokens=tokens, cut=None, calibrations=SOURCE
            )
    except FerryError as exc:
        text = str(exc)
        assert "\n" not in text, text
        assert len(text) < 2000, text
        return type(exc).__name__
    return "page"


def main(seconds: float, seed: int) -> None:
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    rng = random.Random(seed)
    blobs = samples()
    ends: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutate(rng.choice(blobs), rng)
        started = time.monotonic()
        try:
            ends[decode(data, rng)] += 1
        except BaseException:
            Path("fuzz_failure.kvferry").write_bytes(data)
            raise
        if time.monotonic() - started > SLOW_SECONDS:
            raise SystemExit(f"{time.monotonic() - started:.1f} s for {len(data)} bytes")
    print(sum(ends.values()), dict(ends))


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main(float(sys.argv[1]), int(sys.argv[2]))
