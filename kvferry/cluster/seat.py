"""Where a coordinator's decisions are kept, and its leave to make them."""

import asyncio
from dataclasses import dataclass

from kvferry.cluster.durable import private_folder
from kvferry.cluster.election.election import Election
from kvferry.cluster.etcd.access import EtcdAccess
from kvferry.cluster.etcd.client import EtcdClient
from kvferry.cluster.intent import IntentStore
from kvferry.cluster.intent_etcd import EtcdIntentStore
from kvferry.cluster.intent_file import FileIntentStore
from kvferry.cluster.leadership import OFFICE, Leadership
from kvferry.settings import CoordinatorSettings


@dataclass(frozen=True, slots=True)
class Seat:
    """Of one coordinator: alone with its files, or one of several over etcd."""

    intents: IntentStore
    leadership: Leadership
    etcd: EtcdClient | None = None

    @classmethod
    async def open(cls, settings: CoordinatorSettings) -> "Seat":
        """As the settings say; connects to nothing yet. Raises: ConfigError."""
        files = FileIntentStore(await asyncio.to_thread(private_folder, settings.data_dir))
        if not settings.etcd:
            return cls(files, Leadership())
        etcd = EtcdClient(await asyncio.to_thread(EtcdAccess.of, settings))
        prefix = settings.etcd_prefix
        election = Election(
            etcd, OFFICE, settings.advertise, prefix=prefix, ttl_s=settings.lease_ttl_s
        )
        intents = EtcdIntentStore(etcd, prefix, lambda: election.tenure, files)
        return cls(intents, Leadership(election), etcd)

    async def aclose(self) -> None:
        """Close the connection to etcd."""
        if self.etcd is not None:
            await self.etcd.aclose()
