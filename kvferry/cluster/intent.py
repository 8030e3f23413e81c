"""What the operator decided, kept apart from all soft state: the policy in force.

One JSON file, replaced as a whole and synced before the policy is given out, so that a
version is never used twice, also over a crash.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from kvferry.cluster.durable import write_durably
from kvferry.cluster.policy import dump_policy, parse_policy
from kvferry.errors import ConfigError
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

FILE_NAME = "policy.json"
MAX_VERSION = 1 << 53  # what JSON numbers hold exactly everywhere

Source = Literal["built-in", "file", "admin"]


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


def save_intent(data_dir: Path, intent: Intent) -> None:
    """Durable when this returns. Raises: OSError."""
    value = {
        "version": intent.policy.version,
        "source": intent.source,
        "file_digest": intent.file_digest,
        "policy": dump_policy(intent.policy),
    }
    write_durably(data_dir / FILE_NAME, (json.dumps(value, indent=1) + "\n").encode())


def load_intent(data_dir: Path) -> Intent | None:
    """What was saved; None where nothing was, or where it is damaged (then set aside)."""
    path = data_dir / FILE_NAME
    if not path.exists():
        return None
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as exc:
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        log.error("%s is damaged (%s): set aside as %s", path, exc, aside.name)
        return None


def _read(path: Path) -> Intent:
    value = json.loads(path.read_bytes())
    policy = parse_policy(value["policy"].encode(), str(path))
    version, source = value["version"], value["source"]
    if not isinstance(version, int) or not 0 < version <= MAX_VERSION:
        raise ValueError(f"version {version!r}")
    if source not in get_args(Source):
        raise ValueError(f"source {source!r}")
    policy.version = version
    return Intent(policy=policy, source=source, file_digest=str(value["file_digest"]))
