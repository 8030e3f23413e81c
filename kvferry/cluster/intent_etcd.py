"""Operator intent in etcd, shared by all coordinators; written by the leader only."""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from kvferry.cluster.election.tenure import Tenure
from kvferry.cluster.etcd import operations as ops
from kvferry.cluster.etcd.client import EtcdClient
from kvferry.cluster.intent import check_name, check_size
from kvferry.cluster.intent_file import FileIntentStore
from kvferry.cluster.namespaces import SALT_BYTES
from kvferry.errors import ConfigError, FerryError, NotLeaderError, StoreUnavailableError

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
RETRY_S = 0.5


class EtcdIntentStore:
    """An `IntentStore` in etcd, under ``PREFIX/intent/NAME`` and ``PREFIX/salt/NAMESPACE``.

    A write is a transaction that holds only while our tenure does and while the document
    is the one that was last read or written here, so what a deposed leader still sends is
    refused, and no version is ever given out with two contents.

    What is read and written is copied to this machine's own folder: where etcd has
    nothing (it is new, or was set up anew), the copy is where it begins.
    """

    def __init__(
        self,
        etcd: EtcdClient,
        prefix: str,
        tenure: Callable[[], Tenure | None],
        copy: FileIntentStore,
    ) -> None:
        """
        Args:
            tenure: of this coordinator at the moment of asking; None: it is not the leader.
            copy: documents and salts of this machine.
        """
        self._etcd, self._tenure, self._copy = etcd, tenure, copy
        self._prefix = prefix
        self._seen: dict[str, int] = {}  # revision at which each document was last changed

    @property
    def where(self) -> str:
        """etcd, and the member that is asked now."""
        return self._etcd.where

    def _key(self, name: str) -> bytes:
        return f"{self._prefix}/intent/{check_name(name)}".encode()

    async def read(self, name: str) -> bytes | None:
        """As `IntentStore`; where etcd has nothing the copy, which a leader puts there."""
        item = (await self._etcd.get(self._key(name))).item
        self._seen[name] = item.modified if item is not None else 0
        if item is None:
            data = await self._copy.read(name)
            if data is not None and self._tenure() is not None:
                await self.write(name, data)
            return data
        await self._keep_copy(name, item.value)
        return item.value

    async def write(self, name: str, data: bytes) -> bool:
        """As `IntentStore`."""
        check_size(name, data)
        tenure = self._tenure()
        if tenure is None:
            raise NotLeaderError("this coordinator")
        key, seen = self._key(name), self._seen.get(name, 0)
        outcome = await self._etcd.transact(
            [tenure.guard(), ops.unchanged(key, seen)],
            [ops.put(key, data)],
            [ops.get(key), ops.get(tenure.key)],
        )
        if outcome.held:
            self._seen[name] = outcome.revision
        else:
            there, office = outcome.reads
            if office is None or office.created != tenure.created:
                raise NotLeaderError(
                    "this coordinator", office.value.decode(errors="replace") if office else ""
                )
            # An attempt that was thought to have failed may be what stands there.
            if there is None or there.value != data or there.modified <= seen:
                return False
            self._seen[name] = there.modified
        await self._keep_copy(name, data)
        return True

    async def set_aside(self, name: str) -> None:
        """As `IntentStore`: under the name NAME.damaged."""
        tenure, key = self._tenure(), self._key(name)
        item = (await self._etcd.get(key)).item
        if tenure is None or item is None:
            return
        aside = ops.put(key + b".damaged", item.value)
        await self._etcd.transact(
            [tenure.guard(), ops.unchanged(key, item.modified)], [aside, ops.delete(key)]
        )
        self._seen[name] = 0

    async def changes(self, name: str) -> AsyncGenerator[bytes, None]:
        """As `IntentStore`: by a watch, and by a look now and then as watches can be mute."""
        key, known = self._key(name), 0
        while True:
            try:
                found = await self._etcd.get(key)
                if found.item is not None and found.item.modified > known:
                    known = found.item.modified
                    await self._keep_copy(name, found.item.value)
                    yield found.item.value
                with suppress(TimeoutError):
                    async with (
                        asyncio.timeout(LOOK_EVERY_S),
                        aclosing(self._etcd.watch(key, found.revision)) as watch,
                    ):
                        await anext(watch)
            except FerryError as exc:
                log.debug("watching %s: %s", name, exc)
                await asyncio.sleep(RETRY_S)

    async def kept_salt(self, namespace: str) -> bytes:
        """As `IntentStore`; the first coordinator brings that of its folder along.

        Raises: ConfigError also where this machine's folder has another one.
        """
        item = (await self._etcd.get(self._salt_key(namespace))).item
        own = await self._copy.kept_salt(namespace)
        if item is None:
            return await self._settle(namespace, own) if own else b""
        return await self._checked(namespace, item, own)

    async def salt(self, namespace: str, brought: bytes = b"") -> bytes:
        """As `IntentStore`; of several coordinators that ask at once one settles it."""
        found = await self.kept_salt(namespace)
        offered = brought if len(brought) == SALT_BYTES else secrets.token_bytes(SALT_BYTES)
        return found or await self._settle(namespace, offered)

    def _salt_key(self, namespace: str) -> bytes:
        return f"{self._prefix}/salt/{check_name(namespace)}".encode()

    async def _settle(self, namespace: str, offered: bytes) -> bytes:
        key = self._salt_key(namespace)
        outcome = await self._etcd.transact(
            [ops.absent(key)], [ops.put(key, offered), ops.get(key)], [ops.get(key)]
        )
        return await self._checked(
            namespace, outcome.reads[0], await self._copy.kept_salt(namespace)
        )

    async def _checked(self, namespace: str, item: ops.Item | None, own: bytes) -> bytes:
        if item is None or len(item.value) != SALT_BYTES:
            raise ConfigError(
                "namespace salt",
                f"{self.where}, {self._salt_key(namespace).decode()}",
                f"{SALT_BYTES} bytes: restore it from a backup, or delete the key and lose "
                "all that was stored under it",
            )
        if not own:
            return await self._copy.salt(namespace, item.value)
        if own != item.value:
            raise ConfigError(
                "namespace salt",
                str(self._copy.folder / "namespaces" / f"{namespace}.salt"),
                "that of etcd: move it away to join this cluster (what was stored under it "
                "is not found from here any more), or give this cluster another etcd_prefix",
            )
        return own

    async def _keep_copy(self, name: str, data: bytes) -> None:
        try:
            await self._copy.write(name, data)
        except StoreUnavailableError as exc:
            log.warning("no copy of %s: %s", name, exc)
