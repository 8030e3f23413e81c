"""What a process shows to others over TCP, and what it asks of them. Made in one place.

Unix sockets need none of it: their folder and mode keep others out.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from kvferry.cluster.tls import Pem, TlsFiles
from kvferry.cluster.tokens import TOKEN_FILE, TOKENS_FILE, TokenBook, read_token
from kvferry.errors import ConfigError
from kvferry.settings import ServiceSettings, is_loopback

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Certificate, token, and tokens taken. The empty one: plaintext, and everybody may.

    Attributes:
        tls: this machine's certificate; None: plaintext.
        pem: its files as they were at the start, for channels.
        token: sent with every call; "": none.
        book: tokens that servers of this process take; None: they ask for none.
        plaintext: whether a token may go over the network without TLS.
    """

    tls: TlsFiles | None = None
    pem: Pem | None = field(default=None, repr=False)
    token: str = field(default="", repr=False)
    book: TokenBook | None = None
    plaintext: bool = False

    @classmethod
    def of(cls, settings: ServiceSettings) -> "Credentials":
        """What the settings name; reads and checks the files. Blocks.

        Raises: ConfigError: a file that is missing, damaged, over, or of another authority.
        """
        folder = settings.tls_dir
        tls = None if folder is None else TlsFiles.of_folder(folder)
        if tls is not None:
            expiry = tls.check()
            if expiry.soon:
                log.warning(
                    "the certificate %s ends on %s: renew it with `kvferry certs issue`",
                    tls.cert,
                    f"{expiry.ends:%Y-%m-%d}",
                )
        token = _chosen(settings.token_file, folder, TOKEN_FILE)
        tokens = _chosen(settings.tokens_file, folder, TOKENS_FILE)
        return cls(
            tls=tls,
            pem=None if tls is None else tls.read(),
            token="" if token is None else read_token(token),
            book=None if tokens is None else TokenBook(tokens),
            plaintext=settings.allow_remote_plaintext,
        )

    def channel(self, address: str) -> grpc.ChannelCredentials | None:
        """For a channel to ``address``; None: plaintext.

        Raises: ConfigError: a token would go over the network for all to see.
        """
        if address.startswith("unix:"):
            return None
        if self.pem is None:
            if self.token and not self.plaintext and address and not is_loopback(address):
                allowed = "reached over TLS, as there is a token to send: set tls_dir"
                raise ConfigError("address", address, allowed)
            return None
        return grpc.ssl_channel_credentials(self.pem.ca, self.pem.key, self.pem.cert)

    def metadata(self, address: str) -> tuple[tuple[str, str], ...]:
        """What goes with every call to ``address``."""
        if not self.token or address.startswith("unix:"):
            return ()
        return (("authorization", f"Bearer {self.token}"),)

    def server(self) -> grpc.ServerCredentials | None:
        """For a listener, which asks callers for a certificate; None: plaintext.

        The files are read again for each new connection, on a thread of grpc's, so a
        renewed certificate needs no restart.
        """
        files = self.tls
        if files is None or self.pem is None:
            return None

        last = self.pem

        def renewed() -> grpc.ServerCertificateConfiguration:
            nonlocal last
            try:
                last = files.read()
            except ConfigError as exc:
                log.warning("%s; going on with the last certificate", exc)
            return _configuration(last)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(self.pem), renewed, require_client_authentication=True
        )

    def missing(self) -> list[str]:
        """What keeps this process from listening beyond loopback, and what to do about it."""
        found = []
        if self.tls is None:
            found.append("no TLS (`kvferry certs init`, `kvferry certs issue NAME`, set tls_dir)")
        if self.book is None:
            found.append("no tokens (`kvferry certs issue` makes them too; or set tokens_file)")
        return found


PLAINTEXT = Credentials()


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)


def _chosen(named: Path | None, folder: Path | None, usual: str) -> Path | None:
    """A file that a setting names; else the usual one in the folder, where it is there."""
    if named is not None:
        return named
    if folder is not None and (folder / usual).is_file():
        return folder / usual
    return None
