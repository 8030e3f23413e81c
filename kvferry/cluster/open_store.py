"""Any place where blobs are kept, by its address."""

import re

from kvferry.cluster.backends import open_backend
from kvferry.cluster.bucket.claim import Turn
from kvferry.cluster.bucket.open import is_bucket, open_bucket
from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.credentials import PLAINTEXT, Credentials
from kvferry.cluster.redis.link import RedisLink
from kvferry.cluster.redis.repository import RedisRepository
from kvferry.cluster.redis.url import is_redis
from kvferry.cluster.remote_store import RemoteStore
from kvferry.cluster.served import OwnedRepository
from kvferry.cluster.space import StoreLimits
from kvferry.cluster.store import LocalStore
from kvferry.errors import ConfigError

PLACES = (
    "file:///PATH, s3://BUCKET/PREFIX, memory://, redis://HOST:PORT, "
    "redis+cluster://HOST:PORT,..., or HOST:PORT of a running store"
)
REDIS_TIMEOUT_S = 30.0
REMOTE_TIMEOUT_S = 120.0
_ADDRESS = re.compile(r"unix:.+|[^\s/]+:[0-9]{1,5}")


async def open_store(
    url: str,
    limits: StoreLimits,
    credentials: Credentials = PLAINTEXT,
    turn: Turn | None = None,
) -> OwnedRepository:
    """Open what an address names; whoever gets it closes it.

    Args:
        url: ``file:///PATH``, ``s3://BUCKET/PREFIX``, ``memory://``, ``redis://...``,
            ``redis+cluster://...``, or HOST:PORT (unix:PATH) of a store or node that runs.
        limits: hold for what is opened here; a running store has its own.
        credentials: shown to a running store.
        turn: which of several servers over a bucket sweeps; None: settled in the bucket.
    Raises:
        ConfigError: no such address, a folder in use by a running process, or an extra
            that is not installed.
    """
    if is_redis(url):
        link = RedisLink(url, timeout_s=REDIS_TIMEOUT_S, max_value_bytes=limits.max_blob_bytes)
        return RedisRepository(link)
    if _ADDRESS.fullmatch(url):
        client = BlobStoreClient(
            url,
            timeout_s=REMOTE_TIMEOUT_S,
            max_blob_bytes=limits.max_blob_bytes,
            credentials=credentials,
        )
        return RemoteStore(client)
    if is_bucket(url):
        return await open_bucket(url, limits, turn)
    if not url.startswith(("file:", "memory:")):
        raise ConfigError("backend", url, PLACES)
    return await LocalStore.open(open_backend(url), limits)
