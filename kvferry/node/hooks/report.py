"""What a restore did."""

from collections.abc import Mapping
from dataclasses import dataclass, field


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
