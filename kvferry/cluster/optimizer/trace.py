"""The requests of a scenario."""

from dataclasses import dataclass

import numpy as np

from kvferry.cluster.optimizer.scenario import Scenario


@dataclass(frozen=True, slots=True)
class Request:
    """At a time, of a conversation: so many tokens, of which the last ``new`` are new."""

    at_s: float
    conversation: int
    tokens: int
    new: int


def requests_of(scenario: Scenario) -> list[Request]:
    """The trace, the same for every run of a seed."""
    trace, rng = scenario.trace, np.random.default_rng(scenario.seed)
    weights = 1.0 / np.arange(1, trace.conversations + 1) ** trace.popularity
    weights /= weights.sum()
    first = np.maximum(1, rng.lognormal(0, 0.5, trace.conversations) * trace.prompt_tokens)
    length = first.astype(int)
    fresh = np.ones(trace.conversations, dtype=bool)
    made, at = [], 0.0
    while (at := at + rng.exponential(1 / trace.requests_per_s)) < trace.seconds:
        which = int(rng.choice(trace.conversations, p=weights))
        new = int(length[which]) if fresh[which] else int(rng.poisson(trace.turn_tokens)) + 1
        length[which] += 0 if fresh[which] else new
        fresh[which] = False
        made.append(Request(at, which, int(length[which]), new))
    return made
