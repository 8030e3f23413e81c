"""Bearer tokens: 256 random bits that stand for a namespace and for what one may do in it.

Servers keep their BLAKE3 only (a token is random, so no slow hash is needed), in a small
file that is read again when it changes. A token is compared in constant time with all.
"""

import enum
import hmac
import json
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from blake3 import blake3

from kvferry.cluster.durable import write_durably
from kvferry.errors import ConfigError

TOKEN_FILE, TOKENS_FILE = "token", "tokens.json"
TOKEN_BYTES = 32
MAX_TOKENS = 4096
MAX_FILE_BYTES = 4 << 20
FORMAT_VERSION = 1
_TOKEN = re.compile(r"kvf_[A-Za-z0-9_-]{43}")
_TAG = re.compile(r"[0-9a-f]{16}")
_NAMESPACE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class Right(enum.IntEnum):
    """What a bearer may do; each includes those before it."""

    READ = 1
    WRITE = 2
    ADMIN = 3


@dataclass(frozen=True, slots=True)
class Bearer:
    """Whom a token stands for.

    Attributes:
        tag: of its namespace, which its blobs carry; 0: not bound to it.
        others: tags that are bound to other namespaces; filled by `TokenBook`.
    """

    namespace: str
    right: Right
    label: str = ""
    tag: int = 0
    others: Mapping[int, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Entry:
    """A token as servers keep it. ``digest``: BLAKE3 of its text; ``issued``: a date."""

    digest: bytes
    bearer: Bearer
    issued: str


def check_namespace(name: str) -> str:
    """Raises: ConfigError: it could be no file's name, or no metric's label."""
    if not _NAMESPACE.fullmatch(name):
        raise ConfigError("namespace", name, "1 to 64 of a-z, 0-9, - and _")
    return name


def issue_token(namespace: str, right: Right, label: str = "", tag: int = 0) -> tuple[str, Entry]:
    """A new token, and what servers keep of it. Raises: ConfigError: the namespace's name."""
    token = "kvf_" + secrets.token_urlsafe(TOKEN_BYTES)
    bearer = Bearer(check_namespace(namespace), right, label[:64], tag)
    return token, Entry(_digest(token), bearer, time.strftime("%Y-%m-%d", time.gmtime()))


def read_token(path: Path) -> str:
    """The token in a file. Raises: ConfigError, which does not show it."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")[:200].strip()
        loose = path.stat().st_mode & 0o007
    except OSError as exc:
        raise ConfigError("token_file", str(path), f"readable ({exc.strerror})") from exc
    if loose:
        raise ConfigError("token_file", str(path), f"for its owner only (chmod 600 {path})")
    if not _TOKEN.fullmatch(text):
        raise ConfigError("token_file", str(path), "one token, as `kvferry certs token` writes it")
    return text


def load_entries(path: Path) -> list[Entry]:
    """The tokens that a file knows. Raises: ConfigError: unreadable or damaged."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise ConfigError("tokens_file", str(path), f"readable ({exc.strerror})") from exc
    try:
        if len(raw) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes")
        value = json.loads(raw)
        if value["version"] != FORMAT_VERSION:
            raise ValueError(f"version {value['version']} is not known here")
        if len(value["tokens"]) > MAX_TOKENS:
            raise ValueError(f"more than {MAX_TOKENS:,} tokens")
        entries = [_entry(item) for item in value["tokens"]]
        bound_tags(entries)
        return entries
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        allowed = f"as `kvferry certs token` writes it ({exc})"
        raise ConfigError("tokens_file", str(path), allowed) from exc


def save_entries(path: Path, entries: Sequence[Entry]) -> None:
    """Write durably, for the owner only. Raises: ConfigError: too many; OSError."""
    if len(entries) > MAX_TOKENS:
        raise ConfigError("tokens", len(entries), f"at most {MAX_TOKENS:,}: revoke some")
    tokens = [
        {
            "hash": entry.digest.hex(),
            "namespace": entry.bearer.namespace,
            "right": entry.bearer.right.name.lower(),
            "label": entry.bearer.label,
            "issued": entry.issued,
            **({"tag": f"{entry.bearer.tag:016x}"} if entry.bearer.tag else {}),
        }
        for entry in entries
    ]
    text = json.dumps({"version": FORMAT_VERSION, "tokens": tokens}, indent=1) + "\n"
    write_durably(path, text.encode(), 0o600)


def bound_tags(entries: Iterable[Entry]) -> dict[int, str]:
    """Tags that are bound, and the names of their namespaces.

    Raises: ValueError: two tags for a namespace, or two namespaces for a tag.
    """
    pairs = {(entry.bearer.tag, entry.bearer.namespace) for entry in entries if entry.bearer.tag}
    found = dict(pairs)
    if len(found) < len(pairs) or len(set(found.values())) < len(pairs):
        raise ValueError("a tag and a namespace belong together, and one has two")
    return found


class TokenBook:
    """The tokens that a server takes; `refresh` follows the file."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises: ConfigError."""
        self.path = path
        self._entries = _knowing_others(load_entries(path))
        self._seen = _stamp(path)

    def __len__(self) -> int:
        return len(self._entries)

    def bearer(self, token: str) -> Bearer | None:
        """Whom it stands for; None: nobody. Compares with all, in constant time."""
        digest = _digest(token)
        found: Bearer | None = None
        for entry in self._entries:
            if hmac.compare_digest(digest, entry.digest):
                found = entry.bearer
        return found

    def refresh(self) -> bool:
        """Read the file again if it has changed; whether it had. Blocks.

        Raises: ConfigError: it cannot be used; what was known stays in force.
        """
        stamp = _stamp(self.path)
        if stamp == self._seen:
            return False
        self._seen = stamp  # a damaged file is told once
        self._entries = _knowing_others(load_entries(self.path))
        return True


def _digest(token: str) -> bytes:
    return blake3(token.encode("utf-8", "replace")).digest()


def _knowing_others(entries: Sequence[Entry]) -> list[Entry]:
    bound = bound_tags(entries)
    others: dict[str, dict[int, str]] = {}
    for name in {entry.bearer.namespace for entry in entries}:
        others[name] = {tag: whose for tag, whose in bound.items() if whose != name}
    return [
        replace(entry, bearer=replace(entry.bearer, others=others[entry.bearer.namespace]))
        for entry in entries
    ]


def _entry(item: dict[str, str]) -> Entry:
    digest = bytes.fromhex(item["hash"])
    if len(digest) != 32:
        raise ValueError("a hash of another length")
    bearer = Bearer(
        namespace=check_namespace(item["namespace"]),
        right=Right[item["right"].upper()],
        label=str(item["label"])[:64],
        tag=_tag(item["tag"]) if "tag" in item else 0,
    )
    return Entry(digest, bearer, str(item["issued"])[:32])


def _tag(text: str) -> int:
    if not _TAG.fullmatch(text):
        raise ValueError("a tag that is not 16 hex digits")
    return int(text, 16)


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_size, found.st_ino)
