"""``kvferry experiment``: everything a TOML file asks for, one JSON a run, and a report."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.interrupt import INTERRUPTED, stop_signals
from kvferry.cli.lab_input import check_output
from kvferry.cli.output import JsonOption, progress, write_json
from kvferry.errors import ConfigError

if TYPE_CHECKING:
    from kvferry.codec.lab.experiment.bench import Bench
    from kvferry.codec.lab.experiment.plan import Plan
    from kvferry.codec.lab.experiment.runner import Outcome
    from kvferry.codec.mlx.load import LoadedModel

    Opened = Callable[[str], tuple[LoadedModel, bytes]]

DEFAULT_OUT = Path("benchmarks/results/experiments")
_SCALE = 1000.0


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(experiment)


def experiment(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE.toml", help="What to measure; see benchmarks/runbook.md."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where results lie, one JSON a run.")
    ] = DEFAULT_OUT,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="Then build a report from all results in --out."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="In place of the file's: smollm2, a folder, or a hub id.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew what is there already.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Measure codecs as TOML files say; what is there already is not measured again.

    Every run writes one JSON. Ctrl-C stops after the run that is being
    measured; the same command goes on from there. With --report and no
    FILE nothing is measured.
    """
    if not files and report is None:
        raise ConfigError("FILE.toml", "nothing", "given, or --report to build a report alone")
    if report is not None and not (files and report.absolute().parent == out.absolute()):
        check_output("--report", report)
    outcomes: list[Outcome] = []
    if files:
        from kvferry.codec.mlx.openblas import ensure_openblas

        ensure_openblas()
        from kvferry.cli.experiment_calibrations import make_calibrations
        from kvferry.cli.lab_input import open_model
        from kvferry.codec.lab.experiment.plan import load_plan

        plans = [load_plan(file, model) for file in files]
        _writable(out)
        if report is not None:  # it may lie in there
            check_output("--report", report)
        opened = cache(open_model)  # files of one model share it
        for plan in plans:
            make_calibrations(plan, out)
        for plan in plans:
            outcomes.append(_run(plan, out, again, opened))
            if outcomes[-1].stopped:
                break
    if json is not None:
        write_json(_told(outcomes, out), json)
    if json != "-":
        for file, outcome in zip(files or (), outcomes, strict=False):
            typer.echo(f"{file.name}: {outcome.described()}: {out}")
    if report is not None:
        from kvferry.codec.lab.experiment.report import build_report
        from kvferry.codec.lab.experiment.results import load_results

        results = load_results(out)
        if not results:
            allowed = "a folder with results, which `kvferry experiment FILE.toml` writes"
            raise ConfigError("--out", str(out), allowed)
        build_report(results, report, model)
        if json != "-":
            typer.echo(f"{report}: built")
    failed = [result for outcome in outcomes for result in outcome.failed]
    for result in failed:
        typer.echo(f"kvferry: {result.run.described()}: {result.problem}", err=True)
    if any(outcome.stopped for outcome in outcomes):
        typer.echo("kvferry: stopped; the same command goes on from there", err=True)
        raise typer.Exit(INTERRUPTED)
    if failed:
        raise typer.Exit(1)


def _run(plan: "Plan", out: Path, again: bool, opened: "Opened") -> "Outcome":
    from kvferry.codec.lab.experiment.runner import run_all

    with stop_signals() as stopping, progress(f"measuring {plan.path.name}", _SCALE) as bar:
        bench = _bench(plan, out, *opened(plan.model))

        def report(share: float, note: str) -> None:
            bar.update(_SCALE * share, note)

        return run_all(plan.runs, bench, out, report, again=again, stopping=stopping)


def _bench(plan: "Plan", out: Path, loaded: "LoadedModel", identity: bytes) -> "Bench":
    from kvferry.cli.experiment_calibrations import calibration_folder
    from kvferry.cli.lab_input import calibration_of
    from kvferry.codec.lab.experiment.bench import Bench, KnownCalibration
    from kvferry.codec.lab.experiment.spec import CodecSpec
    from kvferry.codec.lab.experiment.texts import tokens_of
    from kvferry.codec.mlx.probe import describe

    @cache
    def found(name: str, calibration: str) -> KnownCalibration:
        return calibration_of(name, calibration_folder(plan, name, calibration, out), identity)

    def known(codec: CodecSpec) -> KnownCalibration:
        return found(codec.name, codec.calibration)

    texts = {
        name: cache(partial(tokens_of, name, plan.path.parent, loaded.tokenizer))
        for name in plan.texts
    }
    shape = describe(loaded.model, loaded.config)
    return Bench(loaded, identity, shape, texts, known)


def _writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".kvferry-probe"
        probe.touch()
        probe.unlink()
    except OSError as exc:
        raise ConfigError("--out", str(out), f"a folder to write in ({exc.strerror})") from exc


def _told(outcomes: "list[Outcome]", out: Path) -> dict[str, object]:
    results = [result for outcome in outcomes for result in outcome.results]
    return {
        "folder": str(out),
        "measured": sum(not result.problem for result in results),
        "stopped": any(outcome.stopped for outcome in outcomes),
        "skipped": sum(outcome.skipped for outcome in outcomes),
        "failed": sum(len(outcome.failed) for outcome in outcomes),
        "results": [
            {
                "file": result.file_name,
                "status": result.status.value,
                "run": result.run.to_json(),
                "problem": result.problem,
            }
            for result in results
        ],
    }
