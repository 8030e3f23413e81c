"""States found without the store: those nearest to the end of the caller's tokens."""

import random
from collections.abc import Sequence

from kvferry.cluster.repository import BlobInfo, CodecInfo, LookupQuery, LookupResult, StateFound
from kvferry.node.local_lookup import merge_local, with_states_of
from kvferry.proto.keys import BlobKey

ROOT = b"r" * 32
KEYS = [bytes([number]) * 32 for number in range(1, 41)]


def state(end: int, layers: tuple[int, int] = (0, 2)) -> StateFound:
    key = BlobKey("state", end.to_bytes(32, "big"), layers, (0, 1), "zstd.1-0123456789abcdef")
    pages = end // 256
    info = BlobInfo(
        key=key,
        size=10,
        codec=CodecInfo(name="zstd", version=1),
        model_id=b"m" * 32,
        previous_key=[ROOT, *KEYS][pages],
        tokens=(256 * pages, end),
        layers=layers,
        heads=(0, 1),
        model_layers=2,
        model_heads=1,
    )
    return StateFound(key=key.page_key, pages=pages, tokens=end - 256 * pages, blobs=[info])


def ends(states: Sequence[StateFound]) -> list[int]:
    return [found.blobs[0].tokens[1] for found in states]


def test_the_last_of_many_turns_are_listed_whoever_has_them() -> None:
    turns = [10 + 100 * number for number in range(100)]
    random.Random(3).shuffle(turns)
    parts = [
        LookupResult(pages=[], states=[state(end) for end in turns[:60]]),
        LookupResult(pages=[], states=[state(end) for end in turns[60:]]),
    ]
    query = LookupQuery(root=ROOT, page_keys=KEYS, states=(0, 2), tokens=7_015)
    found = merge_local(parts, query).states
    assert ends(found) == [end for end in sorted(turns, reverse=True) if end <= 7_015]


def test_halves_of_two_nodes_are_a_whole_state() -> None:
    halves = [LookupResult(pages=[], states=[state(300, part)]) for part in ((0, 1), (1, 2))]
    query = LookupQuery(root=ROOT, page_keys=KEYS, states=(0, 2))
    assert len(merge_local(halves, query).states[0].blobs) == 2
    assert not merge_local(halves[:1], query).states


def test_states_of_two_lookups_are_each_there_once() -> None:
    store = LookupResult(pages=[], states=[state(300), state(200)])
    here = LookupResult(pages=[[]], states=[state(400), state(300)])
    both = with_states_of(here, store)
    assert ends(both.states) == [400, 300, 200]
    assert both.complete_pages == 1
