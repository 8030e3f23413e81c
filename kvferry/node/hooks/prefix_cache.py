"""Two calls for one's own generation loop: `PrefixCache.restore` and `PrefixCache.offer`.

Never slower, never wrong: a restore has a deadline derived from the predicted prefill
time, all ranks of a group act on the minimum of what each has loaded and verified, and
any failure of ours is a miss, counted by reason; the model then prefills.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Self

from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import FerryError
from kvferry.node.client import NodeClient
from kvferry.node.hooks.accounts import Accounts
from kvferry.node.hooks.current import CurrentCoding
from kvferry.node.hooks.group import Alone, Group
from kvferry.node.hooks.live import Live
from kvferry.node.hooks.loaded import Loaded
from kvferry.node.hooks.loader import Loader
from kvferry.node.hooks.offering import Came, Offering
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.part import Part
from kvferry.node.hooks.rates import Rate
from kvferry.node.hooks.report import RestoreReport
from kvferry.node.hooks.restoring import Restoring
from kvferry.node.hooks.standing import Standing
from kvferry.node.hooks.worth import Worth
from kvferry.node.offers import Offers
from kvferry.proto.keys import DEFAULT_PAGE_TOKENS, Medium
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)


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
        self._group = group or Alone()
        self._part = part = Part.of(loaded, layers, tensor, make_cache)
        self._client = NodeClient(
            self.options.socket,
            timeout_s=self.options.request_timeout_s,
            max_bytes_per_s=self.options.max_bytes_per_s,
        )
        self._prefill = Rate()
        self.worth = Worth(
            self._prefill, self.options.link_retry_s, always=self.options.always_restore
        )
        self._standing = Standing(
            self._client,
            part.loaded,
            self._group,
            part.layers,
            part.shape.all_layers,
            self.options.cache_dir,
            identified=lambda: self._current.start_warming(),
            triggered=self.trigger,
        )
        self._accounts = Accounts(self._client, self.worth, self._prefill, self.counters)
        alone = self._group.size == 1
        self._current = CurrentCoding(
            self._standing, part, self._client, self.options.cache_dir, alone=alone
        )
        self._offers = Offers(
            self._client,
            self._current.now,
            self.counters,
            self.options.busy_share,
            self.options.restart_wait_s,
        )
        self._live = Live(
            part.loaded.model,
            part.shape,
            part.specs,
            part.span.pages,
            self.options,
            self.counters,
            alone=alone,
            client=self._client,
            calibrations=lambda: self._current.calibrations,
            made=self._current.renew,
        )
        self._offering = Offering(
            part,
            self._offers,
            self._live,
            self._standing,
            self._prefill,
            self.worth,
            self.counters,
        )
        self._restoring = Restoring(
            part, self._group, self.options, self.worth, self._prefill, self._loader
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
        """Wait for model id and namespace, not for an absent daemon. In a group: a collective."""
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

    def ahead(self, tokens: Sequence[int], beyond: int = 0) -> Loaded:
        """What `restore` does before it touches the model's arrays; on any thread.

        One prompt at a time, without media, and not for ranks of a group.
        """
        return self._restoring.ahead(_listed(tokens), beyond)

    def restore(
        self,
        tokens: Sequence[int],
        *,
        beyond: int = 0,
        media: Sequence[Medium] = (),
        loaded: Loaded | None = None,
    ) -> tuple[list[Any], list[int]]:
        """The longest stored prefix of a prompt, in a fresh cache.

        Every rank calls this for every request, with the same arguments.

        Args:
            tokens: the whole prompt, token ids.
            beyond: the caller has a cache of so many of them; no more than that is a miss,
                and nothing is fetched.
            media: images and sounds in the prompt: their tokens do not tell what they are.
            loaded: what `ahead` gave for the same tokens.
        Returns:
            (cache, remaining tokens to prefill; at least ``options.keep_last``).
        """
        started = time.monotonic()
        self._live.touch()
        tokens = _listed(tokens)
        cache, agreed, loaded = self._restoring.run(tokens, beyond, media, loaded)
        pages = min(loaded.pages, agreed // DEFAULT_PAGE_TOKENS)
        self.remember(cache, agreed, pages, time.monotonic(), tokens[:agreed])
        seconds = time.monotonic() - started
        self.last_restore = self._accounts.note(
            self.model_id, len(tokens), agreed, pages, loaded, seconds
        )
        return cache, tokens[agreed:]

    def _loader(self) -> Loader:
        shard = self._part.shard(self._standing.require())
        return Loader(
            client=self._client,
            calibrations=self._current.calibrations,
            shard=shard,
            root=shard.root(self._standing.salt),
            accept=frozenset(self.policy.accept),
            rope=self._part.rope,
            layout=self._part.layout,
        )

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
        self._offering.remember(cache, Came(tokens, pages, since, ids))

    # -- offer --------------------------------------------------------------------

    def offer(
        self,
        tokens: Sequence[int],
        cache: list[Any],
        event: str = "prefill",
        *,
        lasting: bool = False,
        media: Sequence[Medium] = (),
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
            media: as for `restore`.
        Returns:
            Whether it was taken, now or for a trigger to come.
        """
        try:
            return self._offering.take(tokens, cache, event, lasting, tuple(media))
        except FerryError as exc:
            self.counters[f"drop_{exc.reason}"] += 1
        except Exception:
            log.exception("offer failed")
            self.counters["drop_bug"] += 1
        return False

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until all that was offered is in the store. False: not within the time."""
        end = time.monotonic() + timeout_s
        if not self._offers.wait(timeout_s):
            return False
        try:
            return self._client.flush(max(0.0, end - time.monotonic()))
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
        return self._live.idle(budget_s)


def _listed(tokens: Any) -> list[int]:
    """Arrays as lists of plain numbers; what is no token id is found later."""
    return list(tokens.tolist() if hasattr(tokens, "tolist") else tokens)
