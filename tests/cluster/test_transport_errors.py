"""What a repository raises, a caller on another machine raises."""

import asyncio

import grpc
import pytest
from store_samples import blob, served

from kvferry import errors
from kvferry.cluster.status import error_from_status, error_metadata, rpc_errors, status_code
from kvferry.errors import FerryError

SAMPLES: list[FerryError] = [
    errors.ConfigError("x", 3, "less"),
    errors.OutOfReachError("ratio", 32, "at most 6.4"),
    errors.InvalidKeyError("k", "bad"),
    errors.CorruptBlobError("digest", "differs"),
    errors.BlobTooLargeError("size", 10**13, 10),
    errors.UnsupportedVersionError("blob format", 9, 1),
    errors.UnknownCodecError("zip", ("raw", "ferry")),
    errors.CalibrationMissingError("ab" * 32),
    errors.CalibrationCorruptError("x", "y"),
    errors.IdentityMismatchError("model", "a", "b"),
    errors.UnsupportedTensorError("k", "NaN"),
    errors.BlobNotFoundError("page/x"),
    errors.StoreUnavailableError("store:1", "down"),
    errors.StoreTimeoutError("store:1", "late"),
    errors.TokenRefusedError("store:1", "not known there"),
    errors.NotAllowedError("Put", "write", "read"),
    errors.WrongNamespaceError("0123456789abcdef", "ours", "guests"),
    errors.NotLeaderError("coordinator a:1", "b:2"),
    errors.StoreFullError("here", 10, 3),
    errors.QueueFullError("uploads", 7),
    errors.ModelError("no model"),
    errors.IdentityPendingError("digest not ready yet"),
    errors.NamespaceUnknownError("no salt yet"),
    errors.FencedError("node-1 started again"),
    errors.ProtocolError("what?"),
]


def _classes(base: type[FerryError]) -> set[type[FerryError]]:
    return {base}.union(*(_classes(child) for child in base.__subclasses__()))


def test_samples_cover_every_error() -> None:
    bases = {FerryError, errors.CodecError, errors.StoreError}
    assert {type(e) for e in SAMPLES} == _classes(FerryError) - bases


def test_reasons_are_unique() -> None:
    classes = _classes(FerryError)
    assert len({c.reason for c in classes}) == len(classes)


@pytest.mark.parametrize("error", SAMPLES, ids=lambda e: type(e).__name__)
def test_error_survives_the_metadata(error: FerryError) -> None:
    again = error_from_status("x", status_code(error), str(error), error_metadata(error))
    assert type(again) is type(error)
    assert (again.args, str(again)) == (error.args, str(error))


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{}", b'["nonsense", []]', b'["full", [1]]', b'["full"', b'["not_found", {}]'],
)
def test_forged_metadata_is_ignored(raw: bytes) -> None:
    error = error_from_status("x", grpc.StatusCode.INTERNAL, "?", [("kvferry-error-bin", raw)])
    assert type(error) is errors.StoreUnavailableError


def test_long_arguments_are_cut() -> None:
    error = errors.StoreUnavailableError("x" * 10_000, "y" * 10_000)
    assert len(error_metadata(error)[0][1]) < 8000


class _Raises:
    def __init__(self, error: Exception) -> None:
        self.error = error

    async def has(self, keys: object) -> list[bool]:
        raise self.error

    async def open_put(self, spec: object) -> None:
        raise self.error

    async def open_get(self, *args: object) -> None:
        raise self.error

    async def list(self, query: object) -> None:
        raise self.error
        yield


@pytest.mark.parametrize("error", SAMPLES, ids=lambda e: type(e).__name__)
async def test_error_survives_a_real_server(error: FerryError) -> None:
    key, data = blob()
    reasons: list[str] = []
    async with served(_Raises(error), on_failure=reasons.append) as client:  # type: ignore[arg-type]
        for call in (client.has([key]), client.put(key, data), client.get(key), _drain(client)):
            with pytest.raises(type(error)) as found:
                await call
            assert found.value.args == error.args
    assert reasons == [error.reason] * 4


async def _drain(client: object) -> None:
    async for _ in client.list():  # type: ignore[attr-defined]
        pass


async def test_a_bug_is_an_internal_error_without_details(caplog: pytest.LogCaptureFixture) -> None:
    async with served(_Raises(KeyError("secret"))) as client:  # type: ignore[arg-type]
        with pytest.raises(errors.StoreUnavailableError) as found:
            await client.has([blob()[0]])
    assert "secret" not in str(found.value)
    assert "Has" in caplog.text


async def test_a_call_that_grpc_cancels_is_an_unreachable_store() -> None:
    with pytest.raises(errors.StoreUnavailableError), rpc_errors("store:1"):
        raise asyncio.CancelledError


async def test_a_caller_that_is_cancelled_stays_cancelled() -> None:
    async def call() -> None:
        with rpc_errors("store:1"):
            await asyncio.sleep(60)

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
