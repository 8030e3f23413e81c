"""Which policies can hold: codecs, options, triggers and bounds."""

import re
from collections.abc import Callable, Mapping

from kvferry.errors import ConfigError
from kvferry.proto.keys import MAX_LAYERS
from kvferry.proto.v1 import coordinator_pb2 as pb

TRIGGERS: Mapping[str, "pb.Trigger.ValueType"] = {
    "after_prefill": pb.TRIGGER_AFTER_PREFILL,
    "turn_end": pb.TRIGGER_TURN_END,
    "memory_pressure": pb.TRIGGER_MEMORY_PRESSURE,
    "idle": pb.TRIGGER_IDLE,
    "before_sleep": pb.TRIGGER_BEFORE_SLEEP,
}
NOT_STORED = "none"
RECOMPUTE = "recompute"
MAX_RULES = 8192
MAX_TTL_S = 10 * 365 * 86_400
MAX_BUDGET_NATS = 10.0
MAX_NODE_CHARS = 128
MAX_SPANS = 64

_NAME = re.compile(r"[\w .+-]{1,64}")
_MODEL = re.compile(r"[0-9a-fA-F]{0,64}")
_SPAN = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
_NODE = re.compile(r"[^\s\x00-\x1f\x7f]{0,128}")


def _positive(text: str) -> bool:
    try:
        return 1e-30 < float(text) < 1e30
    except ValueError:
        return False


def _adapt(text: str) -> bool:
    try:
        return 0 <= float(text) <= 2
    except ValueError:
        return False


def _whole(*allowed: int) -> Callable[[str], bool]:
    return lambda text: text in {str(number) for number in allowed}


def _among(*names: str) -> Callable[[str], bool]:
    return lambda text: text in names


def _spans(text: str) -> bool:
    spans = [part.strip() for part in text.split(",")]
    found = [_SPAN.fullmatch(span) for span in spans]
    return len(spans) <= MAX_SPANS and all(
        match and int(match[1]) < int(match[2] or int(match[1]) + 1) <= MAX_LAYERS
        for match in found
    )


def _within(low: float, high: float) -> Callable[[str], bool]:
    def holds(text: str) -> bool:
        try:
            return low <= float(text) <= high
        except ValueError:
            return False

    return holds


def _count(low: int, high: int) -> Callable[[str], bool]:
    def holds(text: str) -> bool:
        try:
            return low <= int(text) <= high
        except ValueError:
            return False

    return holds


Check = tuple[Callable[[str], bool], str]
_POSITIVE: Check = (_positive, "a number above 0")
_BITS: Check = (_whole(2, 3, 4, 8), "one of 2, 3, 4, 8")
_ADAPT: Check = (_adapt, "a number from 0 to 2")
_PAGE_SIZE: Check = (_whole(*range(16, 65)), "a whole number from 16 to 64")
_RANK: Check = (_count(1, 4096), "a whole number from 1 to 4096")
_IDENTITY: Check = (_spans, 'layers as "0-4,29" (0 to 3, and 29)')
_SWITCH: Check = (_among("true", "false", "auto"), "true, false or auto")
_LEVEL: Check = (_whole(*range(1, 23)), "a whole number from 1 to 22")

_RATIO: Check = (_within(1, 1e6), "a number from 1 to 1e+06")
_SHARE: Check = (_within(1e-6, 1), "a number from 1e-06 to 1")
_WINDOW: Check = (_count(1, 1 << 24), "a whole number from 1 to 16777216")
_FROM_0: Check = (_count(0, 1 << 24), "a whole number from 0 to 16777216")
_SINKS: Check = (_count(0, 1 << 16), "a whole number from 0 to 65536")
_SEED: Check = (_count(0, (1 << 53) - 1), "a whole number from 0 to 9007199254740991")
_POSITIONS: Check = (lambda text: text in ("contiguous", "original"), "contiguous or original")

# What the codecs of `kvferry.codec.registry` take; a test holds the two together. Not
# kvtc: it is there to be compared with, and its blobs span all layers of a model.
CODEC_OPTIONS: Mapping[str, Mapping[str, Check]] = {
    "ferry": {"target_kl": _POSITIVE, "step": _POSITIVE, "adapt": _ADAPT},
    "zstd": {"level": _LEVEL},
    "raw": {},
    "affine": {"bits": _BITS},
    "bitpack": {"bits": (_whole(6, 8), "6 or 8"), "page_size_kb": _PAGE_SIZE},
    "streaming": {
        "ratio": _RATIO,
        "window": _WINDOW,
        "sinks": _SINKS,
        "positions": _POSITIONS,
    },
    "centroid": {
        "ratio": _RATIO,
        "similarity": (_within(-1, 1), "a number from -1 to 1"),
        "window": _FROM_0,
        "init_preserve": _FROM_0,
        "flush": (_count(1, 1024), "a whole number from 1 to 1024"),
        "persistence": _FROM_0,
        "min_merge": _WINDOW,
    },
    "random": {
        "ratio": _RATIO,
        "keep": _SHARE,
        "sinks": _SINKS,
        "seed": _SEED,
        "positions": _POSITIONS,
    },
    "lowrank": {
        "rank": _RANK,
        "target": (_among("v", "k", "kv"), "v, k or kv"),
        "bits": (_whole(8, 16), "8 or 16"),
        "identity": _IDENTITY,
        "ln_nullspace": _SWITCH,
        "policy": (
            _among("default", "high_compression", "memory_emergency"),
            "default, high_compression or memory_emergency",
        ),
    },
}
# Of which at most one may be given; of ferry's, one.
_EXCLUSIVE: Mapping[str, tuple[str, str]] = {
    "ferry": ("target_kl", "step"),
    "streaming": ("ratio", "window"),
    "random": ("ratio", "keep"),
    "centroid": ("ratio", "similarity"),
}
# Codecs whose pages lack tokens: they are stored, looked at and measured, but never put
# back into a live cache by a hook.
DROPPING = ("streaming", "random", "centroid")
TAIL_CODECS = ("affine", "raw", "zstd")


def dropping_codecs(policy: pb.Policy) -> list[str]:
    """Codecs of a policy's rules whose pages no hook puts back."""
    return sorted({rule.codec for rule in policy.rules} & set(DROPPING))


def unruled() -> pb.LayerRule:
    """The rule of a layer that no rule names: exact is the one that is never wrong."""
    return pb.LayerRule(codec="zstd")


def span_text(rule: pb.LayerRule) -> str:
    """A rule's layers as files say them: "0-14" is half-open, "20-" reaches the last."""
    if not rule.layer_end:
        return f"{rule.layer_start}-" if rule.layer_start else "all"
    return f"{rule.layer_start}-{rule.layer_end}"


def shown_key(key: str) -> str:
    """A key of a file as errors show it: on one line, and not at any length."""
    return key if _NAME.fullmatch(key) else ascii(key[:64])


def check_policy(policy: pb.Policy) -> None:
    """Whether a policy can hold. Raises: ConfigError that names the field."""
    if not _NAME.fullmatch(policy.name):
        raise ConfigError("name", policy.name[:80], "1 to 64 letters, digits, spaces, . + - _")
    if len(policy.rules) > MAX_RULES:
        raise ConfigError("rules", len(policy.rules), f"at most {MAX_RULES} rules")
    for index, rule in enumerate(policy.rules):
        check_rule(rule, f"rules[{index}]")
    _check_tail(policy.tail)
    known = set(TRIGGERS.values())
    if bad := [t for t in policy.when if t not in known]:
        raise ConfigError("when", bad[0], f"some of {', '.join(TRIGGERS)}")
    if len(set(policy.when)) != len(policy.when):
        raise ConfigError("when", list(policy.when), "each trigger once")
    for name in policy.accept:
        if name not in CODEC_OPTIONS or name in DROPPING:
            usable = [codec for codec in CODEC_OPTIONS if codec not in DROPPING]
            raise ConfigError("accept", name, f"some of {', '.join(usable)}")
    if not 0 < policy.memory_mark <= 1:
        raise ConfigError("memory_mark", policy.memory_mark, "a share above 0, at most 1")
    if not 1 <= policy.idle_s <= 86_400:
        raise ConfigError("idle_s", policy.idle_s, "1 to 86400 seconds")
    if not 0 <= policy.budget_nats <= MAX_BUDGET_NATS:
        allowed = f"nats from 0 (rules stand as they are) to {MAX_BUDGET_NATS:g}"
        raise ConfigError("budget_nats", policy.budget_nats, allowed)
    _check_switch(policy.switch)
    if policy.tier_trigger and pb.TRIGGER_MEMORY_PRESSURE not in policy.when:
        raise ConfigError("tier_trigger", True, "left out: memory pressure decides it")
    if policy.tier and not _NAME.fullmatch(policy.tier):
        raise ConfigError("tier", policy.tier[:80], "left out: memory pressure decides it")


def check_rule(rule: pb.LayerRule, where: str) -> None:
    """Whether one rule can hold; ``where`` names it in errors. Raises: ConfigError."""
    codecs = (*CODEC_OPTIONS, NOT_STORED)
    if rule.codec not in codecs:
        raise ConfigError(f"{where}.codec", rule.codec, f"one of {', '.join(codecs)}")
    if rule.layer_end and rule.layer_end <= rule.layer_start:
        raise ConfigError(f"{where}.layers", span_text(rule), 'half-open, as "0-14" for 0 to 13')
    if max(rule.layer_start, rule.layer_end) > MAX_LAYERS:
        raise ConfigError(f"{where}.layers", span_text(rule), f"at most {MAX_LAYERS}")
    if not _MODEL.fullmatch(rule.model):
        raise ConfigError(f"{where}.model", rule.model[:80], "the first hex digits of a model id")
    if not _NODE.fullmatch(rule.node):
        allowed = f"a node id: at most {MAX_NODE_CHARS} characters without spaces"
        raise ConfigError(f"{where}.node", rule.node[:80], allowed)
    if rule.node and rule.codec == NOT_STORED:
        # The others would store pages that never become complete.
        raise ConfigError(f"{where}.node", rule.node, f"left out with codec {NOT_STORED!r}")
    _check_options(rule.codec, rule.options, f"{where}.options")


def _check_switch(switch: pb.PressureSwitch) -> None:
    marks = [switch.high_compression, switch.memory_emergency]
    for name, mark in zip(("high_compression", "memory_emergency"), marks, strict=True):
        if not 0 <= mark <= 1:
            raise ConfigError(f"switch.{name}", mark, "a share of memory in use, 0 for never")
    if all(marks) and marks[0] >= marks[1]:
        allowed = "above that of high_compression"
        raise ConfigError("switch.memory_emergency", marks[1], allowed)
    if not 0 <= switch.hysteresis <= 0.5:
        raise ConfigError("switch.hysteresis", switch.hysteresis, "a share from 0 to 0.5")


def _check_tail(tail: pb.TailRule) -> None:
    codecs = (*TAIL_CODECS, RECOMPUTE)
    if tail.codec not in codecs:
        raise ConfigError("tail.codec", tail.codec, f"one of {', '.join(codecs)}")
    _check_options(tail.codec, tail.options, "tail.options")
    if not 1 <= tail.ttl_s <= MAX_TTL_S:
        raise ConfigError("tail.ttl_s", tail.ttl_s, f"1 to {MAX_TTL_S} seconds")


def _check_options(codec: str, options: Mapping[str, str], where: str) -> None:
    known = CODEC_OPTIONS.get(codec, {})
    for name, text in options.items():
        if name not in known:
            allowed = f"one of {', '.join(known)}" if known else f"left out: {codec} has none"
            raise ConfigError(f"{where}.{shown_key(name)}", text, allowed)
        holds, allowed = known[name]
        if not holds(text):
            raise ConfigError(f"{where}.{name}", text, allowed)
    pair = _EXCLUSIVE.get(codec, ())
    given = sum(name in options for name in pair)
    if given > 1 or (codec == "ferry" and not given):
        raise ConfigError(where, dict(options), f"either {' or '.join(pair)}")
