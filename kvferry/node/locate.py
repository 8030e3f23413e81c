"""Where blobs are to be had, without fetching any: for people who ask why."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.errors import FerryError
from kvferry.node.remotes import Remote
from kvferry.node.repository import NodeRepository
from kvferry.proto.keys import BlobKey

LOCATE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Located:
    """Places of each blob, nearest first, and who did not answer.

    Places are "memory", "disk", "uploading", "peer:NAME" and "store".
    """

    places: Sequence[Sequence[str]]
    silent: Sequence[str]


async def locate(repository: NodeRepository, keys: Sequence[BlobKey]) -> Located:
    """Ask this node's tiers, its peers and the store at once."""
    tiers, uploads = repository.tiers, repository.uploads
    found = [["memory"] * (key in tiers.memory) + ["uploading"] * (key in uploads) for key in keys]
    if tiers.disk is not None:
        _note(found, "disk", await tiers.disk.has(keys))
    remotes = [(f"peer:{peer.name}", peer) for peer in repository.peers.all]
    if repository.store is not None:
        remotes.append(("store", repository.store))
    answers = await asyncio.gather(*(_ask(remote, keys) for _, remote in remotes))
    silent = []
    for (name, _), held in zip(remotes, answers, strict=True):
        if held is None:
            silent.append(name)
        else:
            _note(found, name, held)
    return Located(found, silent)


def _note(found: Sequence[list[str]], place: str, held: Sequence[bool]) -> None:
    for places, there in zip(found, held, strict=True):
        if there:
            places.append(place)


async def _ask(remote: Remote, keys: Sequence[BlobKey]) -> Sequence[bool] | None:
    try:
        async with remote.asking():
            return await remote.client.has(keys, timeout_s=LOCATE_TIMEOUT_S)
    except FerryError:
        return None
