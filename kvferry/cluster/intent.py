"""What the operator decided, kept apart from all soft state, and where it is kept.

An intent store holds small documents by name, among them the policy in force, and the
namespaces' salts. One coordinator alone has files of its own (`FileIntentStore`); several
share etcd (`EtcdIntentStore`).
"""

import json
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from kvferry.cluster.policy import dump_policy, parse_policy
from kvferry.errors import ConfigError
from kvferry.proto.v1 import coordinator_pb2 as pb

POLICY = "policy"
MAX_VERSION = 1 << 53  # what JSON numbers hold exactly everywhere
MAX_DOCUMENT_BYTES = 1 << 20  # etcd takes requests of up to 1.5 MiB

Source = Literal["built-in", "file", "admin", "optimizer"]
_NAME = re.compile(r"[a-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """The policy in force, with its version.

    Attributes:
        source: who decided.
        file_digest: hex BLAKE3 of the policy file that was last taken over; it wins
            again only when it changes.
    """

    policy: pb.Policy
    source: Source
    file_digest: str = ""


class IntentStore(Protocol):
    """Documents of the operator, by name ([a-z0-9_-], up to 64; up to 1 MiB), and salts.

    Raises in every call, beside what is named there: StoreUnavailableError where it
    cannot be read or written now.
    """

    @property
    def where(self) -> str:
        """For messages."""

    async def read(self, name: str) -> bytes | None:
        """The document as it stands, not as it stood; None: there is none."""

    async def write(self, name: str, data: bytes) -> bool:
        """Replace a document; durable when this returns True.

        False: it has been changed since it was last read or written here; nothing was
        done, read it again. After an error it may have been done or not.
        Raises: NotLeaderError where another coordinator is the leader by now.
        """

    async def set_aside(self, name: str) -> None:
        """Move a document that cannot be used out of the way, for a human to look at."""

    def changes(self, name: str) -> AsyncGenerator[bytes, None]:
        """The document each time that somebody else may have changed it. Never ends."""

    async def kept_salt(self, namespace: str) -> bytes:
        """The namespace's secret, 32 bytes; empty where none was settled yet.

        Raises: ConfigError for a damaged one, or two that differ.
        """

    async def salt(self, namespace: str, brought: bytes = b"") -> bytes:
        """As `kept_salt`; where there is none, one is settled for ever.

        It is ``brought``, which a node was issued before, if that can be one, else random.
        """


def check_name(name: str) -> str:
    """A document's or namespace's name, as it came. Raises: ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError("name", name, "1 to 64 of a-z, 0-9, - and _")
    return name


def check_size(name: str, data: bytes) -> None:
    """Raises: ConfigError for a document beyond `MAX_DOCUMENT_BYTES`."""
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ConfigError(name, f"{len(data):,} bytes", f"at most {MAX_DOCUMENT_BYTES:,} bytes")


def dump_intent(intent: Intent) -> bytes:
    """JSON that `parse_intent` reads."""
    value = {
        "version": intent.policy.version,
        "source": intent.source,
        "file_digest": intent.file_digest,
        "policy": dump_policy(intent.policy),
    }
    return (json.dumps(value, indent=1) + "\n").encode()


def parse_intent(raw: bytes, where: str) -> Intent:
    """Raises: ConfigError for what `dump_intent` has not written."""
    try:
        value = json.loads(raw)
        policy = parse_policy(value["policy"].encode(), where)
        version, source = value["version"], value["source"]
        if not isinstance(version, int) or not 0 < version <= MAX_VERSION:
            raise ValueError(f"version {version!r}")
        if source not in get_args(Source):
            raise ValueError(f"source {source!r}")
        policy.version = version
        return Intent(policy=policy, source=source, file_digest=str(value["file_digest"]))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ConfigError("intent", where, f"what kvferry wrote ({exc!r})") from exc
