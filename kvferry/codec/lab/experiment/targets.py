"""The seeds' own targets beside what was measured.

The one place that knows codecs by name: a target is a sentence about one of them.
"""

from collections.abc import Sequence

from kvferry.codec.lab.experiment.evidence import Evidence
from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.series import table
from kvferry.codec.lab.experiment.target import (
    Target,
    Value,
    at_ratio,
    found_gain,
    gain,
    mean_of,
    quotient,
    with_option,
)

# Without the first tokens, which attention leans on, whatever else is kept is as good as lost.
CONTROL = "random, 4 sinks"
ELSEWHERE = (
    "Memory and latency of `bitpack`'s live cache are targets as well: `kvferry bench bitpack`, "
    "[codec.md](codec.md)."
)


def targets_table(results: Sequence[Result]) -> list[str]:
    """Markdown."""
    evidence = Evidence(results)
    head = ("codec", "from", "wanted", "measured", "met", "why not")
    targets = [*_ferry(), *_kvtc(), *_bitpack(), *_lowrank(), *_dropping(), *_remembered()]
    return table(head, [target.row(evidence) for target in targets])


def _ferry() -> list[Target]:
    def against(kl: float) -> Value:
        return lambda e: quotient(e.ratio_at_kl("ferry", kl), e.ratio_at_kl("kvtc", kl))

    first = Target(
        codec="ferry",
        source="design 12",
        wanted="ratio at KL 0.01 >= 20",
        value=lambda e: e.ratio_at_kl("ferry", 0.01),
        low=20,
        unit="x",
    )
    return [first] + [
        Target(
            codec="ferry",
            source="design 12",
            wanted=f"bytes of `kvtc` / bytes of `ferry` at KL {kl:g} >= {least}",
            value=against(kl),
            low=least,
        )
        for kl, least in ((0.005, 3.0), (0.01, 2.5), (0.02, 1.9))
    ]


def _kvtc() -> list[Target]:
    def perplexity(ratio: float) -> Value:
        def value(e: Evidence) -> float | None:
            choose = at_ratio(ratio)
            exact = e.mean("fidelity", "kvtc", "ppl_exact", choose=choose)
            restored = e.mean("fidelity", "kvtc", "ppl_restored", choose=choose)
            return None if exact is None or restored is None else restored - exact

        return value

    def of(wanted: str, value: Value, **more: float) -> Target:
        return Target(codec="kvtc", source="seed 000", wanted=wanted, value=value, **more)  # type: ignore[arg-type]

    four = at_ratio(4.0)
    return [
        of(
            "ratio >= 3 where 4 is asked for",
            mean_of("fidelity", "kvtc", "compression_ratio", choose=four),
            low=3,
        ),
        of(
            "MSE of K < 0.1 at 4x",
            mean_of("fidelity", "kvtc", "errors", "k", "mse", choose=four),
            high=0.1,
        ),
        of(
            "MSE of V < 0.1 at 4x",
            mean_of("fidelity", "kvtc", "errors", "v", "mse", choose=four),
            high=0.1,
        ),
        of("perplexity +0.1 at most at 4x", perplexity(4.0), high=0.1),
        of("perplexity +0.5 at most at 8x", perplexity(8.0), high=0.5),
    ]


def _bitpack() -> list[Target]:
    return [target for bits in (6, 8) for target in _bitpack_of(bits)]


def _bitpack_of(bits: int) -> list[Target]:
    choose = with_option("bits", bits)
    step = 100 / (2**bits - 1)
    fine = (
        f"{2**bits} levels are {step:.1f} % of the range from minimum to maximum apart, so errors "
        f"are {step / 4:.1f} % of the range on average, and values are a small part of the range"
    )
    drift = "a free run goes another way after the first near-tie that tips over"

    def of(
        wanted: str,
        value: Value,
        low: float = float("-inf"),
        high: float = float("inf"),
        why: str = "",
    ) -> Target:
        return Target(
            codec=f"bitpack {bits} bit",
            source="seed 001",
            wanted=wanted,
            value=value,
            low=low,
            high=high,
            why=why,
        )

    def mean(*keys: str, kind: str = "fidelity", scale: float = 1.0) -> Value:
        return mean_of(kind, "bitpack", *keys, choose=choose, scale=scale)

    share = mean("encode_share_of_generation", kind="cost", scale=100)
    return [
        of("error of K < 1 %", mean("errors", "k", "relative", scale=100), high=1, why=fine),
        of("error of V < 1 %", mean("errors", "v", "relative", scale=100), high=1, why=fine),
        of("same greedy tokens > 99 %", mean("token_match", scale=100), low=99, why=drift),
        of("perplexity +2 % at most", mean("ppl_delta_pct"), high=2),
        of("2 to 4 times smaller than fp32", mean("compression_ratio", scale=2), low=2),
        of("costs < 5 % of generation", share, high=5),
    ]


def _lowrank() -> list[Target]:
    """The seed's r120 is its gentlest setting: here that of the smallest ratio."""

    def gentlest(key: str) -> Value:
        def value(e: Evidence) -> float | None:
            own = e.of("fidelity", "lowrank")
            ratios = [r.number("compression_ratio") for r in own]
            least = min((ratio for ratio in ratios if ratio is not None), default=None)
            if least is None:
                return None
            near = 1.05 * least
            return e.mean(
                "fidelity",
                "lowrank",
                key,
                choose=lambda r: (r.number("compression_ratio") or 2 * near) <= near,
            )

        return value

    return [
        Target(
            codec="lowrank",
            source="seed 002",
            wanted="gentlest setting: ratio >= 1.03",
            value=gentlest("compression_ratio"),
            low=1.03,
            unit="x",
        ),
        Target(
            codec="lowrank",
            source="seed 002",
            wanted="there, perplexity +6 % at most",
            value=gentlest("ppl_delta_pct"),
            high=6.0,
            form="+.2f",
            unit=" %",
            why="a head's values fill nearly all of its directions, so that those left out hold "
            "what V's error below says; [lowrank.md](lowrank.md) has other texts and ranks",
        ),
        Target(
            codec="lowrank",
            source="seed 002",
            wanted="needles found, less those with the exact cache >= 0 %",
            value=found_gain("lowrank", "raw"),
            low=0.0,
            form="+.1f",
            unit=" %",
        ),
    ]


def _dropping() -> list[Target]:
    """Choosing what to keep is better than chance, at equal bytes."""

    def against_chance(codec: str, ratio: float) -> Value:
        return lambda e: quotient(e.kl_at_ratio(codec, ratio), e.kl_at_ratio(CONTROL, ratio))

    return [
        Target(
            codec=codec,
            source=source,
            wanted=f"KL / KL of `{CONTROL}` at {ratio:g}x < 1",
            value=against_chance(codec, ratio),
            high=1.0,
            why="what later words need may lie anywhere, and chance keeps some of everywhere",
        )
        for codec, source in (("centroid", "seed 003"), ("streaming", "seed 004"))
        for ratio in (2.0, 4.0, 8.0)
    ]


def _remembered() -> list[Target]:
    """What the seeds are after in the end, beside dropping as much by chance."""

    def merged(loss: str) -> Value:
        def value(e: Evidence) -> float | None:
            own, chance = (
                e.mean("merging", "centroid", "points", "8", by, loss)
                for by in ("centroid", "random")
            )
            return quotient(own, chance)

        return value

    def recall(other: str) -> Target:
        return Target(
            codec="centroid",
            source="seed 003",
            wanted=f"needles found at 8x, less those of `{other}` > 0 %",
            value=found_gain("centroid", other, 8.0),
            low=1e-9,
            form="+.1f",
            unit=" %",
            why="an average of 8 tokens holds no digits: a key is found where it was not merged",
        )

    losses = {"key_loss": "keys", "value_loss": "values", "energy_loss": "attention's energy"}
    merging = [
        Target(
            codec="centroid",
            source="seed 003",
            wanted=f"loss of {name}, 8 tokens an entry / that of random groups < 1",
            value=merged(loss),
            high=1.0,
        )
        for loss, name in losses.items()
    ]
    instructions = [
        Target(
            codec="streaming",
            source="seed 004",
            wanted=f"instructions kept, {100 / ratio:.0f} % held, less `{CONTROL}`'s > 0 %",
            value=gain("instructions", "accuracy", "streaming", CONTROL, ratio),
            low=1e-9,
            form="+.1f",
            unit=" %",
            why="what was said first lies behind the 4 sinks, and is the first to go; see the "
            "run with 64 sinks",
        )
        for ratio in (1.33, 2.0)
    ]
    return [*merging, recall(CONTROL), recall("streaming"), *instructions]
