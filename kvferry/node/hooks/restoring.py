"""One restore: load, fill, and agree with the other ranks on what all of them have.

Every rank enters the same collectives for every request, whatever failed on it. A miss
takes one, a hit two, and ranks that differ two or three more.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvferry.codec.mlx import refill
from kvferry.errors import FerryError
from kvferry.node.hooks.group import Group
from kvferry.node.hooks.loaded import Loaded
from kvferry.node.hooks.loader import Loader
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.part import Part
from kvferry.node.hooks.rates import Rate
from kvferry.node.hooks.worth import Together, Worth
from kvferry.proto.keys import Medium

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Restoring:
    """Restores of one rank. Nothing of ours that fails is raised.

    Attributes:
        loader: made anew for every restore; raises FerryError, on every rank alike, while
            the model's identity is not known.
    """

    part: Part
    group: Group
    options: HookOptions
    worth: Worth
    prefill: Rate
    loader: Callable[[], Loader]

    def ahead(self, tokens: list[int], beyond: int) -> Loaded:
        """Load, and no more: on any thread, for a rank that is alone."""
        return self._load(tokens, beyond, (), Together(self.group.all_min, self.worth.choose))

    def run(
        self,
        tokens: list[int],
        beyond: int,
        media: Sequence[Medium],
        loaded: Loaded | None = None,
    ) -> tuple[list[Any], int, Loaded]:
        """A cache, how many tokens all ranks have in theirs, and how that came.

        Args:
            loaded: what `ahead` gave for the same tokens.
        """
        if loaded is not None:
            going = loaded.tokens
        else:
            together = Together(self.group.all_min, self.worth.choose)
            loaded = self._load(tokens, beyond, media, together)
            going = together.agreed
        if not going:  # the same on every rank
            return self.part.make_cache(), 0, loaded
        mine = loaded.tokens
        if not self.part.shape.states:  # rows can be cut anywhere, states cannot
            mine = min(mine, len(tokens) - self.options.keep_last)
        cache, filled = self._filled(loaded, mine)
        everyone = [row[0] for row in loaded.timed("agree", lambda: self._everyone(filled))]
        agreed = min(everyone)
        if agreed == max(everyone):
            return cache, agreed, loaded
        if agreed < filled:
            loaded.reason = loaded.reason or "agreement"
        if self.part.shape.states:
            agreed = self.group.all_min([self._at_position(loaded, agreed)])[0]
        if not agreed:
            return self.part.make_cache(), 0, loaded
        if agreed != filled:
            cache, filled = self._filled(loaded, agreed)
        # A rank that failed to fill its cache must not go on alone: all learn of it together.
        if self.group.all_min([filled])[0] < agreed:
            return self.part.make_cache(), 0, loaded
        return cache, agreed, loaded

    def _everyone(self, filled: int) -> list[list[int]]:
        return self.group.all_values([filled])

    def _load(
        self, tokens: Sequence[int], beyond: int, media: Sequence[Medium], together: Together
    ) -> Loaded:
        try:
            loader = self.loader()
            deadline = self.prefill.seconds_for(len(tokens), self.options.max_restore_s)
            seconds = min(deadline, self.options.max_restore_s)
            limit = max(0, len(tokens) - self.options.keep_last)
            return loader.load(tokens, seconds, limit, beyond, together, media)
        except FerryError as exc:
            return Loaded(reason=exc.reason, problems=[exc.reason])
        except Exception:
            # A bug here must cost a restore, never the request; and the collectives that
            # follow must be entered on every rank.
            log.exception("restore failed")
            return Loaded(reason="bug", problems=["bug"])
        finally:
            together.settle()

    def _at_position(self, loaded: Loaded, agreed: int) -> int:
        """``agreed``, if this rank has states there or can get them; else 0."""
        if not agreed or loaded.tokens == agreed:
            return agreed
        end = time.monotonic() + self.options.max_restore_s
        try:
            found = self.loader().load_state(agreed, loaded, end)
        except Exception:
            # Collectives follow that every rank must enter.
            log.exception("no state at %d tokens", agreed)
            found = False
        return agreed if found else 0

    def _filled(self, loaded: Loaded, tokens: int) -> tuple[list[Any], int]:
        """A fresh cache, and how many tokens are in it: all of them or none."""
        cache = self.part.make_cache()
        if tokens <= 0:
            return cache, 0
        span = self.part.span
        started = time.monotonic()
        try:
            rows = [] if loaded.tensors is None else [loaded.tensors.cut_tokens((0, tokens))]
            return cache, refill.restore(
                cache,
                rows,
                span.pages[0],
                states=loaded.states.get(tokens, ()),
                state_start=span.states[0],
                tokens=tokens,
            )
        except FerryError as exc:
            loaded.reason = exc.reason
        except Exception:
            log.exception("restore failed")
            loaded.reason = "bug"
        finally:
            took = loaded.seconds.get("commit", 0.0) + time.monotonic() - started
            loaded.seconds["commit"] = took
        return self.part.make_cache(), 0
