"""A certificate authority for one cluster, in a folder of one machine.

The folder: ``ca.pem`` and ``ca.key``; ``tokens.json`` with the tokens of the cluster, hashed;
``admin.token``; ``nodes/NAMESPACE.token``, what machines of a namespace show each other; and
``machines/NAME``, one folder to be copied to each machine.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kvferry.cluster import certificate, tokens
from kvferry.cluster.durable import private_folder, write_durably
from kvferry.cluster.tls import CA_FILE, CERT_FILE, KEY_FILE, Expiry, TlsFiles, expiry_of
from kvferry.cluster.tokens import TOKEN_FILE, TOKENS_FILE, Entry, Right
from kvferry.errors import ConfigError

CA_KEY_FILE, ADMIN_FILE = "ca.key", "admin.token"
CA_DAYS = 3650
LEAF_DAYS = 90
MAX_LEAF_DAYS = 397
MAX_HOSTS = 64
# Always in a certificate: commands on the machine itself use these.
OWN_HOSTS = ("localhost", "127.0.0.1", "::1")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,62}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,252})")


class Authority:
    """An authority that was made by `create`. Blocks."""

    def __init__(self, folder: Path) -> None:
        """Raises: ConfigError: there is none in ``folder``."""
        self.folder = folder
        if not (folder / CA_KEY_FILE).is_file():
            raise ConfigError("--ca", str(folder), "where `kvferry certs init` made an authority")

    @classmethod
    def create(cls, folder: Path, name: str = "kvferry") -> "Authority":
        """Make one: its key for its owner only, an empty list of tokens, an admin's token.

        Raises: ConfigError: there is one already, or the folder cannot be made.
        """
        if (folder / CA_KEY_FILE).exists() or (folder / CA_FILE).exists():
            raise ConfigError(
                "--ca", str(folder), "a folder without an authority: this one is never overwritten"
            )
        private_folder(folder).chmod(0o700)
        made_key, made_cert = certificate.make_authority(name, CA_DAYS)
        write_durably(folder / CA_KEY_FILE, made_key, 0o600)
        write_durably(folder / CA_FILE, made_cert, 0o644)
        tokens.save_entries(folder / TOKENS_FILE, [])
        made = cls(folder)
        write_durably(folder / ADMIN_FILE, made.token("default", Right.ADMIN, "admin").encode())
        return made

    def issue(
        self,
        name: str,
        hosts: Sequence[str] = (),
        *,
        namespace: str = "default",
        days: float = LEAF_DAYS,
    ) -> Path:
        """A folder for machine ``name``: certificate, key, its token, all tokens' hashes.

        Args:
            hosts: names and addresses under which others reach it, beside ``name``.
            namespace: what the machine's token is for; made at its first machine.
            days: how long the certificate holds; issuing again renews it.
        Raises: ConfigError.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError("NAME", name, "a machine's name: letters, digits, . _ - and :")
        if not 0 < days <= MAX_LEAF_DAYS:
            raise ConfigError("--days", days, f"above 0, at most {MAX_LEAF_DAYS}")
        if len(hosts) > MAX_HOSTS:
            raise ConfigError("--host", len(hosts), f"given at most {MAX_HOSTS} times")
        for host in hosts:
            if not (_HOST.fullmatch(host) or certificate.is_ip(host)):
                raise ConfigError("--host", host, "a host's name or an address, without a port")
        node_token = self._node_token(namespace)
        wanted = tuple(dict.fromkeys((name, *hosts, *OWN_HOSTS)))
        authority = (self._read(CA_KEY_FILE), self._read(CA_FILE))
        try:
            key, cert = certificate.make_leaf(*authority, name, wanted, days)
        except (ValueError, TypeError) as exc:
            where = str(self.folder)
            raise ConfigError("--ca", where, f"an authority that is whole ({exc})") from exc
        private_folder(self.folder / "machines")
        bundle = private_folder(self.folder / "machines" / name)
        bundle.chmod(0o700)
        write_durably(bundle / KEY_FILE, key, 0o600)
        write_durably(bundle / CERT_FILE, cert, 0o644)
        write_durably(bundle / CA_FILE, self._read(CA_FILE), 0o644)
        write_durably(bundle / TOKEN_FILE, node_token.encode(), 0o600)
        self._spread(only=bundle)
        return bundle

    def token(self, namespace: str, right: Right, label: str = "") -> str:
        """A new token; its hash is added to ``tokens.json`` here and in all machines' folders."""
        entries = self.entries()
        tags = {name: tag for tag, name in tokens.bound_tags(entries).items()}
        text, entry = tokens.issue_token(namespace, right, label, tags.get(namespace, 0))
        tokens.save_entries(self.folder / TOKENS_FILE, [*entries, entry])
        self._spread()
        return text + "\n"

    def bind(self, namespace: str, tag: int) -> int:
        """Have the tokens of a namespace write blobs with its tag only; how many these are.

        Args:
            tag: see `kvferry.proto.keys.namespace_tag`; 0: they write what they say, as before.
        Raises: ConfigError: it has no token, or the tag is another's.
        """
        entries = self.entries()
        names = sorted({entry.bearer.namespace for entry in entries})
        if namespace not in names:
            raise ConfigError("NAMESPACE", namespace, f"one that has tokens ({', '.join(names)})")
        whose = tokens.bound_tags(entries).get(tag, namespace)
        if whose != namespace:
            raise ConfigError("--tag", f"{tag:016x}", f"its own: this one is that of {whose}")
        bound = [
            replace(entry, bearer=replace(entry.bearer, tag=tag))
            if entry.bearer.namespace == namespace
            else entry
            for entry in entries
        ]
        tokens.save_entries(self.folder / TOKENS_FILE, bound)
        self._spread()
        return sum(entry.bearer.namespace == namespace for entry in entries)

    def revoke(self, digest: str) -> int:
        """Forget the tokens whose hash begins with ``digest`` (8 digits at least); how many."""
        if not re.fullmatch(r"[0-9a-f]{8,64}", digest):
            raise ConfigError(
                "HASH", digest, "8 to 64 hex digits, as `kvferry certs show` has them"
            )
        entries = self.entries()
        left = [entry for entry in entries if not entry.digest.hex().startswith(digest)]
        tokens.save_entries(self.folder / TOKENS_FILE, left)
        self._spread()
        return len(entries) - len(left)

    def entries(self) -> list[Entry]:
        """All tokens, hashed."""
        return tokens.load_entries(self.folder / TOKENS_FILE)

    def machines(self) -> list[tuple[str, Expiry]]:
        """(name, what its certificate says), by name."""
        found = []
        folder = self.folder / "machines"
        for bundle in sorted(folder.iterdir()) if folder.is_dir() else ():
            path = TlsFiles.of_folder(bundle).cert
            if path.is_file():
                found.append((bundle.name, expiry_of(path.read_bytes(), path)))
        return found

    def expiry(self) -> Expiry:
        """Of the authority itself."""
        return expiry_of(self._read(CA_FILE), self.folder / CA_FILE)

    def _node_token(self, namespace: str) -> str:
        """One for all machines of a namespace, so that a new machine changes no other's list."""
        path = self.folder / "nodes" / f"{tokens.check_namespace(namespace)}.token"
        if not path.is_file():
            private_folder(path.parent)
            write_durably(path, self.token(namespace, Right.WRITE, "nodes").encode(), 0o600)
        return tokens.read_token(path) + "\n"

    def _spread(self, only: Path | None = None) -> None:
        """Copy ``tokens.json`` into machines' folders."""
        data = self._read(TOKENS_FILE)
        bundles = (
            [only] if only else [self.folder / "machines" / name for name, _ in self.machines()]
        )
        for bundle in bundles:
            write_durably(bundle / TOKENS_FILE, data, 0o600)

    def _read(self, name: str) -> bytes:
        path = self.folder / name
        try:
            return path.read_bytes()
        except OSError as exc:
            raise ConfigError("--ca", str(path), f"readable ({exc.strerror})") from exc
