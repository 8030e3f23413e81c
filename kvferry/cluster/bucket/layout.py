"""What lies where in a bucket. Names say all that a listing must tell.

    blobs/KIND/PAGEKEY/L0-15-H0-3-CODEC[@ENDS]   immutable; a calibration's last part: whole
    staged/KIND/PAGEKEY/REST[@ENDS]=DEADLINE     put, not committed
    pages/PAGEKEY                                marker: the page is complete, of these blobs
    tails/ANCHOR/ORDER-TAILKEY                   likewise, listed by what they hang on
    states/ANCHOR/ORDER-STATEKEY
    commits/ID  pins/ID/@ENDS  uses/WHEN-ID     see `commit`, `pins` and `uses`
    sweep/claim  sweep/totals  sweep/uses        see `sweep`
    quotas                                       see `quotas`
    quarantine/KIND-PAGEKEY-REST                 damaged

ENDS and DEADLINE are unix seconds. ORDER counts tokens backwards, so that of what hangs on
one page the longest is listed first.
"""

from dataclasses import dataclass

from kvferry.cluster.blob_name import blob_name, parse_blob_name
from kvferry.cluster.repository import BlobInfo
from kvferry.errors import InvalidKeyError
from kvferry.proto.keys import DIGEST_BYTES, BlobKey

CLAIM = "sweep/claim"
TOTALS = "sweep/totals"
USES = "sweep/uses"
QUOTAS = "quotas"
MARKED_KINDS = ("page", "tail", "state")

_WHOLE = "whole"
_MOST_TOKENS = (1 << 40) - 1


@dataclass(frozen=True, slots=True, order=True)
class UnitKey:
    """What blobs of one page, tail, state or calibration share."""

    kind: str
    page_key: bytes

    @classmethod
    def of(cls, key: BlobKey) -> "UnitKey":
        """The unit of a blob."""
        return cls(key.kind, key.page_key)

    @property
    def blobs(self) -> str:
        """Folder of its blobs."""
        return f"blobs/{self.kind}/{self.page_key.hex()}"

    @property
    def staged(self) -> str:
        """Folder of those that wait for their commit."""
        return f"staged/{self.kind}/{self.page_key.hex()}"


def _last(key: BlobKey, ends: int) -> str:
    name = blob_name(key, ends).split("-", 2)
    if len(name) == 3:
        return name[2]
    return _WHOLE + name[1][2 * DIGEST_BYTES :]


def blob_path(key: BlobKey, ends: int = 0) -> str:
    """Where a blob lies that ends at ``ends`` (unix seconds; 0: never)."""
    return f"{UnitKey.of(key).blobs}/{_last(key, ends)}"


def parse_blob_path(path: str) -> tuple[BlobKey, int]:
    """(key, when it ends). Raises: InvalidKeyError for any other path."""
    area, _, rest = path.partition("/")
    parts = rest.split("/")
    if area != "blobs" or len(parts) != 3:
        raise InvalidKeyError(path[:200], "not the path of a blob")
    kind, page, last = parts
    joined = f"{kind}-{page}{last.removeprefix(_WHOLE)}" if last.startswith(_WHOLE) else ""
    key, ends = parse_blob_name(joined or f"{kind}-{page}-{last}")
    if blob_path(key, ends) != path:
        raise InvalidKeyError(path[:200], "not in its canonical form")
    return key, ends


def staged_path(key: BlobKey, ends: int, deadline: int) -> str:
    """Where a blob waits for its commit, until ``deadline``."""
    return f"{UnitKey.of(key).staged}/{_last(key, ends)}={deadline}"


def parse_staged_path(path: str) -> tuple[BlobKey, int, int]:
    """(key, when it ends, its deadline). Raises: InvalidKeyError."""
    rest, equals, deadline = path.removeprefix("staged/").rpartition("=")
    if not equals or not path.startswith("staged/") or not deadline.isdecimal():
        raise InvalidKeyError(path[:200], "not the path of a staged blob")
    key, ends = parse_blob_path(f"blobs/{rest}")
    return key, ends, int(deadline)


def marker_path(info: BlobInfo) -> str:
    """Where the marker of the unit lies that a blob belongs to; empty for a calibration."""
    kind, own = info.key.kind, info.key.page_key.hex()
    if kind == "page":
        return f"pages/{own}"
    if kind not in MARKED_KINDS:
        return ""
    start, end = (f"{_MOST_TOKENS - min(t, _MOST_TOKENS):010x}" for t in info.tokens)
    return f"{kind}s/{info.previous_key.hex()}/{start}-{end}-{own}"


def page_marker(page_key: bytes) -> str:
    """Where the marker of a page lies."""
    return f"pages/{page_key.hex()}"


def anchored(kind: str, anchor: bytes) -> str:
    """Folder of the markers of tails or states that hang on a page or root."""
    return f"{kind}s/{anchor.hex()}"


def parse_marker_path(path: str) -> tuple[UnitKey, int, int]:
    """(unit, first token, end); tokens of pages are not said: 0. Raises: InvalidKeyError."""
    area, _, rest = path.partition("/")
    try:
        if area == "pages" and len(rest) == 2 * DIGEST_BYTES:
            return UnitKey("page", bytes.fromhex(rest)), 0, 0
        if area in ("tails", "states"):
            start, end, own = rest.partition("/")[2].split("-")
            tokens = (_MOST_TOKENS - int(start, 16), _MOST_TOKENS - int(end, 16))
            if len(own) == 2 * DIGEST_BYTES:
                return UnitKey(area[:-1], bytes.fromhex(own)), *tokens
    except ValueError:
        pass
    raise InvalidKeyError(path[:200], "not the path of a marker")


def quarantine_path(path: str, reason: str) -> str:
    """Where a damaged blob is set aside."""
    return f"quarantine/{path.removeprefix('blobs/').replace('/', '-')}={reason}"
