"""What a blob's header says of its streams: shapes and dtypes, checked against caps."""

from kvferry.codec.base import STATE_PREFIX, DType, Stream
from kvferry.errors import BlobTooLargeError, CorruptBlobError
from kvferry.proto.container import Limits
from kvferry.proto.v1 import blob_pb2

MAX_DIM = 1 << 16


def stored_shape(stream: Stream, entries: int) -> tuple[int, ...]:
    """Of a stream; ``entries``: length of its token axis, 0: as it is."""
    shape = stream.data.shape
    return (*shape[:2], entries or shape[2], shape[3])


def read_streams(
    header: blob_pb2.BlobHeader, limits: Limits, *, fewer: bool
) -> tuple[dict[str, tuple[int, int, int, int]], dict[str, DType]]:
    """Shapes that agree with the ranges and whose float32 form is within the cap.

    Args:
        fewer: whether streams may have fewer entries than tokens, all of them equally many.
    Raises: CorruptBlobError, BlobTooLargeError.
    """
    layers = header.layer_end - header.layer_start
    heads = header.head_end - header.head_start
    tokens = header.token_end - header.token_start
    if fewer and header.streams and len(header.streams[0].shape) == 4:
        tokens = min(tokens, header.streams[0].shape[2])
    shapes: dict[str, tuple[int, int, int, int]] = {}
    dtypes: dict[str, DType] = {}
    total = 0
    for stream in header.streams:
        field = f"stream {stream.name!r}"
        if len(stream.shape) != 4 or stream.name in shapes:
            raise CorruptBlobError(field, f"shape {list(stream.shape)[:8]}, or stands twice")
        a, b, c, d = stream.shape
        fits = a == layers and min(b, c) >= 1 and 1 <= d <= MAX_DIM
        if not stream.name.startswith(STATE_PREFIX):
            fits = fits and c == tokens and b in (heads, 1)
        if not fits:
            raise CorruptBlobError(field, f"shape {[a, b, c, d]} does not fit the ranges")
        total += 4 * a * b * c * d
        if total > limits.max_raw:
            raise BlobTooLargeError(field, total, limits.max_raw)
        try:
            dtypes[stream.name] = DType(stream.dtype)
        except ValueError as exc:
            raise CorruptBlobError(field, f"dtype {stream.dtype[:32]!r}") from exc
        shapes[stream.name] = (a, b, c, d)
    if not shapes:
        raise CorruptBlobError("streams", "there are none")
    return shapes, dtypes
