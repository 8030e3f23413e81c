"""Who may call what: every call but health checking needs a token with the right for it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc
import grpc.aio

from kvferry.cluster.namespaces import DEFAULT_NAMESPACE
from kvferry.cluster.status import error_metadata, status_code
from kvferry.cluster.tag_rule import TagRule
from kvferry.cluster.tokens import Bearer, Right, TokenBook
from kvferry.errors import ConfigError, FerryError, NotAllowedError, TokenRefusedError

log = logging.getLogger(__name__)

FOLLOW_S = 2.0
_HEALTH = "/grpc.health.v1.Health/"
_REFLECTION = "/grpc.reflection."
# What is not named here needs ADMIN: a new call is closed until somebody opens it.
_OPEN: tuple[tuple[str, Right, tuple[str, ...]], ...] = (
    ("BlobStore", Right.READ, ("Has", "Get", "Lookup", "List", "Stat")),
    ("BlobStore", Right.WRITE, ("Put", "Commit", "Pin", "Unpin", "Delete")),
    ("Coordinator", Right.READ, ("Register", "Heartbeat", "WatchPolicy", "ReportRestore")),
    ("Coordinator", Right.READ, ("Explain", "Members", "Goodbye", "Leadership")),
    ("Link", Right.READ, ("Probe",)),
    ("Peer", Right.READ, ("Holdings",)),
    ("Peer", Right.WRITE, ("TakeOver",)),
)
RIGHTS: dict[str, Right] = {
    f"/kvferry.v1.{service}/{method}": right
    for service, right, methods in _OPEN
    for method in methods
}

_caller: ContextVar[Bearer | None] = ContextVar("kvferry_caller", default=None)


def caller() -> Bearer | None:
    """Whose call is being served; None: a server that asks for no tokens."""
    return _caller.get()


def callers_namespace() -> str:
    """The namespace that the caller's token names; callers choose none themselves."""
    bearer = caller()
    return DEFAULT_NAMESPACE if bearer is None else bearer.namespace


def callers_rule() -> TagRule | None:
    """The namespaces that the caller may put blobs into; None: all, as admins do."""
    bearer = caller()
    if bearer is None or bearer.right >= Right.ADMIN:
        return None
    return TagRule(bearer.namespace, bearer.tag, bearer.others)


def right_for(method: str) -> Right:
    """What a call needs, by its full name."""
    return Right.READ if method.startswith(_REFLECTION) else RIGHTS.get(method, Right.ADMIN)


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc,unused-ignore]
    """Refuses calls before anything of them is read. ``where``: the server, in errors."""

    def __init__(self, book: TokenBook, on_refused: Callable[[str], None]) -> None:
        self._book, self._on_refused = book, on_refused
        self.where = "the server"

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        """grpc's; the handler that serves the call, or one that refuses it."""
        method = str(handler_call_details.method)
        if method.startswith(_HEALTH):
            return await continuation(handler_call_details)
        try:
            _caller.set(self._admitted(method, handler_call_details.invocation_metadata))
        except FerryError as exc:
            self._on_refused(exc.reason)
            return _refusal(exc)
        return await continuation(handler_call_details)

    def _admitted(self, method: str, metadata: Any) -> Bearer:
        """Raises: TokenRefusedError, NotAllowedError."""
        shown = next((value for key, value in metadata or () if key == "authorization"), "")
        kind, _, token = shown.partition(" ") if isinstance(shown, str) else ("", "", "")
        if kind != "Bearer" or not token:
            problem = "no token came with the call: set tls_dir or token_file on the caller's side"
            raise TokenRefusedError(self.where, problem)
        bearer = self._book.bearer(token)
        if bearer is None:
            problem = (
                "it is not known there: issue one with `kvferry certs token`, and copy "
                f"{self._book.path.name} to the servers"
            )
            raise TokenRefusedError(self.where, problem)
        needed = right_for(method)
        if bearer.right < needed:
            name = method.rpartition("/")[2]
            raise NotAllowedError(name, needed.name.lower(), bearer.right.name.lower())
        return bearer

    async def follow(self) -> None:
        """Take over changes of the tokens' file, for ever."""
        while True:
            await asyncio.sleep(FOLLOW_S)
            try:
                if await asyncio.to_thread(self._book.refresh):
                    log.info("%d tokens are known now", len(self._book))
            except ConfigError as exc:
                log.warning("%s; going on with the tokens known before", exc)


def _refusal(error: FerryError) -> Any:
    """A handler for calls of every kind: it reads nothing and ends the call."""

    async def refuse(requests: object, context: Any) -> None:
        await context.abort(status_code(error), str(error)[:500], error_metadata(error))

    return grpc.stream_stream_rpc_method_handler(refuse)
