"""Calibrations that an experiment's file wants made, by ``kvferry calibrate`` itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from blake3 import blake3

from kvferry.errors import ModelError

if TYPE_CHECKING:
    from kvferry.codec.lab.experiment.plan import CalibrationSpec, Plan


def make_calibrations(plan: "Plan", out: Path) -> None:
    """All that are not there yet. Raises: ModelError: one could not be made."""
    for spec in plan.calibrations:
        for codec in spec.codecs:
            folder = _folder(plan, spec, codec, out)
            if not folder.is_dir():
                typer.echo(f"calibrating {codec} on {', '.join(spec.texts)}", err=True)
                _make(plan, spec, codec, folder)


def calibration_folder(plan: "Plan", codec: str, calibration: str, out: Path) -> Path | None:
    """Where a codec's calibration lies; None: where the user's is. Reads the texts of one
    that the file wants made."""
    if not calibration:
        return None
    for spec in plan.calibrations:
        if spec.name == calibration:
            return _folder(plan, spec, codec, out)
    return plan.path.parent / calibration


def _folder(plan: "Plan", spec: "CalibrationSpec", codec: str, out: Path) -> Path:
    """Another one if anything is changed that the calibration is made of."""
    told = [plan.model, *_texts(plan, spec)]
    name = f"{spec.folder}-{blake3(json.dumps(told).encode()).hexdigest()[:8]}"
    return out / "calibrations" / name / codec


def _texts(plan: "Plan", spec: "CalibrationSpec") -> list[str]:
    from kvferry.codec.lab.experiment.texts import second_half

    return [second_half(name, plan.path.parent) for name in spec.texts]


def _make(plan: "Plan", spec: "CalibrationSpec", codec: str, folder: Path) -> None:
    texts = folder.parent / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    given = []
    for index, text in enumerate(_texts(plan, spec)):
        path = texts / f"{index}.txt"
        path.write_text(text, encoding="utf-8")
        given += ["--text", str(path)]
    command = [sys.executable, "-m", "kvferry", "calibrate", "--model", plan.model]
    command += ["--codec", codec, "--tokens", str(spec.tokens), "--out", str(folder), *given]
    # Its own lines are progress, not this command's answer.
    done = subprocess.run(command, env=dict(os.environ), stdout=sys.stderr, check=False)
    if done.returncode:
        raise ModelError(f"calibration {spec.name} of {codec} was not made: see above")
