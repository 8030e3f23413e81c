"""The report, from results alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvferry.codec.files import write_atomically
from kvferry.codec.lab.experiment.registry import KINDS
from kvferry.codec.lab.experiment.results import Result, Status
from kvferry.codec.lab.experiment.series import newest, table
from kvferry.codec.lab.experiment.targets import ELSEWHERE, targets_table
from kvferry.codec.lab.plot_style import check_matplotlib
from kvferry.errors import ConfigError

_MAX_PROBLEMS = 60


def build_report(results: Sequence[Result], path: Path, model: str | None = None) -> None:
    """Write Markdown, with pictures beside it.

    Args:
        results: oldest first; of one run only the newest counts.
        model: whose results; None: the one that most are of.
    Raises: ConfigError: nothing to report on, no matplotlib, or a file that cannot be written.
    """
    check_matplotlib()
    if not path.absolute().parent.is_dir():
        raise ConfigError("--report", str(path), "in a folder that exists")
    models = [str(result.about.get("model")) for result in results]
    if model is None and models:
        model = max(dict.fromkeys(models), key=models.count)
    own = newest([r for r, name in zip(results, models, strict=True) if name == model])
    if not own:
        allowed = "a folder with results, which `kvferry experiment FILE.toml` writes"
        raise ConfigError("--out", f"no results of {model}" if model else "no results", allowed)
    lines = _head(own, sorted(set(models) - {model}))
    lines += ["## Targets", "", *targets_table(own), "", ELSEWHERE, ""]
    for kind in KINDS.values():
        found = [result for result in own if result.run.kind == kind.name]
        lines += [f"## {kind.title}", ""]
        if found:
            lines += [*kind.section(found, path.parent), ""]
        else:
            lines += [f"Nothing of kind `{kind.name}` was measured.", ""]
    lines += _problems(own)
    text = "\n".join(lines).rstrip() + "\n"
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    try:
        write_atomically(path, text.encode())
    except OSError as exc:
        raise ConfigError("--report", str(path), f"a file to write ({exc.strerror})") from exc


def _head(own: Sequence[Result], others: Sequence[str]) -> list[str]:
    about = own[-1].about
    measured = sum(result.status is Status.MEASURED for result in own)
    minutes = sum(result.seconds for result in own) / 60
    machines = _distinct(own, "hardware")
    lines = [
        f"# All codecs on one bench: {about.get('model')}",
        "",
        "Built from the JSON of every run by `kvferry experiment --report`; do not edit. "
        "What the words mean, and how to measure again: [runbook](runbook.md).",
        "",
        f"- {len(own)} runs, {measured} of them measured, {minutes:.0f} minutes in all, "
        f"{_span(own, 'date')}.",
        f"- Weights: {', '.join(map(str, _list(about.get('weights')))) or 'unnamed'}"
        f"{_quantization(about.get('quantization'))}.",
        f"- The first {about.get('sinks')} tokens of a text and the last {about.get('window')} "
        "before its continuation are kept nearly exact by codecs that do so; the last are at 8 "
        "bits for all.",
        *(f"- Machine: {_machine(machine)}." for machine in machines),
        f"- Load average {_span(own, 'load')}: times are worth as much as the machine was quiet.",
        f"- Commits: {', '.join(map(str, _distinct(own, 'commit')))}.",
    ]
    if others:
        lines.append(f"- Not in here: results of {', '.join(others)} (`--model`).")
    return [*lines, ""]


def _problems(own: Sequence[Result]) -> list[str]:
    """What was asked for and is not to be had, one line for each codec and setting."""
    found: dict[str, list[Result]] = {}
    for result in own:
        if result.status is not Status.MEASURED:
            found.setdefault(result.run.codec.described(), []).append(result)
    if not found:
        return ["## Asked for and not to be had", "", "Nothing.", ""]
    rows = [
        (codec, ", ".join(sorted({r.run.kind for r in results})), str(len(results)), _why(results))
        for codec, results in sorted(found.items())[:_MAX_PROBLEMS]
    ]
    head = ("codec", "kind", "runs", "why")
    lines = ["## Asked for and not to be had", "", *table(head, rows), ""]
    left = len(found) - len(rows)
    return [*lines, f"And {left} more.", ""] if left > 0 else lines


def _why(results: Sequence[Result]) -> str:
    problems = list(dict.fromkeys(result.problem for result in results))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0].replace("|", "\\|") + more


def _machine(value: object) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(f"{name} {item}" for name, item in value.items())


def _distinct(own: Sequence[Result], key: str) -> list[object]:
    found: dict[str, object] = {}
    for result in own:
        found[json.dumps(result.about.get(key), sort_keys=True, default=str)] = result.about.get(
            key
        )
    return list(found.values())


def _span(own: Sequence[Result], key: str) -> str:
    found = sorted({r.about[key] for r in own if r.about.get(key) is not None}, key=str)
    if key == "load":
        numbers = [float(str(value)) for value in found]
        return f"{min(numbers, default=0):.1f} to {max(numbers, default=0):.1f}"
    days = [str(value)[:10] for value in found]
    return "" if not days else days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def _quantization(value: object) -> str:
    if not isinstance(value, Mapping):
        return ""
    stored = value.get("stored")
    told = stored if isinstance(stored, str | None) else json.dumps(stored)
    return f", stored as {told or 'they are'}, computed in {value.get('computed')}"


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else []
