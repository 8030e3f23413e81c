"""Clients of commands, made in one place: which store is meant, and how it is reached."""

from typing import TYPE_CHECKING

from kvferry.errors import ConfigError

if TYPE_CHECKING:
    from kvferry.cluster.client import BlobStoreClient
    from kvferry.cluster.coordinator_client import CoordinatorClient
    from kvferry.cluster.sync_client import SyncBlobStoreClient


def store_address(store: str | None) -> str:
    """The store that is meant: as given, or the one of this machine's settings.

    Raises: ConfigError: there is none.
    """
    from kvferry.cli.blob_source import as_address, is_address
    from kvferry.settings import NodeSettings

    address = store or NodeSettings.load().store
    if not address or not is_address(address):
        raise ConfigError("--store", address, "HOST:PORT of the store")
    return as_address(address)


def store_client(address: str, timeout_s: float = 30.0) -> "BlobStoreClient":
    """Of a store or node. Made in the event loop that uses it."""
    from kvferry.cli.blob_source import credentials
    from kvferry.cluster.client import BlobStoreClient

    return BlobStoreClient(address, timeout_s=timeout_s, credentials=credentials())


def sync_store_client(address: str, timeout_s: float = 30.0) -> "SyncBlobStoreClient":
    """Of a store or node, blocking."""
    from kvferry.cli.blob_source import credentials
    from kvferry.cluster.sync_client import SyncBlobStoreClient

    return SyncBlobStoreClient(address, timeout_s=timeout_s, credentials=credentials())


def coordinator_client(address: str) -> "CoordinatorClient":
    """Of the coordinator. Made in the event loop that uses it."""
    from kvferry.cli.blob_source import credentials
    from kvferry.cluster.coordinator_client import CoordinatorClient

    return CoordinatorClient(address, credentials=credentials())
