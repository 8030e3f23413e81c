"""Addresses of Redis servers and clusters.

redis://[USER:PASSWORD@]HOST:PORT[/DB]        rediss:// with TLS
redis+cluster://[USER:PASSWORD@]HOST:PORT,HOST:PORT,...   rediss+cluster:// with TLS
"""

from dataclasses import dataclass
from urllib.parse import unquote

from kvferry.errors import ConfigError

SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster")
_FORMS = "redis://HOST:PORT[/DB] or redis+cluster://HOST:PORT,HOST:PORT"
_DEFAULT_PORT = 6379


@dataclass(frozen=True, slots=True, repr=False)
class RedisUrl:
    """A parsed address. Its text form has no password."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    user: str = ""
    password: str = ""
    db: int = 0

    @property
    def cluster(self) -> bool:
        """Whether several servers share the keys."""
        return self.scheme.endswith("+cluster")

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.scheme.startswith("rediss")

    def __str__(self) -> str:
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{self.scheme}://{hosts}" + (f"/{self.db}" if self.db else "")


def is_redis(url: str) -> bool:
    """Whether an address is one of these."""
    return url.partition("://")[0] in SCHEMES


def parse_redis_url(url: str) -> RedisUrl:
    """Raises: ConfigError; it does not repeat a password."""
    scheme, _, rest = url.partition("://")
    account, _, place = rest.rpartition("@")
    shown = f"{scheme}://{place}"[:200]
    places, _, db = place.partition("/")
    if scheme not in SCHEMES or not places or not (db or "0").isdecimal():
        raise ConfigError("redis", shown, _FORMS)
    user, _, password = account.partition(":")
    hosts = tuple(_host(part, shown) for part in places.split(","))
    cluster = scheme.endswith("+cluster")
    if not cluster and len(hosts) > 1:
        raise ConfigError("redis", shown, "one HOST:PORT; several are redis+cluster://")
    if cluster and int(db or 0):
        raise ConfigError("redis", shown, "without a database number: a cluster has one only")
    return RedisUrl(scheme, hosts, unquote(user), unquote(password), int(db or 0))


def _host(text: str, shown: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(_DEFAULT_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ConfigError("redis", shown, _FORMS)
    return host.strip("[]"), int(port)
