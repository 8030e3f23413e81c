"""What a node remembers between starts: its incarnation, the namespace salt, the policy."""

import contextlib
import fcntl
import logging
import os
import secrets
import time
from pathlib import Path

from google.protobuf.message import DecodeError

from kvferry.cluster.durable import private_folder, write_durably
from kvferry.errors import ConfigError
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

SALT_BYTES = 32
MAX_SALT_BYTES = 64
MAX_POLICY_BYTES = 1 << 20


class NodeState:
    """The folder ``data_dir``, held by one daemon at a time. Blocks.

    Raises: ConfigError: not writable, or held by another daemon.
    """

    def __init__(self, data_dir: Path) -> None:
        self._folder = private_folder(data_dir)
        self._lock = os.open(self._folder / "node.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(self._lock)
            raise ConfigError(
                "data_dir", str(data_dir), "a folder that no other node daemon uses"
            ) from exc

    def close(self) -> None:
        """Let another daemon have the folder. May be called twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _read(self, name: str, cap: int) -> bytes:
        with contextlib.suppress(OSError), (self._folder / name).open("rb") as file:
            data = file.read(cap + 1)
            return data if len(data) <= cap else b""
        return b""

    def next_incarnation(self) -> int:
        """Greater than at every start before, also when ``data_dir`` was emptied since.

        That is why it begins at the clock (milliseconds): the coordinator remembers more
        than the folder does, and would take a count from 1 for a ghost of the past.
        """
        text = self._read("incarnation", 32)
        last = int(text) if text.strip().isdigit() else 0
        number = max(last + 1, time.time_ns() // 1_000_000)
        write_durably(self._folder / "incarnation", str(number).encode())
        return number

    def salt(self) -> bytes:
        """The namespace salt; empty: none was issued yet."""
        data = self._read("salt", MAX_SALT_BYTES)
        return data if len(data) >= 16 else b""

    def save_salt(self, salt: bytes) -> None:
        """Readable by its owner only."""
        write_durably(self._folder / "salt", salt, 0o600)

    def own_salt(self) -> bytes:
        """For a node without a coordinator: a namespace of its own, made once."""
        salt = self.salt()
        if not salt:
            salt = secrets.token_bytes(SALT_BYTES)
            self.save_salt(salt)
        return salt

    def policy(self) -> pb.Policy | None:
        """The last policy; None where there is none, or it cannot be read."""
        data = self._read("policy.bin", MAX_POLICY_BYTES)
        try:
            return pb.Policy.FromString(data) if data else None
        except DecodeError:
            log.warning("the policy kept in %s cannot be read: left aside", self._folder)
            return None

    def save_policy(self, policy: pb.Policy) -> None:
        """For the next start without a coordinator."""
        write_durably(self._folder / "policy.bin", policy.SerializeToString())
