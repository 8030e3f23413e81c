"""Our errors over gRPC: a status with the class's reason and data, and back.

The status code serves foreign clients. Ours read the trailing metadata
``kvferry-error-bin``, JSON ``[reason, [arguments]]``, and raise the same class again.
Only classes of `kvferry.errors` can come out of it.
"""

import asyncio
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from kvferry import errors
from kvferry.errors import FerryError, ProtocolError, StoreTimeoutError, StoreUnavailableError

METADATA_KEY = "kvferry-error-bin"
_MAX_ARGUMENT_CHARS = 1000
_MAX_METADATA_BYTES = 6000

_Code = grpc.StatusCode
# The nearest base class of an error decides.
_CODES: dict[type[FerryError], grpc.StatusCode] = {
    errors.FerryError: _Code.UNKNOWN,
    errors.ConfigError: _Code.INVALID_ARGUMENT,
    errors.InvalidKeyError: _Code.INVALID_ARGUMENT,
    errors.ProtocolError: _Code.INVALID_ARGUMENT,
    errors.CodecError: _Code.FAILED_PRECONDITION,
    errors.CorruptBlobError: _Code.DATA_LOSS,
    errors.BlobTooLargeError: _Code.INVALID_ARGUMENT,
    errors.CalibrationMissingError: _Code.NOT_FOUND,
    errors.CalibrationCorruptError: _Code.DATA_LOSS,
    errors.UnsupportedTensorError: _Code.INVALID_ARGUMENT,
    errors.StoreError: _Code.UNKNOWN,
    errors.BlobNotFoundError: _Code.NOT_FOUND,
    errors.StoreUnavailableError: _Code.UNAVAILABLE,
    errors.StoreTimeoutError: _Code.DEADLINE_EXCEEDED,
    errors.TokenRefusedError: _Code.UNAUTHENTICATED,
    errors.NotAllowedError: _Code.PERMISSION_DENIED,
    errors.NotLeaderError: _Code.FAILED_PRECONDITION,
    errors.StoreFullError: _Code.RESOURCE_EXHAUSTED,
    errors.QueueFullError: _Code.RESOURCE_EXHAUSTED,
    errors.ModelError: _Code.FAILED_PRECONDITION,
    errors.FencedError: _Code.FAILED_PRECONDITION,
}


def _family(base: type[FerryError]) -> Iterator[type[FerryError]]:
    yield base
    for child in base.__subclasses__():
        yield from _family(child)


def _class_of(reason: str) -> type[FerryError] | None:
    return next((c for c in _family(FerryError) if c.reason == reason), None)


def status_code(error: FerryError) -> grpc.StatusCode:
    """The gRPC status of an error."""
    return next(_CODES[c] for c in type(error).__mro__ if c in _CODES)


def _plain(value: object) -> object:
    if isinstance(value, bool | int | float) or value is None:
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value[:64]]
    return str(value)[:_MAX_ARGUMENT_CHARS]


def error_metadata(error: FerryError) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata that `error_from_metadata` reads."""
    raw = json.dumps([error.reason, [_plain(a) for a in error.args]]).encode()
    if len(raw) > _MAX_METADATA_BYTES:
        raw = json.dumps([error.reason, []]).encode()
    return ((METADATA_KEY, raw),)


def _decode(raw: bytes) -> FerryError | None:
    try:
        reason, arguments = json.loads(raw)
        cls = _class_of(reason)
        if cls is None:
            return None
        return cls(*(tuple(a) if isinstance(a, list) else a for a in arguments))
    except (ValueError, TypeError):
        return None


# What a handshake that failed has in its message, and what to do about it.
_TLS_PROBLEMS = (
    ("certificate has expired", "its certificate is over; renew it (`kvferry certs issue`)"),
    ("not yet valid", "its certificate does not hold yet; set the clocks of both machines"),
    (
        "Hostname Verification",
        "its certificate is for other addresses; issue it with `--host` and this one",
    ),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS; set tls_dir there, or not here"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "its certificate is of another authority; both machines need a folder that "
        "`kvferry certs issue` made with the same one",
    ),
    (
        "Socket closed",
        "it hung up at once; if it asks for TLS, set tls_dir here to a folder that "
        "`kvferry certs issue` made with its authority",
    ),
)


def _tls_problem(details: str) -> str:
    """In words, why no connection came about; "" where it was not for TLS."""
    if "failed to connect" not in details:
        return ""
    return next((words for mark, words in _TLS_PROBLEMS if mark in details), "")


def error_from_status(
    where: str,
    code: grpc.StatusCode | None,
    details: str,
    metadata: Iterable[Sequence[str | bytes]] | None,
) -> FerryError:
    """The error that the other side raised, or what stands for a failing transport."""
    for key, value in metadata or ():
        if key == METADATA_KEY and isinstance(value, bytes):
            error = _decode(value)
            if error is not None:
                return error
    if code is _Code.DEADLINE_EXCEEDED:
        return StoreTimeoutError(where, "no answer within the deadline")
    if code in (_Code.INVALID_ARGUMENT, _Code.UNIMPLEMENTED, _Code.RESOURCE_EXHAUSTED):
        return ProtocolError(f"{where} refused the call: {details[:300]}")
    if code is _Code.UNAVAILABLE and (problem := _tls_problem(details)):
        return StoreUnavailableError(where, problem)
    name = code.name.lower() if code is not None else "no status"
    return StoreUnavailableError(where, f"{name}: {details[:300]}")


def error_from_rpc(where: str, exc: grpc.RpcError) -> FerryError:
    """Translate what grpc or grpc.aio raised, once, at the boundary."""
    code = exc.code() if hasattr(exc, "code") else None
    details = exc.details() if hasattr(exc, "details") else str(exc)
    metadata: Any = exc.trailing_metadata() if hasattr(exc, "trailing_metadata") else None
    return error_from_status(where, code, details or "", metadata)


@contextmanager
def rpc_errors(where: str) -> Iterator[None]:
    """Turn what grpc raises into our errors, once."""
    try:
        yield
    except grpc.RpcError as exc:
        raise error_from_rpc(where, exc) from exc
    except asyncio.CancelledError as exc:
        # grpc cancels a call of its own accord where its channel is closed, and where
        # the connection breaks between two chunks of a stream that is being sent.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise StoreUnavailableError(where, "the connection was lost or closed") from exc
