"""What a restore of a prompt would bring, where it would come from, what it would cost, and
why it ends where it does. Nothing is fetched, nothing decoded.

It asks as a restore asks: `Loader` makes the keys, the lookup and the plan, and is told to
fetch nothing; `best_step` says what would be worth it.
"""

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from kvferry.cluster.repository import BlobInfo, ListQuery, LookupQuery, LookupResult
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.state_parts import StateLayout
from kvferry.errors import CalibrationMissingError, FerryError
from kvferry.node.client import NodeClient
from kvferry.node.coding import Shard, stores
from kvferry.node.hooks.explanation import Explanation, PageReport, Placed, TailReport
from kvferry.node.hooks.gap import Gap, Range, Surroundings, gap_of
from kvferry.node.hooks.loaded import Data
from kvferry.node.hooks.loader import Loader
from kvferry.node.hooks.steps import Step
from kvferry.node.hooks.worth import Cost, best_step
from kvferry.proto.keys import BlobKey, page_keys, pages_behind_window, tail_key
from kvferry.proto.v1 import coordinator_pb2 as pb

MOST_PAGES_ASKED = 128
MOST_LISTED = 20_000
DEADLINE_S = 10.0
_IN_TAIL = Gap("in_tail", "its tokens are in the tail")


@dataclass(slots=True)
class _Asking:
    """The loader's client: remembers what the lookup gave, and what there was to choose."""

    client: NodeClient
    found: LookupResult = field(default_factory=lambda: LookupResult(pages=[]))
    steps: Sequence[Step] = ()
    wait_s: float = 0.0

    def lookup(self, query: LookupQuery) -> LookupResult:
        """Through the node."""
        self.found = self.client.lookup(query)
        return self.found

    def get_each(
        self, keys: Sequence[BlobKey], deadline_s: float
    ) -> Generator[tuple[BlobKey, Data | FerryError], None, None]:
        """Never asked: `choose` wants nothing."""
        yield from ()

    def choose(self, steps: Sequence[Step], wait_s: float, at_hand: int) -> tuple[int, int]:
        """Nothing, after a look at what there is."""
        self.steps, self.wait_s = list(steps), wait_s
        return 0, 0


class _NoCalibrations:
    def get(self, calibration_id: bytes) -> GroupCalibration:
        raise CalibrationMissingError(calibration_id.hex())

    def warm(self, calibration_id: bytes) -> None:
        raise CalibrationMissingError(calibration_id.hex())


def explain(
    client: NodeClient,
    shard: Shard,
    salt: bytes,
    policy: pb.Policy,
    tokens: Sequence[int],
    cost: Cost,
    *,
    holders: Mapping[str, Sequence[Range]],
    calibration_here: Callable[[bytes], bool] = lambda _: False,
    layout: StateLayout | None = None,
    keep_last: int = 1,
) -> Explanation:
    """Ask about one prompt.

    Args:
        shard: of this machine; all layers where the model is whole.
        tokens: the whole prompt, token ids.
        holders: node -> layers of this model that it has.
        calibration_here: whether this machine's own folder has a calibration.
        layout: of this rank's states, where the model has any.
        keep_last: tokens at the end that are never restored.
    Raises: StoreUnavailableError and other FerryErrors of the node; InvalidKeyError or
        ConfigError for tokens that are none.
    """
    root = shard.root(salt)
    asking = _Asking(client)
    accept = frozenset(policy.accept)
    loader = Loader(asking, _NoCalibrations(), shard, root, accept, {}, layout)
    limit = max(0, len(tokens) - keep_last)
    loaded = loader.load(tokens, DEADLINE_S, limit, choose=asking.choose)
    keys = page_keys(root, tokens, shard.page_tokens)
    found = asking.found
    around = Surroundings(
        model_id=shard.model_id,
        root=root,
        accept=accept,
        policy=policy.name,
        holders=holders,
        of_model=cache(lambda: _listed(client, ListQuery(model_id=shard.model_id, kind="page"))),
        others=lambda: _models(client),
    )
    beyond = [
        (index, client.list(ListQuery(page_key=key)))
        for index, key in enumerate(keys[: len(found.pages) + MOST_PAGES_ASKED])
        if index >= len(found.pages)
    ]
    short = [*(tail.blobs for tail in found.tails), *(state.blobs for state in found.states)]
    blobs = [*found.pages, *(held for _, held in beyond), *short]
    names = {b.codec.calibration_id for held in blobs for b in held} - {b""}
    wanted = [info.key for held in blobs for info in held]
    placed, silent = _locate(client, [*wanted, *(BlobKey("calibration", name) for name in names)])
    reached = asking.steps[-1].tokens if asking.steps else 0
    whole = [
        PageReport(_span(index, shard), keys[index], _placed(held, placed))
        for index, held in enumerate(found.pages)
    ]
    lacking = [
        PageReport(
            _span(index, shard),
            keys[index],
            _placed(held, placed),
            _IN_TAIL
            if _span(index, shard)[1] <= reached
            else gap_of(index, keys[index - 1] if index else root, held, around),
        )
        for index, held in beyond
    ]
    steps = asking.steps
    places = {root: 0} | {key: index + 1 for index, key in enumerate(keys)}
    tails: list[TailReport] = []
    states = []
    for state in found.states:
        start = state.pages * shard.page_tokens
        span = (start, start + state.tokens)
        fits = span[1] in {step.tokens for step in asking.steps}
        why = "" if fits else "it is of other tokens, or beyond what is restored"
        states.append(TailReport(span, _placed(state.blobs, placed), why))
    for tail in found.tails:
        previous = tail.blobs[0].previous_key
        start = places.get(previous, 0) * shard.page_tokens
        span = (start, start + tail.tokens)
        why = _other_tail(tail.tail_key, previous, span, tokens)
        tails.append(TailReport(span, _placed(tail.blobs, placed), why))
    return Explanation(
        prompt_tokens=len(tokens),
        page_tokens=shard.page_tokens,
        root=root,
        pages=[*whole, *lacking],
        tails=tails,
        states=states,
        steps=steps,
        chosen=best_step(steps, cost, asking.wait_s),
        reason="" if steps else loaded.reason,
        ends=_end(len(tokens), shard, steps, whole, lacking, tails, loaded.reason)
        + _never(policy, shard, len(tokens)),
        partial=found.partial,
        calibrations={
            name: [
                *(["this machine's folder"] if calibration_here(name) else []),
                *placed.get(BlobKey("calibration", name), ()),
            ]
            for name in sorted(names)
        },
        silent=silent,
        cost=cost,
        wait_s=asking.wait_s,
    )


def _never(policy: pb.Policy, shard: Shard, count: int) -> str:
    """Whether the policy in force would store it at all; empty: it would."""
    if not stores(policy, shard):
        return f" (and policy {policy.name!r} stores nothing of this model)"
    if count < policy.min_tokens:
        return f" (and policy {policy.name!r} stores nothing below {policy.min_tokens:,} tokens)"
    return ""


def _span(index: int, shard: Shard) -> Range:
    return index * shard.page_tokens, (index + 1) * shard.page_tokens


def _placed(held: Sequence[BlobInfo], places: Mapping[BlobKey, Sequence[str]]) -> list[Placed]:
    return [Placed(info, places.get(info.key, ())) for info in held]


def _locate(
    client: NodeClient, keys: Sequence[BlobKey]
) -> tuple[dict[BlobKey, Sequence[str]], Sequence[str]]:
    most = 4096  # of one call
    found: dict[BlobKey, Sequence[str]] = {}
    silent: set[str] = set()
    for at in range(0, len(keys), most):
        part = keys[at : at + most]
        reply = client.locate(part)
        found |= {key: list(at.places) for key, at in zip(part, reply.blobs, strict=True)}
        silent |= set(reply.silent)
    return found, sorted(silent)


def _listed(client: NodeClient, query: ListQuery) -> Sequence[BlobInfo]:
    capped = ListQuery(model_id=query.model_id, kind=query.kind, limit=MOST_LISTED)
    return client.list(capped)


def _models(client: NodeClient) -> Mapping[bytes, int]:
    counted = Counter(info.model_id for info in _listed(client, ListQuery(kind="page")))
    return dict(counted.most_common(5))


def _other_tail(key: bytes, previous: bytes, span: Range, tokens: Sequence[int]) -> str:
    if span[1] > len(tokens):
        return f"it reaches to token {span[1]:,}, beyond this prompt"
    if tail_key(previous, tokens[slice(*span)]) != key:
        return "it is of other tokens"
    return ""


def _end(
    count: int,
    shard: Shard,
    steps: Sequence[Step],
    whole: Sequence[PageReport],
    lacking: Sequence[PageReport],
    tails: Sequence[TailReport],
    reason: str,
) -> str:
    """Why a restore would end where it does."""
    reached = steps[-1].tokens if steps else 0
    if reached >= count - 1:
        return "all of the prompt is there"
    if reason == "no_state":
        return (
            "this model's recurrent state can be restored only at a position where it was "
            "stored, and none of these is on this prompt"
        )
    if shard.model_states and reached < len(whole) * shard.page_tokens:
        return f"whole pages reach to token {len(whole) * shard.page_tokens:,}, states do not"
    if reached > len(whole) * shard.page_tokens:
        return f"the stored tail ends at token {reached:,}, and the prompt goes on"
    stored_as_page = len(whole) < pages_behind_window(count, shard.page_tokens)
    if lacking and (gap := lacking[0].gap) and (gap.state != "missing" or stored_as_page):
        first, last = lacking[0].tokens
        return f"tokens {first:,}-{last - 1:,}: {gap.why}"
    rest = count - len(whole) * shard.page_tokens
    other = f" ({'; '.join(sorted({tail.why for tail in tails}))})" if tails else ""
    return (
        f"the last {rest:,} tokens are less than a page and 128 tokens: these are stored as a "
        f"tail, found only where a prompt has begun with exactly its tokens{other}"
    )
