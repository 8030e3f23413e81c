"""``kvferry bench cluster``: what a cluster does on one machine, against what it should."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Annotated

import typer

from kvferry.cli.output import Bar, JsonOption
from kvferry.errors import ConfigError, FerryError

SOAK, SOAK_MINUTES = "soak", 30.0


@dataclass(frozen=True, slots=True)
class Target:
    """A figure, and the least (``at_most`` False) or most that it should be.

    ``unless``: name of a finding under which it cannot be reached on this machine.
    """

    name: str
    bound: float
    at_most: bool = False
    unless: str = ""

    def met(self, value: float) -> bool:
        """Whether a measured value holds."""
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"


# Module of `cluster_bench` -> what its `measure` should find (issue's and design's table).
PARTS: Mapping[str, Sequence[Target]] = {
    "policy": [Target("policy_ms", 50, at_most=True)],
    "transfer": [
        Target("put_ratio", 0.4),
        Target("get_ratio", 0.4),
        Target("put_tls_ratio", 0.3),
        Target("get_tls_ratio", 0.3),
    ],
    "lookup": [Target("lookup_p99_ms", 5, at_most=True)],
    "failover": [Target("failover_s", 5, at_most=True)],
    "store_scaling": [Target("store_scaling", 1.6, unless="store_cpu_bound")],
    "peers": [Target("peers_ratio", 2.5)],
    SOAK: [
        Target("wrong_bytes", 0, at_most=True),
        Target("lost_blobs", 0, at_most=True),
        Target("memory_growth_pct", 10, at_most=True),
    ],
}


def run_part(
    name: str, soak_minutes: float, on_share: Callable[[float], None]
) -> dict[str, object]:
    """Measure one part; ``on_share`` hears how much of a long one is done, 0 to 1.

    Raises: FerryError: a server is missing, or a process failed.
    """
    module = import_module(f"kvferry.cli.cluster_bench.{name}")
    measure: Callable[..., Mapping[str, object]] = module.measure
    if name != SOAK:
        return dict(measure())
    seconds = 60 * soak_minutes
    return dict(measure(minutes=soak_minutes, on_second=lambda at: on_share(at / seconds)))


def cluster(
    part: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}; repeat. Default: all.")
    ] = None,
    soak_minutes: Annotated[
        float, typer.Option(min=0, max=1440, help="How long the soak runs; 0: leave it out.")
    ] = 0.0,
    json_file: JsonOption = None,
) -> None:
    """Policy, transfers, lookups, failover, several stores, several peers; and a soak.

    Starts its own processes, etcd among them where it is installed. What cannot be
    measured here is said so. Exit code 1 where a figure is missed.
    """
    from kvferry.cli.output import progress, write_json
    from kvferry.codec.lab.machine import load_average, machine

    if unknown := set(part or ()) - set(PARTS):
        raise ConfigError("part", sorted(unknown)[0], f"some of {', '.join(PARTS)}")
    chosen = [name for name in PARTS if (name in part if part else name != SOAK or soak_minutes)]
    result: dict[str, object] = {"load_average": load_average(), "machine": machine()}
    skipped: dict[str, str] = {}
    with progress("bench cluster", len(chosen)) as bar:
        for done, name in enumerate(chosen):
            bar.update(done, name)
            try:
                at, minutes = partial(_advance, bar, done, name), soak_minutes or SOAK_MINUTES
                result |= run_part(name, minutes, at)
            except FerryError as exc:
                skipped[name] = str(exc)
        bar.update(len(chosen))
    missed = [t.name for name in chosen if name not in skipped for t in _missed(name, result)]
    result |= {"skipped": skipped, "missed": missed}
    if json_file is not None:
        write_json(result, json_file)
    if json_file != "-":
        _show(chosen, result, skipped)
    if missed:
        raise typer.Exit(1)


def _advance(bar: Bar, done: int, note: str, share: float) -> None:
    bar.update(done + min(1.0, share), note)


def _missed(part: str, result: Mapping[str, object]) -> list[Target]:
    return [target for target in PARTS[part] if _verdict(target, result) == "missed"]


def _verdict(target: Target, result: Mapping[str, object]) -> str:
    if target.met(_number(result, target)):
        return ""
    return target.unless if result.get(target.unless) else "missed"


def _number(result: Mapping[str, object], target: Target) -> float:
    value = result[target.name]
    assert isinstance(value, int | float)  # noqa: S101 - what `measure` promises
    return value


def _show(parts: Sequence[str], result: Mapping[str, object], skipped: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "wanted", "measured", "", box=None, pad_edge=False)
    for name in parts:
        if name in skipped:
            table.add_row(name, "", "not measured", skipped[name])
            continue
        for target in PARTS[name]:
            value = f"{_number(result, target):.3g}"
            table.add_row(target.name, str(target), value, _verdict(target, result))
    Console().print(table)
