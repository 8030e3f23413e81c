"""Whole blobs that came from elsewhere: what they are, once that is certain."""

from kvferry.cluster.convert import info_from_header
from kvferry.cluster.repository import BlobInfo
from kvferry.errors import IdentityMismatchError
from kvferry.proto import container
from kvferry.proto.keys import BlobKey


def checked_info(key: BlobKey, data: bytes | memoryview) -> BlobInfo:
    """What a whole blob's header says, once digest and key are verified. Blocks.

    Raises: CorruptBlobError, UnsupportedVersionError, IdentityMismatchError.
    """
    header = container.read_header(data)
    container.verify_digest(data)
    found = container.key_of(header)
    if found != key:
        raise IdentityMismatchError("key", str(found), str(key))
    return info_from_header(header, key, len(data))
