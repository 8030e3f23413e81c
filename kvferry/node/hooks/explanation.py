"""What `kvferry.node.hooks.explain` finds out about a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvferry.cluster.repository import BlobInfo
from kvferry.node.hooks.gap import Gap, Range
from kvferry.node.hooks.steps import Step
from kvferry.node.hooks.worth import MARGIN, Cost


@dataclass(frozen=True, slots=True)
class Placed:
    """A blob, and where it is to be had; see `kvferry.node.locate`."""

    info: BlobInfo
    places: Sequence[str]


@dataclass(frozen=True, slots=True)
class PageReport:
    """A page of the prompt. ``gap`` None: it is complete and within reach."""

    tokens: Range
    key: bytes
    blobs: Sequence[Placed]
    gap: Gap | None = None


@dataclass(frozen=True, slots=True)
class TailReport:
    """A tail that the lookup found. ``why``: empty, or why it does not fit."""

    tokens: Range
    blobs: Sequence[Placed]
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What `explain` found.

    Attributes:
        root: of the chain of keys.
        pages: all of the prompt's, as far as they were asked for.
        states: what cannot be cut at a token, as it is at the end of its tokens.
        steps: prefixes that could be restored, of growing length.
        chosen: tokens of the one that is worth it; 0: none is.
        reason: of the loader, empty where all that could be was found.
        ends: why it ends where it does, a sentence.
        partial: the store could not be asked.
        calibrations: id -> where it is; nowhere: blobs that name it cannot be decoded.
        silent: who did not say what it holds.
        cost: what is known of links, decoding and prefill.
        wait_s: what the lookup took.
    """

    prompt_tokens: int
    page_tokens: int
    root: bytes
    pages: Sequence[PageReport]
    tails: Sequence[TailReport]
    states: Sequence[TailReport]
    steps: Sequence[Step]
    chosen: int
    reason: str
    ends: str
    partial: bool
    calibrations: Mapping[bytes, Sequence[str]]
    silent: Sequence[str]
    cost: Cost
    wait_s: float
    margin: float = MARGIN

    @property
    def whole(self) -> Step:
        """The longest prefix that is there."""
        return self.steps[-1] if self.steps else Step(0, 0, 0)
