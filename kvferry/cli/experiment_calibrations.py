"""Calibrations that an experiment's file wants made, by ``kvferry calibrate`` itself."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kvferry.errors import ModelError

if TYPE_CHECKING:
    from kvferry.codec.lab.experiment.plan import CalibrationSpec, Plan
    from kvferry.codec.lab.experiment.spec import CodecSpec


def make_calibrations(plan: "Plan", out: Path) -> None:
    """All that are not there yet. Raises: ModelError: one could not be made."""
    for spec in plan.calibrations:
        for codec in spec.codecs:
            folder = _folder(spec, codec, out)
            if not folder.is_dir():
                typer.echo(f"calibrating {codec} on {', '.join(spec.texts)}", err=True)
                _make(plan, spec, codec, folder)


def calibration_folder(plan: "Plan", codec: "CodecSpec", out: Path) -> Path | None:
    """Where a codec's calibration lies; None: where the user's is."""
    if not codec.calibration:
        return None
    for spec in plan.calibrations:
        if spec.name == codec.calibration:
            return _folder(spec, codec.name, out)
    return plan.path.parent / codec.calibration


def _folder(spec: "CalibrationSpec", codec: str, out: Path) -> Path:
    return out / "calibrations" / spec.folder / codec


def _make(plan: "Plan", spec: "CalibrationSpec", codec: str, folder: Path) -> None:
    from kvferry.codec.lab.experiment.texts import second_half

    texts = folder.parent / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    given = []
    for index, name in enumerate(spec.texts):
        path = texts / f"{index}.txt"
        path.write_text(second_half(name, plan.path.parent), encoding="utf-8")
        given += ["--text", str(path)]
    command = [sys.executable, "-m", "kvferry", "calibrate", "--model", plan.model]
    command += ["--codec", codec, "--tokens", str(spec.tokens), "--out", str(folder), *given]
    # Its own lines are progress, not this command's answer.
    done = subprocess.run(command, env=dict(os.environ), stdout=sys.stderr, check=False)
    if done.returncode:
        raise ModelError(f"calibration {spec.name} of {codec} was not made: see above")
