"""Policies as TOML files: strict both ways.

name = "laptop"
when = ["after_prefill", "turn_end"]
budget_nats = 0.005       # the optimizer decides under rules with a target_kl; 0: it does not
[switch]                  # marks of memory in use at which its budget is a larger one
high_compression = 0.9
[[rules]]                 # the first rule that fits layer, model and node holds
layers = "0-14"           # half-open: 0 to 13; "20-": to the last; ["0-4", "26-30"]
codec = "affine"
options = { bits = 8 }
[[rules]]
codec = "ferry"
options = { target_kl = 0.005 }
[tail]
codec = "affine"
options = { bits = 8 }
"""

import json
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kvferry.cluster.policy_rules import (
    MAX_TTL_S,
    TRIGGERS,
    check_policy,
    check_rule,
    shown_key,
    span_text,
)
from kvferry.errors import ConfigError
from kvferry.proto.keys import MAX_LAYERS
from kvferry.proto.v1 import coordinator_pb2 as pb

MAX_FILE_BYTES = 1 << 20
DEFAULT_TTL_S = 86_400
DEFAULT_HYSTERESIS = 0.05
_POLICY_KEYS = (
    "name", "rules", "when", "tail", "accept", "idle_s", "memory_mark", "min_tokens",
    "budget_nats", "switch", "tier", "tier_trigger",
)  # fmt: skip
_RULE_KEYS = ("layers", "model", "node", "codec", "options", "decided")
_TAIL_KEYS = ("codec", "options", "ttl_s")
_SWITCH_KEYS = ("high_compression", "memory_emergency", "hysteresis")
_NUMBER = re.compile(r"(0|[1-9][0-9]{0,15})(\.[0-9]{1,16})?")
_SPAN = re.compile(r"([0-9]{1,6})(-([0-9]{1,6})?)?")


def read_policy_file(path: Path) -> bytes:
    """A policy file's bytes. Raises: ConfigError for one that is missing or too large."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise ConfigError("policy_file", str(path), f"a readable file ({exc.strerror})") from exc
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError("policy_file", str(path), f"at most {MAX_FILE_BYTES:,} bytes long")
    return raw


def load_policy(path: Path) -> pb.Policy:
    """Read a policy file; its version is 0, as only the coordinator gives versions.

    Raises: ConfigError, one line with the file, the field and what is allowed.
    """
    return parse_policy(read_policy_file(path), str(path), path.stem)


def parse_policy(raw: bytes, source: str = "policy", name: str = "policy") -> pb.Policy:
    """A policy from TOML; ``name`` is what it is called where it does not say.

    Raises: ConfigError, its field preceded by ``source``.
    """
    try:
        table = tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as exc:
        raise ConfigError(source, " ".join(str(exc).split()), "a TOML file") from exc
    try:
        policy = _policy(table, name)
        check_policy(policy)
    except ConfigError as exc:
        raise ConfigError(f"{source}: {exc.name}", exc.value, exc.allowed) from exc
    return policy


def _policy(table: Mapping[str, Any], name: str) -> pb.Policy:
    _known(table, _POLICY_KEYS, "")
    when = _texts(table.get("when", ["after_prefill", "turn_end"]), "when")
    for index, trigger in enumerate(when):
        if trigger not in TRIGGERS:
            raise ConfigError(f"when[{index}]", trigger, f"one of {', '.join(TRIGGERS)}")
    mark = _number(table.get("memory_mark", 0.85), "memory_mark", "a share above 0, at most 1")
    rules = table.get("rules", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ConfigError("rules", rules, "tables, each under [[rules]]")
    return pb.Policy(
        name=_text(table.get("name", name), "name"),
        rules=[made for i, rule in enumerate(rules) for made in _rules(rule, f"rules[{i}]")],
        when=[TRIGGERS[trigger] for trigger in when],
        tail=_tail(table.get("tail", {})),
        accept=_texts(table.get("accept", []), "accept"),
        idle_s=_whole(table.get("idle_s", 60), "idle_s", 1, 86_400),
        memory_mark=mark,
        min_tokens=_whole(table.get("min_tokens", 256), "min_tokens", 0, 1 << 31),
        budget_nats=_number(table.get("budget_nats", 0), "budget_nats", "a number of nats"),
        switch=_switch(table["switch"]) if "switch" in table else None,
        tier=_text(table.get("tier", ""), "tier"),
        tier_trigger=_flag(table.get("tier_trigger", False), "tier_trigger"),
    )


def _switch(table: object) -> pb.PressureSwitch:
    if not isinstance(table, dict):
        raise ConfigError("switch", table, "a table, under [switch]")
    _known(table, _SWITCH_KEYS, "switch.")
    given = {"hysteresis": DEFAULT_HYSTERESIS, **table}
    shares = {
        name: _number(value, f"switch.{name}", "a share of memory") for name, value in given.items()
    }
    return pb.PressureSwitch(**shares)


def _rules(table: Mapping[str, Any], where: str) -> list[pb.LayerRule]:
    """One table of a file; several ranges make several rules."""
    _known(table, _RULE_KEYS, f"{where}.")
    if "codec" not in table:
        raise ConfigError(f"{where}.codec", "", "given")
    codec = _text(table["codec"], f"{where}.codec")
    options = _options(table.get("options", {}), f"{where}.options")
    model = _text(table.get("model", ""), f"{where}.model").lower()
    node = _text(table.get("node", ""), f"{where}.node")
    decided = _flag(table.get("decided", False), f"{where}.decided")
    spans = table.get("layers", "all")
    rules = []
    for span in spans if isinstance(spans, list) else [spans]:
        start, end = _span(span, f"{where}.layers")
        rule = pb.LayerRule(
            layer_start=start,
            layer_end=end,
            codec=codec,
            options=options,
            model=model,
            node=node,
            decided=decided,
        )
        check_rule(rule, where)
        rules.append(rule)
    if not rules:
        raise ConfigError(f"{where}.layers", spans, "at least one range")
    return rules


def _span(value: object, where: str) -> tuple[int, int]:
    allowed = '"0-14" (half-open: layers 0 to 13), "20-", "7", "all" or a list of these'
    if value == "all":
        return 0, 0
    found = _SPAN.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ConfigError(where, value, allowed)
    start = int(found[1])
    end = int(found[3]) if found[3] else 0 if found[2] else start + 1
    if (end and end <= start) or (found[3] and not end) or max(start, end) > MAX_LAYERS:
        raise ConfigError(where, value, allowed)
    return start, end


def _tail(table: object) -> pb.TailRule:
    if not isinstance(table, dict):
        raise ConfigError("tail", table, "a table, under [tail]")
    _known(table, _TAIL_KEYS, "tail.")
    codec = _text(table.get("codec", "affine"), "tail.codec")
    given = table.get("options", {"bits": 8} if codec == "affine" else {})
    ttl_s = _whole(table.get("ttl_s", DEFAULT_TTL_S), "tail.ttl_s", 1, MAX_TTL_S)
    return pb.TailRule(codec=codec, options=_options(given, "tail.options"), ttl_s=ttl_s)


def _known(table: Mapping[str, Any], keys: Collection[str], prefix: str) -> None:
    for key in table:
        if key not in keys:
            allowed = f"left out: known are {', '.join(keys)}"
            raise ConfigError(f"{prefix}{shown_key(key)}", table[key], allowed)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(where, value, "text in quotes")
    return value


def _texts(value: object, where: str) -> list[str]:
    if not isinstance(value, list):
        raise ConfigError(where, value, "a list of names")
    return [_text(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _whole(value: object, where: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(where, value, f"a whole number from {low} to {high}")
    return value


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(where, value, "true or false")
    return value


def _number(value: object, where: str, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(where, value, allowed)
    try:
        return float(value)
    except OverflowError as exc:
        raise ConfigError(where, "a number of many digits", allowed) from exc


def _options(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ConfigError(where, value, "a table, as { target_kl = 0.005 }")
    options: dict[str, str] = {}
    for name, option in value.items():
        if isinstance(option, bool) or not isinstance(option, int | float | str):
            raise ConfigError(f"{where}.{shown_key(name)}", option, "a number")
        options[name] = str(option)
    return options


def dump_policy(policy: pb.Policy) -> str:
    """The policy as a file that `load_policy` reads back to an equal message (version 0)."""
    names = {number: name for name, number in TRIGGERS.items()}
    lines = [
        f"name = {json.dumps(policy.name, ensure_ascii=False)}",
        f"when = {json.dumps([names[trigger] for trigger in policy.when])}",
        f"accept = {json.dumps(list(policy.accept))}",
        f"idle_s = {policy.idle_s}",
        f"memory_mark = {policy.memory_mark!r}",
        f"min_tokens = {policy.min_tokens}",
        f"budget_nats = {policy.budget_nats!r}",
    ]
    if policy.tier:
        lines.append(f"tier = {json.dumps(policy.tier, ensure_ascii=False)}")
    if policy.tier_trigger:
        lines.append("tier_trigger = true")
    if policy.HasField("switch"):
        lines += ["", "[switch]"]
        lines += [f"{name} = {getattr(policy.switch, name)!r}" for name in _SWITCH_KEYS]
    for rule in policy.rules:
        lines += ["", "[[rules]]", f"layers = {json.dumps(span_text(rule))}"]
        if rule.model:
            lines.append(f"model = {json.dumps(rule.model)}")
        if rule.node:
            lines.append(f"node = {json.dumps(rule.node, ensure_ascii=False)}")
        if rule.decided:
            lines.append("decided = true")
        lines += [f"codec = {json.dumps(rule.codec)}", f"options = {_inline(rule.options)}"]
    tail = policy.tail
    lines += ["", "[tail]", f"codec = {json.dumps(tail.codec)}"]
    lines += [f"options = {_inline(tail.options)}", f"ttl_s = {tail.ttl_s}"]
    return "\n".join(lines) + "\n"


def _inline(options: Mapping[str, str]) -> str:
    """An inline table; numbers bare where they read back as the same text."""
    pairs = (f"{name} = {_number_or_text(value)}" for name, value in sorted(options.items()))
    inner = ", ".join(pairs)
    return f"{{ {inner} }}" if inner else "{}"


def _number_or_text(value: str) -> str:
    bare = _NUMBER.fullmatch(value) and str(json.loads(value)) == value
    return value if bare else json.dumps(value)
