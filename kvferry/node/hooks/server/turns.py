"""What the server is at: which prompts were asked, and what of them was restored.

The server merges the cache it was given into a batch and takes copies of one sequence out
again, so what belongs together is known by its tokens, not by its objects.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.proto.keys import DEFAULT_PAGE_TOKENS, page_keys, root_key

MOST_TURNS = 256
MOST_PAGES = 1 << 16
_ROOT = root_key(bytes(16), bytes(32))  # never leaves this process


@dataclass(slots=True)
class Turn:
    """One request.

    Attributes:
        tokens: the whole prompt.
        cached: so many of them were in the cache when prefill began.
        began: ``time.monotonic()`` then.
        alone: no other request was served meanwhile, so that its speed says something.
    """

    tokens: list[int]
    cached: int
    began: float
    alone: bool


class Turns:
    """Requests under way. For the model's thread."""

    def __init__(self) -> None:
        self._turns: deque[Turn] = deque(maxlen=MOST_TURNS)

    def begin(self, tokens: Sequence[int], cached: int) -> None:
        """A prompt goes to the model."""
        for turn in self._turns:
            turn.alone = False
        alone = not self._turns
        self._turns.append(Turn(list(tokens), cached, time.monotonic(), alone))

    def clear(self) -> None:
        """Nothing is under way: requests that were broken off are forgotten."""
        self._turns.clear()

    def last(self) -> Turn | None:
        """The request that began last, while it is under way."""
        return self._turns[-1] if self._turns else None

    def find(self, tokens: Sequence[int]) -> tuple[str, Turn | None]:
        """("prefill" or "turn_end", request) of a cache that holds ``tokens``.

        The end of a turn takes the request off the list.
        """
        held = list(tokens)
        for turn in self._turns:
            if len(held) < len(turn.tokens) and turn.tokens[: len(held)] == held:
                return "prefill", turn
        for turn in self._turns:
            if held[: len(turn.tokens)] == turn.tokens:
                self._turns.remove(turn)
                return "turn_end", turn
        return "turn_end", None


class RestoredPages:
    """Pages that came out of the store, and are not to be coded again."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def add(self, tokens: Sequence[int], pages: int) -> None:
        """The first ``pages`` pages of ``tokens`` came out of the store."""
        for key in page_keys(_ROOT, tokens[: pages * DEFAULT_PAGE_TOKENS]):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > MOST_PAGES:
            self._keys.popitem(last=False)

    def count(self, tokens: Sequence[int]) -> int:
        """How many of the first pages of ``tokens`` did."""
        count = 0
        for key in page_keys(_ROOT, tokens) if self._keys else ():
            if key not in self._keys:
                break
            count += 1
        return count
