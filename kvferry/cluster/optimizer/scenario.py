"""Scenario files of ``kvferry policy simulate``: machines, links, a model, requests. Strict.

See deploy/scenarios/ for examples that say what each key means.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvferry.cluster.curves import check_curve
from kvferry.cluster.optimizer.holder import Range
from kvferry.cluster.optimizer.scenario_values import (
    NAME,
    known_keys,
    number,
    numbers,
    span,
    table_of,
    tables_of,
)
from kvferry.errors import ConfigError, ProtocolError
from kvferry.proto.v1 import coordinator_pb2 as pb

MAX_BYTES = 1 << 20
MAX_MACHINES = 1000
MAX_REQUESTS = 100_000
MAX_EVENTS = 1000
MODEL_ID = bytes(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A node. Rates of prefill and of decoding blobs are for its part of the model."""

    name: str
    kind: str
    layers: Range
    heads: Range
    bytes_per_s: float
    latency_s: float = 0.001
    prefill_tokens_per_s: float = 100.0
    decode_tokens_per_s: float = 0.0
    memory_used_share: float = 0.5
    jitter: float = 0.1


@dataclass(frozen=True, slots=True)
class Change:
    """From ``at_s`` on, machines named ``machine`` (or of that kind) are otherwise."""

    at_s: float
    machine: str
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests: turns of conversations, some far more popular than others."""

    seconds: float = 600.0
    requests_per_s: float = 1.0
    conversations: int = 50
    popularity: float = 1.1
    prompt_tokens: int = 2000
    turn_tokens: int = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """All of a file.

    Attributes:
        policy: a built-in policy's name, or a policy file beside the scenario.
        decide_every_s: how often the coordinator looks in the simulation.
    """

    name: str
    curve: pb.ModelCurve
    machines: tuple[Machine, ...]
    trace: Trace
    changes: tuple[Change, ...] = ()
    policy: str = "default"
    seed: int = 0
    decide_every_s: float = 10.0


_TOP = ("name", "policy", "seed", "decide_every_s", "model", "machines", "events", "trace")
_CHANGEABLE = ("bytes_per_s", "latency_s", "memory_used_share", "decode_tokens_per_s")
_RATES = (*_CHANGEABLE, "prefill_tokens_per_s", "jitter")


def load_scenario(
    path: Path, calibration: Callable[[Path], pb.ModelCurve] | None = None
) -> Scenario:
    """Read a scenario.

    Args:
        calibration: reads the curve of a calibration folder that the file names.
    Raises: ConfigError that names file, field and what is allowed.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConfigError("scenario", str(path), f"at most {MAX_BYTES:,} bytes long")
        table = tomllib.loads(raw.decode())
    except OSError as exc:
        raise ConfigError("scenario", str(path), f"a readable file ({exc.strerror})") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(str(path), " ".join(str(exc).split()), "a TOML file") from exc
    try:
        return _scenario(table, path, calibration)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc.name}", exc.value, exc.allowed) from exc


def _scenario(
    table: Mapping[str, Any], path: Path, calibration: Callable[[Path], pb.ModelCurve] | None
) -> Scenario:
    known_keys(table, _TOP, "")
    curve = _curve(table_of(table, "model"), path.parent, calibration)
    machines = _machines(table.get("machines", []), curve)
    trace = _trace(table_of(table, "trace"))
    names = {m.name for m in machines} | {m.kind for m in machines}
    policy = table.get("policy", "default")
    if not isinstance(policy, str):
        raise ConfigError("policy", policy, "a built-in policy's name, or a policy file")
    beside = path.parent / policy
    return Scenario(
        name=str(table.get("name", path.stem)),
        curve=curve,
        machines=machines,
        trace=trace,
        changes=_changes(table.get("events", []), names),
        policy=str(beside) if beside.is_file() else policy,
        seed=int(number(table, "seed", 0, "", 0, 1 << 32)),
        decide_every_s=number(table, "decide_every_s", 10.0, "", 0.1, 3600),
    )


def _curve(
    table: Mapping[str, Any],
    folder: Path,
    calibration: Callable[[Path], pb.ModelCurve] | None,
) -> pb.ModelCurve:
    if "calibration" in table:
        known_keys(table, ("calibration",), "model.")
        if calibration is None or not isinstance(table["calibration"], str):
            raise ConfigError("model.calibration", table["calibration"], "a calibration's folder")
        return calibration(folder / Path(table["calibration"]).expanduser())
    known_keys(table, ("layers", "heads", "steps", "measured_kl", "groups"), "model.")
    steps = numbers(table.get("steps"), "model.steps")
    layers = int(number(table, "layers", 0, "model.", 1, 65_536))
    curve = pb.ModelCurve(
        model_id=MODEL_ID,
        model_layers=layers,
        model_heads=int(number(table, "heads", 1, "model.", 1, 65_536)),
        steps=steps,
        measured_kl=numbers(table.get("measured_kl", []), "model.measured_kl"),
    )
    for place, entry in enumerate(tables_of(table.get("groups", []), "model.groups")):
        _add_groups(curve, entry, f"model.groups[{place}].")
    try:
        check_curve(curve)
    except ProtocolError as exc:
        raise ConfigError("model", f"{len(curve.groups)} groups", f"a curve ({exc})") from exc
    return curve


def _add_groups(curve: pb.ModelCurve, entry: Mapping[str, Any], where: str) -> None:
    """One table; ``cut`` in so many groups that are alike."""
    known_keys(entry, ("layers", "cut", "width", "bits_per_value", "kl"), where)
    start, end = span(entry.get("layers"), f"{where}layers")
    count = int(number(entry, "cut", 1, where, 1, end - start))
    width = int(number(entry, "width", 0, where, count, 1 << 30)) // count
    bits = numbers(entry.get("bits_per_value"), f"{where}bits_per_value")
    kl = numbers(entry.get("kl"), f"{where}kl")
    for place in range(count):
        curve.groups.add(
            layer_start=start + place * (end - start) // count,
            layer_end=start + (place + 1) * (end - start) // count,
            width=width,
            bits_per_token=[width * value for value in bits],
            kl=[value / count for value in kl],
        )


def _machines(value: object, curve: pb.ModelCurve) -> tuple[Machine, ...]:
    found: list[Machine] = []
    for place, entry in enumerate(tables_of(value, "machines")):
        where = f"machines[{place}]."
        known_keys(entry, ("name", "count", "layers", "heads", *_RATES), where)
        kind = entry.get("name", f"m{place}")
        if not isinstance(kind, str) or not NAME.fullmatch(kind):
            raise ConfigError(f"{where}name", kind, "a name without spaces")
        layers = span(entry.get("layers", f"0-{curve.model_layers}"), f"{where}layers")
        heads = span(entry.get("heads", f"0-{curve.model_heads}"), f"{where}heads")
        if layers[1] > curve.model_layers or heads[1] > curve.model_heads:
            raise ConfigError(f"{where}layers", entry.get("layers"), "within the model")
        if "bytes_per_s" not in entry:
            raise ConfigError(f"{where}bytes_per_s", "", "given: of its link to the store")
        count = int(number(entry, "count", 1, where, 1, MAX_MACHINES))
        rates = {name: _rate(entry, name, where) for name in _RATES if name in entry}
        for which in range(1, count + 1):
            name = kind if count == 1 else f"{kind}-{which}"
            found.append(Machine(name=name, kind=kind, layers=layers, heads=heads, **rates))
    if not 1 <= len(found) <= MAX_MACHINES:
        raise ConfigError("machines", len(found), f"1 to {MAX_MACHINES} machines")
    if len({machine.name for machine in found}) < len(found):
        raise ConfigError("machines", "two of one name", "machines with names of their own")
    return tuple(found)


def _changes(value: object, names: set[str]) -> tuple[Change, ...]:
    found = []
    for place, entry in enumerate(tables_of(value, "events")):
        where = f"events[{place}]."
        known_keys(entry, ("at_s", "machine", *_CHANGEABLE), where)
        if entry.get("machine") not in names:
            raise ConfigError(f"{where}machine", entry.get("machine", ""), "one of the machines")
        values = {name: _rate(entry, name, where) for name in _CHANGEABLE if name in entry}
        at_s = number(entry, "at_s", 0, where, 0, 1e6)
        found.append(Change(at_s, str(entry["machine"]), values))
    if len(found) > MAX_EVENTS:
        raise ConfigError("events", len(found), f"at most {MAX_EVENTS}")
    return tuple(sorted(found, key=lambda change: change.at_s))


def _trace(table: Mapping[str, Any]) -> Trace:
    known_keys(table, tuple(Trace.__dataclass_fields__), "trace.")
    limits = {
        "seconds": (1, 1e6),
        "requests_per_s": (1e-6, 1e5),
        "conversations": (1, 1_000_000),
        "popularity": (0, 5),
        "prompt_tokens": (1, 1 << 20),
        "turn_tokens": (1, 1 << 20),
    }
    values = {name: number(table, name, 0, "trace.", *limits[name]) for name in table}
    for name in ("conversations", "prompt_tokens", "turn_tokens"):
        if name in values:
            values[name] = int(values[name])
    trace = Trace(**values)  # type: ignore[arg-type]
    if trace.seconds * trace.requests_per_s > MAX_REQUESTS:
        count = trace.seconds * trace.requests_per_s
        raise ConfigError("trace.requests_per_s", count, f"at most {MAX_REQUESTS:,} in all")
    return trace


def _rate(entry: Mapping[str, Any], name: str, where: str) -> float:
    shares = {"memory_used_share": 1.0, "jitter": 2.0}
    low = 0.0 if name in (*shares, "latency_s", "decode_tokens_per_s") else 1e-3
    return number(entry, name, 0.0, where, low, shares.get(name, 1e15))
