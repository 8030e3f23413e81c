"""Write golden vectors anew, those that are named: ``python tests/golden/regenerate.py NAME...``.

Without a name it writes nothing and says which there are; ``all`` is every one of them.
Tests only read them. A change here is a change of the published format: old blobs and
other implementations stop fitting, so bump the version that it concerns.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from golden_samples import (  # noqa: E402
    CALIBRATED,
    DROPPED,
    MERGED,
    SAMPLES,
    TOKENS,
    golden_calibration,
    golden_page,
    meta,
)

from kvferry.codec.blob import decode_blob, encode_blob  # noqa: E402
from kvferry.codec.registry import make_codec  # noqa: E402
from kvferry.codec.rope import RopeSpec  # noqa: E402
from kvferry.proto import keys  # noqa: E402
from kvferry.proto.identity import ModelFingerprint, model_id  # noqa: E402


def roots() -> list[dict[str, object]]:
    found = []
    for salt, model, page in (
        (bytes(range(16)), bytes(32), 256),
        (bytes(range(64)), bytes(range(32)), 256),
        (b"\xff" * 32, bytes(range(32)), 16),
    ):
        root = keys.root_key(salt, model, page)
        found.append(
            {"salt": salt.hex(), "model_id": model.hex(), "page_tokens": page, "root": root.hex()}
        )
    return found


def namespace_tags() -> list[dict[str, object]]:
    salts = (bytes(range(16)), bytes(range(64)), b"\xff" * 32)
    return [{"salt": s.hex(), "tag": f"{keys.namespace_tag(s):016x}"} for s in salts]


def pages() -> list[dict[str, object]]:
    root = keys.root_key(bytes(range(16)), bytes(32), 256)
    long = [(i * 7919) % 49_152 for i in range(600)]
    found = []
    for page, tokens, media in (
        (256, long, {}),
        (4, [0, 1, 2, 3, 2**32 - 1, 5, 6, 7, 8], {}),
        (4, [1, 2, 3, 4, 5, 6, 7, 8], {1: [b"\x11" * 32, b"\x22" * 32]}),
        (4, [1, 2, 3], {}),
    ):
        found.append(
            {
                "root": root.hex(),
                "page_tokens": page,
                "tokens": tokens,
                "media": {str(i): [m.hex() for m in hashes] for i, hashes in media.items()},
                "keys": [key.hex() for key in keys.page_keys(root, tokens, page, media)],
            }
        )
    return found


def tails() -> list[dict[str, object]]:
    previous = bytes(range(32))
    found = []
    for tokens, media in (([5, 6, 7], []), ([], []), ([2**32 - 1], [b"\x33" * 32])):
        key = keys.tail_key(previous, tokens, media)
        found.append(
            {
                "previous": previous.hex(),
                "tokens": tokens,
                "media": [m.hex() for m in media],
                "key": key.hex(),
            }
        )
    return found


def media() -> list[dict[str, object]]:
    found = []
    for start, end, content in ((0, 1, b""), (300, 310, b"\x44" * 32), (255, 513, b"cat")):
        found.append(
            {
                "start": start,
                "end": end,
                "content": content.hex(),
                "digest": keys.medium_digest(start, end, content).hex(),
            }
        )
    return found


def codec_ids() -> list[dict[str, object]]:
    found = []
    for name, params, calibration in (
        ("raw", {}, b""),
        ("affine", {"bits": 8}, b""),
        ("ferry", {"step": 0.5, "sinks": 4, "rank": {"v": 7, "k": 9}}, bytes(range(32))),
    ):
        found.append(
            {
                "name": name,
                "version": 1,
                "params": params,
                "calibration_id": calibration.hex(),
                "codec_id": keys.codec_id(name, 1, params, calibration),
            }
        )
    return found


def model_ids() -> list[dict[str, object]]:
    found = []
    for adapter in (b"", b"\x77" * 32):
        fingerprint = ModelFingerprint(
            config={"model_type": "llama", "rope_theta": 100000.0, "name": "é"},
            layers={1: b"\x02" * 32, 0: b"\x01" * 32},
            layer_count=2,
            shared={"norm": b"\x04" * 32, "embedding": b"\x03" * 32},
            tokenizer=b"\x05" * 32,
            rope={0: b"\x06" * 32, 1: b"\x06" * 32},
            adapter=adapter,
        )
        found.append(
            {
                "config": dict(fingerprint.config),
                "layers": [fingerprint.layers[i].hex() for i in range(2)],
                "shared": {n: d.hex() for n, d in fingerprint.shared.items()},
                "tokenizer": fingerprint.tokenizer.hex(),
                "rope": [fingerprint.rope[i].hex() for i in range(2)],
                "adapter": adapter.hex(),
                "model_id": model_id(fingerprint).hex(),
            }
        )
    return found


def blob_keys() -> list[dict[str, object]]:
    codec = keys.codec_id("raw", 1, {})
    found = []
    for key in (
        keys.BlobKey("page", bytes(range(32)), (0, 15), (0, 3), codec),
        keys.BlobKey("tail", bytes(range(32)), (15, 30), (1, 3), codec),
        keys.BlobKey("calibration", bytes(range(32))),
    ):
        found.append(
            {
                "kind": key.kind,
                "page_key": key.page_key.hex(),
                "layers": list(key.layers),
                "heads": list(key.heads),
                "codec_id": key.codec_id,
                "text": str(key),
            }
        )
    return found


def ropes() -> list[dict[str, object]]:
    freq = tuple(float(np.float32(10_000.0 ** (-i / 4))) for i in range(4))
    specs = (
        RopeSpec(0, False, ()),
        RopeSpec(8, False, freq),
        RopeSpec(8, True, freq, key_scale=1.25, position_scale=0.25),
    )
    return [{"spec": s.to_json(), "fingerprint": s.fingerprint().hex()} for s in specs]


def states() -> list[dict[str, object]]:
    """Of the first two tails, whole and in halves."""
    return [
        {
            "tail": tail["key"],
            "parts": parts,
            "key": keys.state_key(bytes.fromhex(str(tail["key"])), parts).hex(),
        }
        for tail in tails()[:2]
        for parts in (1, 2)
    ]


def key_vectors(folder: Path) -> None:
    vectors = {
        "format": 1,
        "note": "Digests are BLAKE3, all bytes hexadecimal; kvferry/proto/keys.py defines them.",
        "roots": roots(),
        "pages": pages(),
        "tails": tails(),
        "media": media(),
        "codec_ids": codec_ids(),
        "model_ids": model_ids(),
        "blob_keys": blob_keys(),
        "ropes": ropes(),
        "states": states(),
        "namespace_tags": namespace_tags(),
    }
    (folder / "keys.json").write_text(json.dumps(vectors, indent=1) + "\n")


def calibration(codec: str, folder: Path) -> None:
    data = golden_calibration(codec).to_blob()[1]
    (folder / f"calibration_{codec}.kvferry").write_bytes(data)


def dropped(name: str, options: dict[str, object], folder: Path) -> None:
    _, data = encode_blob(make_codec(name, options), golden_page(), meta())
    (folder / f"{name}.kvferry").write_bytes(data)


def merged(name: str, codec_name: str, options: dict[str, object], folder: Path) -> None:
    # The calibration only tells how keys are rotated.
    codec = make_codec(codec_name, options, golden_calibration("ferry"))
    _, data = encode_blob(codec, golden_page(), meta())
    (folder / f"{name}.kvferry").write_bytes(data)


def sample(name: str, codec_name: str, options: dict[str, object], folder: Path) -> None:
    """The blob, and what it decodes to as `raw`."""
    known = golden_calibration(codec_name) if codec_name in CALIBRATED else None

    class Source:
        def get(self, calibration_id: bytes) -> object:
            assert known is not None
            assert known.id == calibration_id
            return known

    codec = make_codec(codec_name, options, known)
    key, data = encode_blob(codec, golden_page(), meta())
    restored = decode_blob(
        data,
        key=key,
        model_id=meta().model_id,
        tokens=TOKENS,
        cut=None,
        calibrations=Source(),  # type: ignore[arg-type]
    )
    _, plain = encode_blob(make_codec("raw", {}), restored, meta())
    (folder / f"{name}.kvferry").write_bytes(data)
    (folder / f"{name}.restored.kvferry").write_bytes(plain)


def vectors() -> dict[str, Callable[[Path], None]]:
    """Name -> what writes its files to a folder."""
    made: dict[str, Callable[[Path], None]] = {"keys": key_vectors}
    made |= {f"calibration_{codec}": partial(calibration, codec) for codec in CALIBRATED}
    made |= {name: partial(sample, name, codec, options) for name, codec, options in SAMPLES}
    made |= {name: partial(dropped, name, options) for name, options, _ in DROPPED}
    made |= {name: partial(merged, name, codec, options) for name, codec, options in MERGED}
    return made


def main(names: Sequence[str], folder: Path = HERE) -> int:
    """The exit status; 2, and nothing is written, without names or with one that is none."""
    known = vectors()
    unknown = [name for name in names if name not in known and name != "all"]
    if unknown or not names:
        for name in unknown:
            sys.stderr.write(f"regenerate.py: there is no {name!r}\n")
        sys.stderr.write(f"usage: regenerate.py NAME...\nnames: {' '.join(known)}, or all\n")
        return 2
    for name in known if "all" in names else dict.fromkeys(names):
        known[name](folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
