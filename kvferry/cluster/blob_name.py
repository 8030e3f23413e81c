"""Names under which engines keep blobs: from the key alone, and back.

    page-64HEX-L0-15-H0-3-CODEC[@EXPIRES]      calibration-64HEX

``EXPIRES`` is the unix time at which a blob with a time to live ends, so that it
outlives the index. A name has no character that a file system or a bucket minds.
"""

from kvferry.errors import InvalidKeyError
from kvferry.proto.keys import BlobKey

_MAX_EXPIRES = 1 << 40


def blob_name(key: BlobKey, expires_unix_s: int = 0) -> str:
    """Name of a blob; ``expires_unix_s`` 0: no end."""
    name = str(key).replace("/", "-")
    return f"{name}@{expires_unix_s}" if expires_unix_s else name


def name_of(
    kind: str,
    page_key: bytes,
    layers: tuple[int, int],
    heads: tuple[int, int],
    codec_id: str,
    expires_unix_s: int,
) -> str:
    """As `blob_name`, from the parts of a key that was checked before."""
    end = f"@{expires_unix_s}" if expires_unix_s else ""
    if kind == "calibration":
        return f"{kind}-{page_key.hex()}{end}"
    (a, b), (c, d) = layers, heads
    return f"{kind}-{page_key.hex()}-L{a}-{b}-H{c}-{d}-{codec_id}{end}"


def parse_blob_name(name: str) -> tuple[BlobKey, int]:
    """(key, expires) of a name. Raises: InvalidKeyError for any other text."""
    text, at, expires = name.partition("@")
    if at and not (expires.isascii() and expires.isdigit() and 0 < int(expires) < _MAX_EXPIRES):
        raise InvalidKeyError(name[:200], "no expiry after the @")
    parts = text.split("-")
    if len(parts) == 2:
        key = BlobKey.parse("/".join(parts))
    elif len(parts) == 8:
        kind, page, a, b, c, d, codec, digest = parts
        key = BlobKey.parse(f"{kind}/{page}/{a}-{b}/{c}-{d}/{codec}-{digest}")
    else:
        raise InvalidKeyError(name[:200], "not the name of a blob")
    end = int(expires) if at else 0
    if blob_name(key, end) != name:
        raise InvalidKeyError(name[:200], "not in its canonical form")
    return key, end


def fan_out(name: str) -> str:
    """Folder of a name: the first byte of its page key, as two hex digits."""
    return name.partition("-")[2][:2]
