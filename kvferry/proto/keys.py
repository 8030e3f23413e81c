"""Keys: who may share a cached page with whom.

Everything that changes the numbers is in the key. The vectors in
``tests/golden/keys.json`` are enough to write another implementation.

    root        = BLAKE3("kvferry/root/1" | salt | model_id | page_tokens u32le)
    page_key[i] = BLAKE3(page_key[i-1] | tokens u32le ... | media hashes), page_key[-1] = root
    tail_key    = BLAKE3("kvferry/tail/1" | previous key | token count u32le |
                         tokens u32le ... | media hashes)
    state_key   = BLAKE3("kvferry/state/1" | parts u32le | tail_key)
    media hash  = BLAKE3("kvferry/medium/1" | first token u32le | end u32le | what is there)
    namespace tag = first 8 bytes, little-endian, of BLAKE3 in key derivation mode:
                  context "kvferry/namespace/1", key material salt; 0 becomes 1
    codec_id    = NAME "." VERSION "-" first 16 hex digits of
                  BLAKE3("kvferry/codec/1" | canonical params JSON | calibration id)
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from kvferry.errors import InvalidKeyError
from kvferry.proto.v1 import blob_pb2

DIGEST_BYTES = 32
DEFAULT_PAGE_TOKENS = 256
WINDOW_TOKENS = 128
SINK_TOKENS = 4
MAX_PAGE_TOKENS = 65_536
MAX_LAYERS = 65_536
MAX_HEADS = 65_536

_ROOT_DOMAIN = b"kvferry/root/1"
_TAIL_DOMAIN = b"kvferry/tail/1"
_STATE_DOMAIN = b"kvferry/state/1"
_CODEC_DOMAIN = b"kvferry/codec/1"
_MEDIUM_DOMAIN = b"kvferry/medium/1"
_NAMESPACE_CONTEXT = "kvferry/namespace/1"
_CODEC_ID = re.compile(r"[a-z][a-z0-9_]{0,31}\.[0-9]{1,5}-[0-9a-f]{16}")
_RANGED_KEY = re.compile(
    r"(page|tail|state)/([0-9a-f]{64})/L([0-9]+)-([0-9]+)/H([0-9]+)-([0-9]+)/(.+)"
)
_CALIBRATION_KEY = re.compile(r"calibration/([0-9a-f]{64})")
_KIND_NAMES: dict[int, str] = {
    blob_pb2.BLOB_KIND_PAGE: "page",
    blob_pb2.BLOB_KIND_TAIL: "tail",
    blob_pb2.BLOB_KIND_CALIBRATION: "calibration",
    blob_pb2.BLOB_KIND_STATE: "state",
}
_KINDS: dict[str, "blob_pb2.BlobKind.ValueType"] = {
    "page": blob_pb2.BLOB_KIND_PAGE,
    "tail": blob_pb2.BLOB_KIND_TAIL,
    "calibration": blob_pb2.BLOB_KIND_CALIBRATION,
    "state": blob_pb2.BLOB_KIND_STATE,
}


@dataclass(frozen=True, slots=True, order=True)
class BlobKey:
    """The address of a blob.

    Attributes:
        kind: "page", "tail", "state" or "calibration".
        page_key: 32 bytes; a calibration's id where kind is "calibration".
        layers: absolute, half-open; (0, 0) for a calibration. Pages and tails count the
            layers that hold rows of tokens, states those that hold a state.
        heads: KV heads, absolute, half-open; (0, 0) for a calibration.
        codec_id: see `codec_id`; empty for a calibration.
    """

    kind: str
    page_key: bytes
    layers: tuple[int, int] = (0, 0)
    heads: tuple[int, int] = (0, 0)
    codec_id: str = ""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise InvalidKeyError(f"{self.kind}/{self.page_key.hex()}", problem)

    def _problem(self) -> str:
        if self.kind not in _KINDS:
            return f"kind must be one of {', '.join(_KINDS)}"
        if len(self.page_key) != DIGEST_BYTES:
            return f"page key has {len(self.page_key)} bytes, {DIGEST_BYTES} wanted"
        if self.kind == "calibration":
            plain = self.layers == self.heads == (0, 0) and not self.codec_id
            return "" if plain else "a calibration has neither ranges nor a codec id"
        if not 0 <= self.layers[0] < self.layers[1] <= MAX_LAYERS:
            return f"layers {self.layers[0]}-{self.layers[1]} are no range"
        if not 0 <= self.heads[0] < self.heads[1] <= MAX_HEADS:
            return f"heads {self.heads[0]}-{self.heads[1]} are no range"
        if not _CODEC_ID.fullmatch(self.codec_id):
            return f"codec id {self.codec_id[:64]!r} is not NAME.VERSION-16HEX"
        return ""

    def __str__(self) -> str:
        if self.kind == "calibration":
            return f"calibration/{self.page_key.hex()}"
        (a, b), (c, d) = self.layers, self.heads
        return f"{self.kind}/{self.page_key.hex()}/L{a}-{b}/H{c}-{d}/{self.codec_id}"

    @property
    def codec_name(self) -> str:
        """Name of the codec, as the registry knows it; empty for a calibration."""
        return self.codec_id.partition(".")[0]

    @classmethod
    def parse(cls, text: str) -> "BlobKey":
        """Read what ``str`` wrote. Raises: InvalidKeyError."""
        if found := _CALIBRATION_KEY.fullmatch(text):
            return cls("calibration", bytes.fromhex(found[1]))
        found = _RANGED_KEY.fullmatch(text)
        if found is None:
            raise InvalidKeyError(
                text[:200], "want KIND/64HEX/La-b/Hc-d/CODEC or calibration/64HEX"
            )
        kind, page, *numbers, codec = found.groups()
        if any(len(n) > 6 for n in numbers):
            raise InvalidKeyError(text[:200], "a range is out of bounds")
        a, b, c, d = (int(n) for n in numbers)
        key = cls(kind, bytes.fromhex(page), (a, b), (c, d), codec)
        if str(key) != text:
            raise InvalidKeyError(text[:200], "numbers are written without leading zeros")
        return key

    def to_proto(self) -> blob_pb2.BlobKey:
        """As sent over the wire."""
        return blob_pb2.BlobKey(
            kind=_KINDS[self.kind],
            page_key=self.page_key,
            layer_start=self.layers[0],
            layer_end=self.layers[1],
            head_start=self.heads[0],
            head_end=self.heads[1],
            codec_id=self.codec_id,
        )

    @classmethod
    def from_proto(cls, key: blob_pb2.BlobKey) -> "BlobKey":
        """Raises: InvalidKeyError for anything that is not a whole, sane key."""
        return cls(
            kind_name(key.kind),
            key.page_key,
            (key.layer_start, key.layer_end),
            (key.head_start, key.head_end),
            key.codec_id,
        )


def kind_name(kind: int) -> str:
    """Name of a BlobKind number; "unknown" for one of a later version."""
    return _KIND_NAMES.get(kind, "unknown")


def kind_number(name: str) -> "blob_pb2.BlobKind.ValueType":
    """Number of a kind's name. Raises: KeyError."""
    return _KINDS[name]


def root_key(salt: bytes, model_id: bytes, page_tokens: int = DEFAULT_PAGE_TOKENS) -> bytes:
    """Root of a model's key chain in one namespace (design section 4).

    Args:
        salt: the namespace's secret, issued by the cluster, 16 to 64 bytes.
        model_id: 32 bytes, see `kvferry.proto.identity`.
        page_tokens: tokens in a page, 1 to 65536.
    Raises:
        InvalidKeyError: a part of the wrong size.
    """
    if not 16 <= len(salt) <= 64:
        raise InvalidKeyError("root", f"salt has {len(salt)} bytes, 16 to 64 wanted")
    if len(model_id) != DIGEST_BYTES:
        raise InvalidKeyError("root", f"model id has {len(model_id)} bytes, 32 wanted")
    if not 1 <= page_tokens <= MAX_PAGE_TOKENS:
        raise InvalidKeyError("root", f"page of {page_tokens} tokens")
    hasher = blake3(_ROOT_DOMAIN)
    hasher.update(salt)
    hasher.update(model_id)
    hasher.update(page_tokens.to_bytes(4, "little"))
    return hasher.digest()


def namespace_tag(salt: bytes) -> int:
    """What blobs say of the namespace that they belong to: tells two apart, not the salt.

    0 is kept for blobs that say nothing.
    """
    derived = blake3(salt, derive_key_context=_NAMESPACE_CONTEXT).digest(8)
    return int.from_bytes(derived, "little") or 1


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as u32 little-endian. Raises: InvalidKeyError for ids out of range."""
    if not len(tokens):
        return b""
    try:
        ids = np.asarray(tokens)
    except (OverflowError, ValueError, TypeError) as exc:
        raise InvalidKeyError("tokens", "token ids must be integers") from exc
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InvalidKeyError("tokens", "token ids must be integers in one row, below 2**63")
    if int(ids.min()) < 0 or int(ids.max()) > 0xFFFF_FFFF:
        raise InvalidKeyError("tokens", "a token id is below 0 or above 2**32 - 1")
    return ids.astype("<u4").tobytes()


def token_ids(tokens: Sequence[int]) -> list[int]:
    """Token ids of any array or sequence as plain integers. Raises: InvalidKeyError."""
    return [int(token) for token in np.frombuffer(token_bytes(tokens), dtype="<u4").tolist()]


def _chain(domain: bytes, previous: bytes, tokens: bytes, media: Sequence[bytes]) -> bytes:
    if len(previous) != DIGEST_BYTES:
        raise InvalidKeyError("chain", f"previous key has {len(previous)} bytes, 32 wanted")
    hasher = blake3(domain + previous)
    if domain == _TAIL_DOMAIN:  # tails differ in length: the count parts tokens from media
        hasher.update((len(tokens) // 4).to_bytes(4, "little"))
    hasher.update(tokens)
    for digest in media:
        if len(digest) != DIGEST_BYTES:
            raise InvalidKeyError("chain", f"media hash has {len(digest)} bytes, 32 wanted")
        hasher.update(digest)
    return hasher.digest()


def page_keys(
    root: bytes,
    tokens: Sequence[int],
    page_tokens: int = DEFAULT_PAGE_TOKENS,
    media: Mapping[int, Sequence[bytes]] | None = None,
) -> list[bytes]:
    """Keys of all whole pages of ``tokens``, in order; what is left over has none.

    Args:
        media: page index -> 32-byte content hashes of media that fall in the page.
    Raises:
        InvalidKeyError: a token id or a digest that cannot be.
    """
    if not 1 <= page_tokens <= MAX_PAGE_TOKENS:
        raise InvalidKeyError("chain", f"page of {page_tokens} tokens")
    ids = token_bytes(tokens)
    keys: list[bytes] = []
    previous = root
    for index in range(len(tokens) // page_tokens):
        page = ids[4 * index * page_tokens : 4 * (index + 1) * page_tokens]
        previous = _chain(b"", previous, page, (media or {}).get(index, ()))
        keys.append(previous)
    return keys


@dataclass(frozen=True, slots=True, order=True)
class Medium:
    """An image or a sound whose tokens say where it stands and not what it is.

    Attributes:
        start, end: its tokens in the prompt, half-open.
        digest: 32 bytes over all that its numbers depend on; see `medium_digest`.
    """

    start: int
    end: int
    digest: bytes


def medium_digest(start: int, end: int, content: bytes) -> bytes:
    """Digest of a medium at its place, so that two in one page cannot change places.

    Args:
        content: names what is seen there, and whatever turns it into numbers.
    """
    place = start.to_bytes(4, "little") + end.to_bytes(4, "little")
    return blake3(_MEDIUM_DOMAIN + place + content).digest()


def media_within(media: Sequence[Medium], start: int, end: int) -> tuple[bytes, ...]:
    """Digests of those that have tokens among ``start`` to ``end``, in their order."""
    return tuple(m.digest for m in sorted(media) if m.start < end and start < m.end)


def media_by_page(
    media: Sequence[Medium], page_tokens: int = DEFAULT_PAGE_TOKENS
) -> dict[int, tuple[bytes, ...]]:
    """Page index -> digests, as `page_keys` takes them."""
    pages = {i for m in media for i in range(m.start // page_tokens, -(-m.end // page_tokens))}
    return {i: media_within(media, i * page_tokens, (i + 1) * page_tokens) for i in pages}


def tail_key(previous: bytes, tokens: Sequence[int], media: Sequence[bytes] = ()) -> bytes:
    """Key of the tail: exactly these tokens after the page (or root) ``previous``."""
    return _chain(_TAIL_DOMAIN, previous, token_bytes(tokens), media)


def state_key(tail: bytes, parts: int = 1) -> bytes:
    """Key of what cannot be cut at a token, as it is after the tokens of a tail.

    Args:
        tail: `tail_key` of those tokens.
        parts: how many tensor-parallel ranks divide each state. Others find it by what a
            lookup says of its blobs, and put the parts together.
    Raises: InvalidKeyError.
    """
    if len(tail) != DIGEST_BYTES or not 1 <= parts <= MAX_HEADS:
        raise InvalidKeyError("state", f"{parts} parts of a tail key of {len(tail)} bytes")
    return blake3(_STATE_DOMAIN + parts.to_bytes(4, "little") + tail).digest()


def pages_behind_window(
    tokens: int, page_tokens: int = DEFAULT_PAGE_TOKENS, window: int = WINDOW_TOKENS
) -> int:
    """How many pages of a sequence lie wholly ``window`` tokens behind its end.

    Those are coded by the page codec; the rest is the tail (design section 5).
    """
    return max(0, tokens - window) // page_tokens


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no spaces, UTF-8; refuses NaN and infinities."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def codec_id(
    name: str, version: int, params: Mapping[str, object], calibration_id: bytes = b""
) -> str:
    """One token that names codec, version, parameters and calibration."""
    digest = blake3(_CODEC_DOMAIN + canonical_json(dict(params)) + calibration_id).hexdigest()
    return f"{name}.{version}-{digest[:16]}"
