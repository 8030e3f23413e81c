"""A prompt's chain in a store: its pages, tails and states, and what else hangs on them."""

import json
import re
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.repository import BlobInfo, ListQuery
from kvferry.errors import ConfigError
from kvferry.proto.keys import (
    DEFAULT_PAGE_TOKENS,
    BlobKey,
    page_keys,
    root_key,
    state_key,
    tail_key,
)

ENDS = ("tail", "state")
MODEL_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Chain:
    """Keys of a prompt in one namespace.

    Attributes:
        root: of the model in the namespace.
        pages: keys of its whole pages, in order.
        tokens: the prompt; empty where only a page's key was given.
    """

    root: bytes
    pages: Sequence[bytes]
    tokens: Sequence[int] = ()
    page_tokens: int = DEFAULT_PAGE_TOKENS


@dataclass(slots=True)
class Found:
    """What a store has of a chain: blobs by page; its tails and states."""

    pages: list[list[BlobInfo]] = field(default_factory=list)
    tails: list[BlobInfo] = field(default_factory=list)

    @property
    def blobs(self) -> list[BlobInfo]:
        """All of them."""
        return [*(info for page in self.pages for info in page), *self.tails]


def chain_of_prompt(prompt: str, model: str, *, chat: bool, socket: Path | None) -> Chain:
    """Keys of a prompt, in the namespace of this machine's node.

    Args:
        prompt: file with text, or JSON with token ids or messages; "-": standard input.
        model: as for `kvferry explain`; or a model id (64 hex digits), for token ids: then
            neither the model nor mlx is needed.
    Raises: ConfigError; StoreUnavailableError: no node here; NamespaceUnknownError.
    """
    salt = node_salt(socket)
    if MODEL_ID.fullmatch(model):
        tokens = _token_ids(prompt)
        root = root_key(salt, bytes.fromhex(model))
        return Chain(root, page_keys(root, tokens), tokens)
    from kvferry.cli.explain_input import asked

    wanted = asked(model, prompt, chat=chat)
    root, size = wanted.shard.root(salt), wanted.shard.page_tokens
    return Chain(root, page_keys(root, wanted.tokens, size), wanted.tokens, size)


def _token_ids(prompt: str) -> list[int]:
    from kvferry.cli.explain_input import read_prompt

    try:
        value = json.loads(read_prompt(prompt))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 1 << 32 for v in value):
        allowed = "a JSON list of token ids, as the model is given by its id only"
        raise ConfigError("prompt", prompt, allowed)
    return value


def node_salt(socket: Path | None) -> bytes:
    """The salt of this machine's namespace.

    Raises: StoreUnavailableError: no node runs here; NamespaceUnknownError.
    """
    from kvferry.errors import NamespaceUnknownError, StoreUnavailableError
    from kvferry.node.client import NodeClient
    from kvferry.settings import NodeSettings

    settings = NodeSettings.load(socket=socket)
    if not settings.socket.is_socket():
        reason = "no node daemon runs here, which knows the namespace; --page-key needs none"
        raise StoreUnavailableError(str(settings.socket), reason)
    with NodeClient(settings.socket, timeout_s=10.0) as client:
        hello = client.hello()
    if not hello.namespace_salt:
        raise NamespaceUnknownError(
            f"node {hello.node_id} has no namespace yet: it gets one from the coordinator "
            "once that answers (`kvferry status`)"
        )
    return hello.namespace_salt


async def chain_of_page(client: BlobStoreClient, page_key: bytes) -> Chain:
    """The pages up to one that the store has, found from it backwards."""
    pages: list[bytes] = []
    key = page_key
    while True:
        infos = [i async for i in _listed(client, ListQuery(page_key=key, kind="page"))]
        if not infos:
            return Chain(key, pages[::-1])
        pages.append(key)
        key = infos[0].previous_key


async def find(client: BlobStoreClient, chain: Chain) -> Found:
    """What the store has of a chain, also of pages that are not complete."""
    found = Found()
    for key in chain.pages:
        found.pages.append([i async for i in _listed(client, ListQuery(page_key=key, kind="page"))])
    if not chain.tokens:
        return found
    for anchor in (chain.root, *chain.pages):
        ends = await children(client, anchor, ENDS)
        found.tails += [info for info in ends if _is_end_of(chain, info)]
    return found


def _is_end_of(chain: Chain, info: BlobInfo) -> bool:
    """Whether a tail or state is of exactly these tokens, or of the first of them."""
    start, end = info.tokens
    if info.key.kind not in ("tail", "state") or end > len(chain.tokens):
        return False
    key = tail_key(info.previous_key, chain.tokens[start:end])
    if info.key.kind == "state":
        key = state_key(key, info.model_heads)
    return info.key.page_key == key


async def children(client: BlobStoreClient, key: bytes, kinds: Sequence[str]) -> list[BlobInfo]:
    """Blobs of these kinds that hang on a page or root."""
    found: list[BlobInfo] = []
    for kind in kinds:
        listed = _listed(client, ListQuery(previous_key=key, kind=kind))
        found += [info async for info in listed if info.previous_key == key]
    return found


async def leaf_first(client: BlobStoreClient, found: Found, *, with_prefix: bool) -> list[BlobInfo]:
    """What is deleted with a prompt, in the order in which it is.

    Its own tails and states, then its pages from the last one back; without ``with_prefix``
    only as far as nothing else hangs on them.
    """
    doomed = [*found.tails]
    gone = {info.key for info in doomed}
    for page in reversed(found.pages):
        if not page:
            continue
        if not with_prefix:
            key = page[0].key.page_key
            # Pages last: over a bucket all of them have to be looked at.
            if await _more(client, key, ENDS, gone) or await _more(client, key, ("page",), gone):
                break
        doomed += page
        gone |= {info.key for info in page}
    return doomed


async def _more(
    client: BlobStoreClient, key: bytes, kinds: Sequence[str], gone: Collection[BlobKey]
) -> bool:
    """Whether something hangs on a page that does not go."""
    return any(info.key not in gone for info in await children(client, key, kinds))


def calibrations_of(infos: Iterable[BlobInfo]) -> list[BlobKey]:
    """Keys of the calibrations that blobs are decoded with."""
    ids = {info.codec.calibration_id for info in infos if info.codec.calibration_id}
    return [BlobKey("calibration", i) for i in sorted(ids)]


async def _listed(client: BlobStoreClient, query: ListQuery) -> AsyncIterator[BlobInfo]:
    async for batch in client.list(query):
        for info in batch:
            yield info
