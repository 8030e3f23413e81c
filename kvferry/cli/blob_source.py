"""Where blobs to be inspected come from: files, stores, node daemons; and calibrations."""

import re
from collections.abc import Sequence
from pathlib import Path

from kvferry.cli.blob_report import BlobReport, report_on
from kvferry.cluster.blob_name import parse_blob_name
from kvferry.cluster.credentials import Credentials
from kvferry.errors import BlobNotFoundError, CodecError, ConfigError, FerryError, InvalidKeyError
from kvferry.errors import StoreUnavailableError as Unreadable
from kvferry.places import user_dir
from kvferry.proto.container import DEFAULT_LIMITS, Finding
from kvferry.proto.keys import BlobKey
from kvferry.settings import NodeSettings

MAX_LISTED = 1000
_HOST_PORT = re.compile(r"[^\s/]+:[0-9]{1,5}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_address(text: str) -> bool:
    """Whether a store or node may be at ``text``: HOST:PORT, unix:PATH or a socket's path."""
    return bool(_HOST_PORT.fullmatch(text)) or text.startswith("unix:") or Path(text).is_socket()


def address_of(store: str | None, node: Path | None) -> str:
    """The address that the options name; "" where none does. Raises: ConfigError."""
    if store and node:
        raise ConfigError("--store and --node", f"{store}, {node}", "one of the two")
    if node is not None:
        if not node.is_socket():
            raise ConfigError("--node", str(node), "the socket of a node that runs")
        return f"unix:{node.resolve()}"
    if store and not is_address(store):
        raise ConfigError("--store", store, "HOST:PORT")
    return as_address(store) if store else ""


def as_address(text: str) -> str:
    """A socket's path as grpc wants it; anything else as it is."""
    return f"unix:{Path(text).resolve()}" if Path(text).is_socket() else text


def default_address() -> str:
    """This machine's node where it runs, else the store of the configuration."""
    settings = NodeSettings.load()
    if settings.socket.is_socket():
        return f"unix:{settings.socket}"
    if not settings.store:
        raise ConfigError("--store", "", "given, as no node runs here and no store is configured")
    return settings.store


def credentials() -> Credentials:
    """What this machine's settings say to show to stores and coordinators."""
    return Credentials.of(NodeSettings.load())


def report_file(path: Path) -> BlobReport:
    """Examine a file. Raises: ConfigError for no file, StoreUnavailableError if unreadable."""
    if not path.is_file():
        raise ConfigError("file", str(path), "a file (`kvferry verify` takes folders)")
    cap = DEFAULT_LIMITS.max_blob
    try:
        with path.open("rb") as file:
            data = file.read(cap + 1)
        size = path.stat().st_size
    except OSError as exc:
        raise Unreadable(str(path), exc.strerror or "") from exc
    if len(data) > cap:
        detail = f"{size:,} bytes, more than the cap of {cap:,}"
        return BlobReport(str(path), size, [Finding("size", False, detail)])
    try:
        expected = parse_blob_name(path.name)[0]
    except InvalidKeyError:
        expected = None
    return report_on(data, str(path), expected)


def keys_of(text: str, address: str) -> Sequence[BlobKey]:
    """The key that ``text`` is, or the keys of all blobs of a page key.

    ``address`` "": the one of the configuration, asked for a page key only.

    Raises: ConfigError for neither; BlobNotFoundError for a page key without blobs.
    """
    if not _DIGEST.fullmatch(text):
        try:
            return [BlobKey.parse(text)]
        except InvalidKeyError as exc:
            allowed = "a file, a key as page/64HEX/L0-15/H0-3/CODEC, or a page key (64 hex digits)"
            raise ConfigError("file or key", text[:200], allowed) from exc
    from kvferry.cluster.repository import ListQuery
    from kvferry.cluster.sync_client import SyncBlobStoreClient

    address = address or default_address()
    with SyncBlobStoreClient(address, credentials=credentials()) as client:
        batches = client.list(ListQuery(page_key=bytes.fromhex(text), limit=MAX_LISTED))
        keys = [info.key for batch in batches for info in batch]
    if not keys:
        raise BlobNotFoundError(f"of page {text} at {address}")
    return keys


def report_key(key: BlobKey, address: str) -> BlobReport:
    """Fetch and examine. Raises: BlobNotFoundError, StoreUnavailableError."""
    from kvferry.cluster.sync_client import SyncBlobStoreClient

    with SyncBlobStoreClient(address, credentials=credentials()) as client:
        try:
            data = client.get(key, verify=False)
        except CodecError as exc:
            return BlobReport(str(key), 0, [Finding("transfer", False, str(exc))])
    return report_on(data, str(key), key)


def calibration_place(calibration_id: bytes, address: str) -> str:
    """Where a calibration is: a path, an address, or "" where it was not found."""
    folder = user_dir("cache") / "calibrations"
    name = f"{calibration_id.hex()}.kvferry"
    for path in sorted(folder.glob(f"*/{name}")) if folder.is_dir() else ():
        return str(path)
    if not address:
        return ""
    from kvferry.cluster.sync_client import SyncBlobStoreClient

    try:
        with SyncBlobStoreClient(address, timeout_s=5.0, credentials=credentials()) as client:
            (held,) = client.has([BlobKey("calibration", calibration_id)])
    except FerryError:
        return ""
    return address if held else ""
