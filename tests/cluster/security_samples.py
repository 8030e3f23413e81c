"""Authorities, machines' folders and credentials for tests."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

from kvferry.cluster import certificate
from kvferry.cluster.authority import CA_KEY_FILE, Authority
from kvferry.cluster.credentials import Credentials
from kvferry.cluster.tls import CA_FILE, TlsFiles
from kvferry.settings import StoreSettings


def of(folder: Path, **more: object) -> Credentials:
    """What a service with this ``tls_dir`` shows and asks for."""
    return Credentials.of(StoreSettings.load(tls_dir=folder, **more))


def unchecked(folder: Path) -> Credentials:
    """As `of`, of files that `of` would refuse."""
    files = TlsFiles.of_folder(folder)
    return Credentials(tls=files, pem=files.read())


def expired(authority: Authority, name: str = "expired") -> Path:
    """A machine's folder whose certificate ended yesterday."""
    folder = authority.folder.parent / name
    shutil.copytree(authority.issue("machine"), folder)
    files = TlsFiles.of_folder(folder)
    pem = [(authority.folder / part).read_bytes() for part in (CA_KEY_FILE, CA_FILE)]
    begin = datetime.now(UTC) - timedelta(days=3)
    key, cert = certificate.make_leaf(pem[0], pem[1], name, ["127.0.0.1"], 2.0, begin)
    files.key.write_bytes(key)
    files.cert.write_bytes(cert)
    return folder
