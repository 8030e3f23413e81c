"""Certificates and tokens: do they hold, and who can reach what this machine serves?"""

from collections.abc import Iterator

from kvferry.cli.doctor.finding import FAIL, OK, WARN, Finding
from kvferry.cluster.credentials import Credentials
from kvferry.cluster.etcd.access import parse_endpoints
from kvferry.cluster.leader_search import parse_addresses
from kvferry.errors import ConfigError
from kvferry.settings import (
    CoordinatorSettings,
    NodeSettings,
    ServiceSettings,
    StoreSettings,
    is_loopback,
)

_RENEW = "kvferry certs issue NAME, where the authority is; copy its folder here"
_SECURE = "kvferry certs init, kvferry certs issue NAME, then set tls_dir in [security]"


def certificate(
    node: NodeSettings, store: StoreSettings, coordinator: CoordinatorSettings
) -> Iterator[Finding]:
    """This machine's certificates: whole, of their authority, and not close to their end."""
    seen = set()
    for settings in (node, store, coordinator):
        key = (settings.tls_dir, settings.token_file, settings.tokens_file)
        if key in seen or not any(key):
            continue
        seen.add(key)
        try:
            found = Credentials.of(settings)
            expiry = None if found.tls is None else found.tls.check()
        except ConfigError as exc:
            yield Finding("certificate", FAIL, str(exc), _RENEW)
            continue
        if expiry is not None and found.tls is not None:
            left = f"{found.tls.cert}: {expiry.days_left:,.0f} days left"
            if expiry.soon:
                yield Finding("certificate", WARN, left, _RENEW)
            else:
                yield Finding("certificate", OK, f"{left}, for {', '.join(expiry.hosts)}")
        if found.tls is not None and not found.token:
            what = "there is a certificate, and no token to show"
            yield Finding("token", WARN, what, "set token_file in [security]")


def exposure(
    node: NodeSettings, store: StoreSettings, coordinator: CoordinatorSettings
) -> Iterator[Finding]:
    """Who can reach what this machine serves."""
    exposed: list[str] = []
    refused: list[str] = []
    guarded: list[str] = []
    for settings in (node, store, coordinator):
        for name in ("listen", "metrics_listen"):
            address = str(getattr(settings, name))
            if address and not is_loopback(address):
                where = f"{settings.table}.{name} = {address}"
                safe = name == "listen" and _guarded(settings)
                allowed = settings.allow_remote_plaintext
                (guarded if safe else exposed if allowed else refused).append(where)
    if refused:
        what = f"{', '.join(refused)}: beyond loopback without TLS and tokens: it will not start"
        yield Finding("exposure", FAIL, what, f"{_SECURE}; or listen on 127.0.0.1")
    if exposed:
        what = f"{', '.join(exposed)}: anyone who reaches it can read and write caches, unencrypted"
        remedy = f"{_SECURE}; or keep it within a network that you trust (a VPN)"
        yield Finding("exposure", WARN, what, remedy)
    if not exposed and not refused:
        served = f"{', '.join(guarded)}: behind TLS and tokens" if guarded else ""
        yield Finding("exposure", OK, served or "services listen on loopback only")
    places = (node.store, *parse_addresses(node.coordinator))
    far = [a for a in places if a and not is_loopback(a)]
    if far and node.tls_dir is None:
        what = f"prompts' caches go to {', '.join(far)} unencrypted"
        yield Finding("exposure", WARN, what, f"{_SECURE}; or use a network that you trust")
    members = parse_endpoints(coordinator.etcd) if coordinator.etcd else ()
    bare = [m.address for m in members if not m.tls and not is_loopback(m.address)]
    if bare:
        what = f"namespaces' secrets go to etcd ({', '.join(bare)}) unencrypted"
        remedy = "https:// endpoints and etcd_ca_file; or use a network that you trust"
        yield Finding("exposure", WARN, what, remedy)


def _guarded(settings: ServiceSettings) -> bool:
    try:
        return not Credentials.of(settings).missing()
    except ConfigError:
        return False
