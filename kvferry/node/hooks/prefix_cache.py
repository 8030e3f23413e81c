"""Two calls for one's own generation loop: `PrefixCache.restore` and `PrefixCache.offer`.

Never slower, never wrong: a restore has a deadline derived from the predicted prefill
time, all ranks of a group act on the minimum of what each has loaded and verified, and
any failure of ours is a miss, counted by reason; the model then prefills.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self
from weakref import WeakKeyDictionary

from kvferry.codec.mlx import adapters, refill
from kvferry.codec.mlx.leaves import cache_form
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.parts import length
from kvferry.codec.mlx.probe import describe, reference_model
from kvferry.codec.mlx.rope import page_ropes
from kvferry.errors import FerryError, ModelError
from kvferry.node.client import NodeClient
from kvferry.node.coding import exact
from kvferry.node.hooks.current import CurrentCoding
from kvferry.node.hooks.group import Alone, Group
from kvferry.node.hooks.live import Live
from kvferry.node.hooks.loaded import Loaded
from kvferry.node.hooks.loader import Loader
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.rates import Rate
from kvferry.node.hooks.standing import Standing
from kvferry.node.hooks.worth import Together, Worth
from kvferry.node.offers import Offer, Offers, wanted_later, wanted_now
from kvferry.proto.keys import DEFAULT_PAGE_TOKENS, token_ids
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """What the last restore did, for logs and for people.

    Attributes:
        prompt_tokens: tokens asked for.
        restored_tokens: tokens in the cache that was returned.
        restored_pages: whole pages among them, as they were stored.
        loaded_tokens: tokens that this rank had before the ranks agreed.
        reason: empty, or why not more was restored.
        bytes: bytes fetched from the node daemon.
        seconds: the whole call.
        steps: step -> seconds.
    """

    prompt_tokens: int
    restored_tokens: int
    loaded_tokens: int
    restored_pages: int = 0
    reason: str = ""
    bytes: int = 0
    seconds: float = 0.0
    steps: Mapping[str, float] = field(default_factory=dict)


class PrefixCache:
    """Prefix cache of one model, or of one rank's layers of it, behind a node daemon.

    ``restore`` and ``offer`` belong to the thread that runs the model; neither raises
    for anything that goes wrong on our side.

    Args:
        loaded: from `kvferry.codec.mlx.load.load_model`.
        options: see `HookOptions`.
        group: the ranks that share the model; alone if None.
        layers: absolute layers of this rank, half-open; all if None.
        tensor: rank among those that share every layer, and how many these are.
        make_cache: an empty cache of the local layers; ``make_prompt_cache`` if None.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        options: HookOptions | None = None,
        *,
        group: Group | None = None,
        layers: tuple[int, int] | None = None,
        tensor: tuple[int, int] = (0, 1),
        make_cache: Callable[[], list[Any]] | None = None,
    ) -> None:
        self.options = options or HookOptions()
        self.counters: Counter[str] = Counter()
        self.last_restore: RestoreReport | None = None
        self._loaded, self._group = loaded, group or Alone()
        reference = reference_model(loaded)
        self._shape = describe(reference, loaded.config)
        self._tensor = self._shape.tensor_part(*tensor)
        self._span = self._shape.span(layers or (0, self._shape.all_layers))
        self._make_cache = make_cache or _prompt_cache_maker(loaded.model)
        self._form = cache_form(self._make_cache())
        if self._form:  # decides the numbers, and so belongs to the model's identity
            loaded = replace(loaded, config={**loaded.config, "kvferry_cache": self._form})
        specs = page_ropes(reference, self._shape.page_layers)
        self._rope = {layer: specs[layer].fingerprint() for layer in range(*self._span.pages)}
        self._client = NodeClient(
            self.options.socket,
            timeout_s=self.options.request_timeout_s,
            max_bytes_per_s=self.options.max_bytes_per_s,
        )
        self._restored: WeakKeyDictionary[Any, _Restored] = WeakKeyDictionary()
        self._prefill = Rate()
        self.worth = Worth(
            self._prefill, self.options.link_retry_s, always=self.options.always_restore
        )
        self._standing = Standing(
            self._client,
            loaded,
            self._group,
            layers or (0, self._shape.all_layers),
            self._shape.all_layers,
            self.options.cache_dir,
            identified=lambda: self._current.start_warming(),
            triggered=self.trigger,
        )
        alone = self._group.size == 1
        self._current = CurrentCoding(
            self._standing,
            self._shape,
            self._span,
            self._tensor,
            self._client,
            self.options.cache_dir,
            alone=alone,
        )
        self._offers = Offers(
            self._client, self._current.now, self.counters, self.options.busy_share
        )
        self._live = Live(
            loaded.model,
            self._shape,
            specs,
            self._span.pages,
            self.options,
            self.counters,
            alone=alone,
            client=self._client,
            calibrations=lambda: self._current.calibrations,
            made=self._current.renew,
        )
        self._standing.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hand over what is still queued, then let go of the daemon."""
        self._live.close(self.options.close_timeout_s)
        self._offers.close(self.options.close_timeout_s)
        self._client.close()

    def ready(self, timeout_s: float = 60.0) -> bool:
        """Wait until model id and namespace are known. With a group: a collective."""
        self._standing.wait(timeout_s)
        self._current.wait_warm(timeout_s)
        return self._standing.known

    def throttle(self, max_bytes_per_s: float) -> None:
        """Change `HookOptions.max_bytes_per_s` from now on; 0: as fast as it goes."""
        self._client.throttle.bytes_per_s = max_bytes_per_s

    @property
    def policy(self) -> pb.Policy:
        """The policy in force on this node."""
        return self._standing.policy

    @property
    def model_id(self) -> bytes | None:
        """The agreed model id; None until all ranks' digests are known."""
        return self._standing.model_id

    # -- restore ------------------------------------------------------------------

    def restore(self, tokens: Sequence[int], *, beyond: int = 0) -> tuple[list[Any], list[int]]:
        """The longest stored prefix of a prompt, in a fresh cache.

        Every rank calls this for every request, with the same arguments.

        Args:
            tokens: the whole prompt, token ids.
            beyond: the caller has a cache of so many of them; no more than that is a miss,
                and nothing is fetched.
        Returns:
            (cache, remaining tokens to prefill; at least ``options.keep_last``).
        """
        started = time.monotonic()
        self._live.touch()
        tokens = _listed(tokens)
        loaded = self._load(tokens, beyond)
        cache = self._make_cache()
        limit = max(0, len(tokens) - self.options.keep_last)
        # States stand at their position or nowhere: rows can be cut to any.
        mine = loaded.tokens if self._shape.states else min(loaded.tokens, limit)
        agreeing = time.monotonic()
        agreed = self._group.all_min([mine])[0]
        loaded.seconds["agree"] = time.monotonic() - agreeing
        if agreed < mine:
            loaded.reason = loaded.reason or "agreement"
        if self._shape.states:
            agreed = self._group.all_min([self._at_position(loaded, agreed)])[0]
        committed = self._commit(cache, loaded, agreed)
        # A rank that failed to commit must not go on alone: all learn of it together.
        if self._group.size > 1 and agreed:
            committed = self._group.all_min([committed])[0]
        if committed < agreed:
            cache, agreed = self._make_cache(), 0
        pages = min(loaded.pages, agreed // DEFAULT_PAGE_TOKENS)
        self.remember(cache, agreed, pages, time.monotonic(), tokens[:agreed])
        self._finish(tokens, agreed, pages, loaded, time.monotonic() - started)
        return cache, tokens[agreed:]

    def _load(self, tokens: list[int], beyond: int) -> Loaded:
        together = Together(self._group.all_min, self.worth.choose)
        try:
            loader = self._loader()
            deadline = self._prefill.seconds_for(len(tokens), self.options.max_restore_s)
            seconds = min(deadline, self.options.max_restore_s)
            limit = max(0, len(tokens) - self.options.keep_last)
            return loader.load(tokens, seconds, limit, beyond, together)
        except FerryError as exc:
            return Loaded(reason=exc.reason, problems=[exc.reason])
        except Exception:
            # A bug here must cost a restore, never the request; and the collectives that
            # follow must be entered on every rank.
            log.exception("restore failed")
            return Loaded(reason="bug", problems=["bug"])
        finally:
            together.settle()

    def _loader(self) -> Loader:
        shard = self._current.shard(self._standing.require())
        return Loader(
            client=self._client,
            calibrations=self._current.calibrations,
            shard=shard,
            root=shard.root(self._standing.salt),
            accept=frozenset(self.policy.accept),
            rope=self._rope,
        )

    def _at_position(self, loaded: Loaded, agreed: int) -> int:
        """``agreed``, if this rank has states there or can get them; else 0."""
        if not agreed or loaded.tokens == agreed:
            return agreed
        end = time.monotonic() + self.options.max_restore_s
        try:
            found = self._loader().load_state(agreed, loaded, end)
        except Exception:
            # Collectives follow that every rank must enter.
            log.exception("no state at %d tokens", agreed)
            found = False
        return agreed if found else 0

    def _commit(self, cache: list[Any], loaded: Loaded, agreed: int) -> int:
        if not agreed:
            return 0
        started = time.monotonic()
        try:
            rows = [] if loaded.tensors is None else [loaded.tensors.cut_tokens((0, agreed))]
            return refill.restore(
                cache,
                rows,
                self._span.pages[0],
                states=loaded.states.get(agreed, ()),
                state_start=self._span.states[0],
                tokens=agreed,
            )
        except FerryError as exc:
            loaded.reason = exc.reason
        except Exception:
            log.exception("restore failed")
            loaded.reason = "bug"
        finally:
            loaded.seconds["commit"] = time.monotonic() - started
        return 0

    def remember(
        self,
        cache: list[Any],
        tokens: int,
        pages: int,
        since: float | None = None,
        ids: list[int] | None = None,
    ) -> None:
        """Say what of a cache came out of the store; for engines that copy what `restore` made.

        Args:
            cache: of the local layers, about to be offered.
            tokens: that were there before prefill.
            pages: whole pages of it that were restored; they are not coded again.
            since: ``time.monotonic()`` when prefill began; None: not to be measured.
            ids: those tokens, so that a cache that went on with others is noticed.
        """
        if cache:  # a rank may hold layers that need none
            self._restored[cache[0]] = _Restored(tokens, pages, since, ids)

    def _finish(
        self, tokens: list[int], restored: int, pages: int, loaded: Loaded, seconds: float
    ) -> None:
        outcome = "hit" if restored else loaded.reason or "not_stored"
        self.counters["restores" if restored else f"miss_{outcome}"] += 1
        self.last_restore = RestoreReport(
            prompt_tokens=len(tokens),
            restored_tokens=restored,
            loaded_tokens=loaded.tokens,
            restored_pages=pages,
            reason=loaded.reason,
            bytes=loaded.bytes,
            seconds=seconds,
            steps=loaded.seconds,
        )
        self.worth.learn(loaded)
        if loaded.skipped:
            self.worth.probe(self._client, loaded.skipped)
        self._client.report(
            restore=pb.RestoreReport(
                model_id=self.model_id or b"",
                tokens=restored,
                bytes=loaded.bytes,
                seconds=seconds,
                outcome="restored" if restored else outcome,
            ),
            misses=Counter(loaded.problems or ([] if restored else [outcome])),
            prefill_tokens_per_s=self._prefill.per_s or 0.0,
            decode_tokens_per_s=self.worth.cost.decode or 0.0,
        )

    # -- offer --------------------------------------------------------------------

    def offer(
        self,
        tokens: Sequence[int],
        cache: list[Any],
        event: str = "prefill",
        *,
        lasting: bool = False,
    ) -> bool:
        """Give a cache away for storing; encoding and upload happen in the background.

        Args:
            tokens: token ids that ``cache`` was filled with; more than the cache holds
                are cut off. A cache of recurrent state alone does not tell how many it
                has seen: for that these must be exactly as many. Rings and recurrent state
                come back at the position of an offer or not at all: for such models offer
                before the last tokens of a prompt are run (``keep_last`` of them).
            cache: of the local layers.
            event: "prefill" (right after prefill), "turn_end", or "prefix": the end of what
                others begin with too (a system prompt), while the prompt goes on.
            lasting: what lies behind the last page is kept when this conversation goes on,
                as it is after "prefix".
        Returns:
            Whether it was taken, now or for a trigger to come.
        """
        try:
            return self._offer(tokens, cache, event, lasting)
        except FerryError as exc:
            self.counters[f"drop_{exc.reason}"] += 1
        except Exception:
            log.exception("offer failed")
            self.counters["drop_bug"] += 1
        return False

    def _offer(self, tokens: Sequence[int], cache: list[Any], event: str, lasting: bool) -> bool:
        filled = length(cache)
        held = len(tokens) if filled is None else min(len(tokens), filled)
        ids = token_ids(tokens[:held])  # here: an array of MLX's belongs to this thread
        restored = self._restored.get(cache[0]) if cache else None
        if restored is not None and not restored.begins(ids):
            restored = None  # trimmed since, and gone on with another conversation
        if restored is not None and restored.at is not None and event == "prefill":
            self._prefill.add(held - restored.tokens, time.monotonic() - restored.at)
        policy = self.policy
        now = wanted_now(policy, event)
        if held < max(1, policy.min_tokens):
            self.counters["drop_short"] += 1
            return False
        if not now and not wanted_later(policy):
            self.counters["drop_policy"] += 1
            return False
        snapshot = adapters.snapshot(
            cache,
            held,
            self._span.pages[0],
            self._tensor.heads[0],
            latent=self._shape.latent,
            state_start=self._span.states[0],
            packed=exact(policy),
        )
        self._check(snapshot, cache)
        known = restored.tokens if restored else 0
        self._live.offered(self._standing, ids, snapshot, known)
        pages = restored.pages if restored else 0
        shared = event == "prefix"
        offer = Offer(tuple(ids), snapshot, pages, lasting or shared, shared)
        if now:
            return self._offers.submit(offer)
        self._offers.defer(offer)
        return True

    def _check(self, snapshot: adapters.CacheSnapshot, cache: list[Any]) -> None:
        """Raises: ModelError: the cache is not what the model was said to make."""
        if cache_form(cache) != self._form:
            # Its numbers are others than those of the caches that would be filled.
            raise ModelError(f"a cache of {cache_form(cache) or 'plain numbers'}: not stored")
        found = (snapshot.layers, snapshot.heads)
        wanted = (self._span.pages, self._tensor.heads)
        rows = snapshot.layers[0] < snapshot.layers[1]
        if found[0] != wanted[0] or (rows and found[1] != wanted[1]):
            raise ModelError(f"layers and heads {found} of a cache that should hold {wanted}")

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until all that was offered is in the store. False: not within the time."""
        self._offers.wait()
        try:
            return self._client.flush(timeout_s)
        except FerryError as exc:
            log.info("flush: %s", exc)
            return False

    def trigger(self) -> None:
        """Store now what waits for a moment that the policy names; memory runs short, say."""
        self.counters["triggers"] += 1
        self._offers.trigger()

    # -- calibration from live traffic ------------------------------------------------

    def idle(self, budget_s: float = 0.25) -> bool:
        """Use time in which the model has nothing to do; on the model's thread, as `restore`.

        A model without a calibration gets one from live traffic; this does one piece of
        the work that needs the model, of at most ``budget_s`` as far as can be foreseen.

        Returns: whether there is more to do now.
        """
        try:
            return self._live.idle(budget_s)
        except Exception:
            log.exception("idle work failed")
            self.counters["gather_bug"] += 1
            self._live.close(0.0)
        return False


@dataclass(frozen=True, slots=True)
class _Restored:
    """What `restore` put into a cache, and when."""

    tokens: int
    pages: int
    at: float | None
    ids: list[int] | None

    def begins(self, ids: list[int]) -> bool:
        """Whether a cache of ``ids`` still holds it; True where that is not known."""
        return self.ids is None or self.ids[: len(ids)] == ids[: self.tokens]


def _listed(tokens: Any) -> list[int]:
    """Arrays as lists of plain numbers; what is no token id is found later."""
    return list(tokens.tolist() if hasattr(tokens, "tolist") else tokens)


def _prompt_cache_maker(model: Any) -> Callable[[], list[Any]]:
    from mlx_lm.models.cache import make_prompt_cache

    return lambda: list(make_prompt_cache(model))
