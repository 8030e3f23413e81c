import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.errors import InvalidKeyError, ModelError
from kvferry.proto import keys
from kvferry.proto.identity import ModelFingerprint, model_id
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import blob_pb2

VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parent.parent / "golden" / "keys.json").read_text()
)
unhex = bytes.fromhex


def test_roots_are_the_published_ones() -> None:
    for v in VECTORS["roots"]:
        salt, model = unhex(v["salt"]), unhex(v["model_id"])
        assert keys.root_key(salt, model, v["page_tokens"]).hex() == v["root"]
        by_hand = b"kvferry/root/1" + salt + model + struct.pack("<I", v["page_tokens"])
        assert blake3(by_hand).hexdigest() == v["root"]


def test_namespace_tags_are_the_published_ones() -> None:
    for v in VECTORS["namespace_tags"]:
        salt = unhex(v["salt"])
        assert f"{keys.namespace_tag(salt):016x}" == v["tag"]
        derived = blake3(salt, derive_key_context="kvferry/namespace/1").digest(8)
        assert v["tag"] == derived[::-1].hex()
    assert len({v["tag"] for v in VECTORS["namespace_tags"]}) == len(VECTORS["namespace_tags"])


def test_page_keys_are_the_published_ones() -> None:
    for v in VECTORS["pages"]:
        media = {int(i): [unhex(m) for m in hashes] for i, hashes in v["media"].items()}
        found = keys.page_keys(unhex(v["root"]), v["tokens"], v["page_tokens"], media)
        assert [key.hex() for key in found] == v["keys"]
        previous = unhex(v["root"])
        for index, key in enumerate(v["keys"]):
            page = v["tokens"][index * v["page_tokens"] : (index + 1) * v["page_tokens"]]
            data = previous + struct.pack(f"<{len(page)}I", *page) + b"".join(media.get(index, []))
            previous = blake3(data).digest()
            assert previous.hex() == key


def test_tail_keys_are_the_published_ones() -> None:
    for v in VECTORS["tails"]:
        media = [unhex(m) for m in v["media"]]
        assert keys.tail_key(unhex(v["previous"]), v["tokens"], media).hex() == v["key"]
        count = len(v["tokens"])
        data = b"kvferry/tail/1" + unhex(v["previous"])
        data += struct.pack(f"<I{count}I", count, *v["tokens"]) + b"".join(media)
        assert blake3(data).hexdigest() == v["key"]


def test_state_keys_are_the_published_ones() -> None:
    for v in VECTORS["states"]:
        assert keys.state_key(unhex(v["tail"]), v["parts"]).hex() == v["key"]
        data = b"kvferry/state/1" + struct.pack("<I", v["parts"]) + unhex(v["tail"])
        assert blake3(data).hexdigest() == v["key"]
    assert len({v["key"] for v in VECTORS["states"]}) == len(VECTORS["states"])
    for tail, parts in ((b"", 1), (bytes(32), 0)):
        with pytest.raises(InvalidKeyError):
            keys.state_key(tail, parts)


def test_codec_ids_are_the_published_ones() -> None:
    for v in VECTORS["codec_ids"]:
        calibration = unhex(v["calibration_id"])
        found = keys.codec_id(v["name"], v["version"], v["params"], calibration)
        assert found == v["codec_id"]
        text = json.dumps(v["params"], sort_keys=True, separators=(",", ":")).encode()
        digest = blake3(b"kvferry/codec/1" + text + calibration).hexdigest()
        assert found == f"{v['name']}.{v['version']}-{digest[:16]}"


def fingerprint_of(v: dict[str, Any]) -> ModelFingerprint:
    return ModelFingerprint(
        config=v["config"],
        layers={i: unhex(d) for i, d in enumerate(v["layers"])},
        layer_count=len(v["layers"]),
        shared={n: unhex(d) for n, d in v["shared"].items()},
        tokenizer=unhex(v["tokenizer"]),
        rope={i: unhex(d) for i, d in enumerate(v["rope"])},
        adapter=unhex(v["adapter"]),
    )


def test_model_ids_are_the_published_ones() -> None:
    for v in VECTORS["model_ids"]:
        assert model_id(fingerprint_of(v)).hex() == v["model_id"]


def test_everything_about_a_model_is_in_its_id() -> None:
    base = VECTORS["model_ids"][0]
    other = "ab" * 32
    changes = [
        {"config": {**base["config"], "rope_theta": 10_000.0}},
        {"layers": [base["layers"][0], other]},
        {"layers": base["layers"][::-1]},
        {"rope": [base["rope"][0], other]},
        {"shared": {**base["shared"], "norm": other}},
        {"tokenizer": other},
        {"adapter": other},
    ]
    found = {model_id(fingerprint_of({**base, **change})) for change in [{}, *changes]}
    assert len(found) == len(changes) + 1


def test_model_id_waits_for_every_layer() -> None:
    base = fingerprint_of(VECTORS["model_ids"][0])
    for part in (
        {"layers": {0: bytes(32)}},
        {"rope": {0: bytes(32)}},
        {"layers": {0: bytes(32), 1: bytes(31)}},
        {"tokenizer": b""},
        {"config": {"x": float("nan")}},
        {"config": {"x": object()}},
    ):
        values = {name: getattr(base, name) for name in base.__slots__}
        with pytest.raises(ModelError):
            model_id(ModelFingerprint(**{**values, **part}))


def test_blob_keys_are_the_published_ones() -> None:
    for v in VECTORS["blob_keys"]:
        key = BlobKey(
            v["kind"], unhex(v["page_key"]), tuple(v["layers"]), tuple(v["heads"]), v["codec_id"]
        )
        assert str(key) == v["text"]
        assert BlobKey.parse(v["text"]) == key


def ranges(limit: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, limit - 1), st.integers(1, 300)).map(
        lambda t: (t[0], min(limit, t[0] + t[1]))
    )


blob_keys = st.builds(
    BlobKey,
    kind=st.sampled_from(["page", "tail", "state"]),
    page_key=st.binary(min_size=32, max_size=32),
    layers=ranges(keys.MAX_LAYERS),
    heads=ranges(keys.MAX_HEADS),
    codec_id=st.from_regex(r"[a-z][a-z0-9_]{0,31}\.[0-9]{1,5}-[0-9a-f]{16}", fullmatch=True),
)


@settings(max_examples=100, deadline=None)
@given(key=blob_keys)
def test_keys_survive_text_and_wire(key: BlobKey) -> None:
    assert BlobKey.parse(str(key)) == key
    wire = blob_pb2.BlobKey.FromString(key.to_proto().SerializeToString())
    assert BlobKey.from_proto(wire) == key


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60) | blob_keys.map(str).flatmap(lambda s: mutations(s)))
def test_text_is_one_key_or_none(text: str) -> None:
    try:
        key = BlobKey.parse(text)
    except InvalidKeyError:
        return
    assert str(key) == text


def mutations(text: str) -> st.SearchStrategy[str]:
    edits = st.tuples(st.integers(0, len(text)), st.sampled_from(["", "0", "-", "/", "L", "g"]))
    return edits.map(lambda e: text[: e[0]] + e[1] + text[e[0] + 1 :])


PAGE = "page/" + "ab" * 32
CODEC = "raw.1-" + "0" * 16


@pytest.mark.parametrize(
    "text",
    [
        "",
        "page",
        f"{PAGE}/L0-0/H0-1/{CODEC}",
        f"{PAGE}/L2-1/H0-1/{CODEC}",
        f"{PAGE}/L0-1/H0-99999/{CODEC}",
        f"{PAGE}/L0-99999999999999999999/H0-1/{CODEC}",
        f"{PAGE}/L00-1/H0-1/{CODEC}",
        f"{PAGE}/L0-1/H0-1/{CODEC}\n",
        f"{PAGE}/L0-1/H0-1/../../etc/passwd",
        f"{PAGE.upper()}/L0-1/H0-1/{CODEC}",
        f"page/{'AB' * 32}/L0-1/H0-1/{CODEC}",
        f"calibration/{'ab' * 31}",
        f"calibration/{'ab' * 32}/L0-1",
    ],
)
def test_text_that_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidKeyError):
        BlobKey.parse(text)


def test_wire_keys_are_checked() -> None:
    good = BlobKey("page", bytes(32), (0, 1), (0, 1), CODEC).to_proto()
    for field, value in (("kind", 0), ("kind", 9), ("page_key", b""), ("layer_end", 0)):
        bad = blob_pb2.BlobKey()
        bad.CopyFrom(good)
        setattr(bad, field, value)
        with pytest.raises(InvalidKeyError):
            BlobKey.from_proto(bad)


@pytest.mark.parametrize(
    "tokens", [[-1], [2**32], [1.5], [True, False], ["a"], [[1]], [2**70], [None]]
)
def test_token_ids_that_cannot_be_are_refused(tokens: list[object]) -> None:
    for call in (keys.token_bytes, lambda t: keys.tail_key(bytes(32), t)):
        with pytest.raises(InvalidKeyError):
            call(tokens)  # type: ignore[arg-type]


def test_tokens_may_come_as_any_integers() -> None:
    wanted = keys.page_keys(bytes(32), [1, 2, 3, 4], 2)
    for tokens in ((1, 2, 3, 4), np.array([1, 2, 3, 4]), np.array([1, 2, 3, 4], np.uint32)):
        assert keys.page_keys(bytes(32), tokens, 2) == wanted


@settings(max_examples=50, deadline=None)
@given(tokens=st.lists(st.integers(0, 2**32 - 1), max_size=40), page=st.integers(1, 9))
def test_a_page_key_depends_on_all_tokens_before_it_and_none_after(
    tokens: list[int], page: int
) -> None:
    whole = keys.page_keys(bytes(32), tokens, page)
    assert len(whole) == len(tokens) // page
    assert (
        keys.page_keys(bytes(32), tokens[: len(whole) // 2 * page], page)
        == whole[: len(whole) // 2]
    )
    if whole:
        other = [tokens[0] ^ 1, *tokens[1:]]
        assert not set(keys.page_keys(bytes(32), other, page)) & set(whole)


def test_tails_differ_by_where_tokens_end_and_media_begin() -> None:
    digest = struct.pack("<8I", *range(8))
    assert keys.tail_key(bytes(32), list(range(8))) != keys.tail_key(bytes(32), [], [digest])


def test_digests_of_media_are_the_published_ones() -> None:
    for v in VECTORS["media"]:
        found = keys.medium_digest(v["start"], v["end"], unhex(v["content"]))
        by_hand = b"kvferry/medium/1" + struct.pack("<II", v["start"], v["end"])
        assert found.hex() == v["digest"] == blake3(by_hand + unhex(v["content"])).hexdigest()


@given(
    start=st.integers(0, 60),
    length=st.integers(1, 30),
    page=st.integers(1, 20),
    other=st.booleans(),
)
def test_another_image_is_another_key_from_the_page_on_that_shows_its_first_token(
    start: int, length: int, page: int, other: bool
) -> None:
    tokens = [7] * 60

    def shown(content: bytes) -> list[bytes]:
        medium = keys.Medium(start, start + length, keys.medium_digest(start, 90, content))
        return keys.page_keys(bytes(32), tokens, page, keys.media_by_page([medium], page))

    before = start // page
    cat, dog = shown(b"cat"), shown(b"dog") if other else keys.page_keys(bytes(32), tokens, page)
    assert cat[:before] == dog[:before]
    assert not set(cat[before:]) & set(dog[before:])


def test_two_images_of_one_page_cannot_change_places() -> None:
    def shown(first: bytes, second: bytes) -> list[bytes]:
        places = ((1, 2, first), (5, 6, second))
        media = [keys.Medium(a, b, keys.medium_digest(a, b, what)) for a, b, what in places]
        assert keys.media_within(media, 0, 8) == keys.media_within(media[::-1], 0, 8)
        return keys.page_keys(bytes(32), [7] * 8, 8, keys.media_by_page(media, 8))

    assert shown(b"cat", b"dog") != shown(b"dog", b"cat")


def test_keys_of_wrong_sizes_are_refused() -> None:
    for call in (
        lambda: keys.root_key(b"short", bytes(32)),
        lambda: keys.root_key(bytes(65), bytes(32)),
        lambda: keys.root_key(bytes(16), bytes(31)),
        lambda: keys.root_key(bytes(16), bytes(32), 0),
        lambda: keys.page_keys(bytes(31), [1], 1),
        lambda: keys.page_keys(bytes(32), [1], 0),
        lambda: keys.page_keys(bytes(32), [1], 1, {0: [b"short"]}),
        lambda: keys.tail_key(b"", [1]),
    ):
        with pytest.raises(InvalidKeyError):
            call()


def test_pages_lie_behind_the_window() -> None:
    found = [keys.pages_behind_window(n) for n in (0, 127, 128, 383, 384, 639, 640, 2048)]
    assert found == [0, 0, 0, 0, 1, 1, 2, 7]
