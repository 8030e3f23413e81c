"""Bytes against fidelity of all lossy codecs on three texts, and what follows from it.

Prose (GPL-3), source code (grpcio's ``_channel.py``, from site-packages) and chat
(``texts/chat.txt``); none is of the calibration's source. 2048 tokens are coded, the
last 512 of those that follow the window are predicted. Runs ``kvferry plot rate`` and
reads sizes at equal KL off its points, linear between points on logarithmic axes.
Needs ``kvferry calibrate`` and ``kvferry calibrate --codec kvtc``, both with
``--tokens 16384``.
"""

import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc

from benchmarks.record import write_result

HERE = Path(__file__).parent
TEXTS = {
    "prose": Path("/usr/share/common-licenses/GPL-3"),
    "source": Path(grpc.__file__).parent / "_channel.py",
    "chat": HERE / "texts" / "chat.txt",
}
TARGETS = (0.005, 0.01, 0.02)
Points = Sequence[tuple[float, float]]


def ratio_at(points: Points, kl: float) -> float:
    """Compression ratio at a KL, between the (ratio, KL) points around it; NaN outside."""
    ordered = sorted(points, key=lambda point: point[1])
    for (low_ratio, low), (high_ratio, high) in itertools.pairwise(ordered):
        if 0 < low <= kl <= high:
            share = math.log(kl / low) / math.log(high / low) if high > low else 0.0
            return math.exp(math.log(low_ratio) + share * math.log(high_ratio / low_ratio))
    return math.nan


def summary(points: Mapping[str, Mapping[str, Points]]) -> dict[str, object]:
    """What the issue asks for, by text, with the geometric mean over texts."""
    found: dict[str, object] = {}
    for kl in TARGETS:
        ferry = {text: ratio_at(p, kl) for text, p in points["ferry"].items()}
        kvtc = {text: ratio_at(p, kl) for text, p in points["kvtc"].items()}
        found[f"ferry ratio at KL {kl}"] = with_mean(ferry)
        found[f"kvtc ratio at KL {kl}"] = with_mean(kvtc)
        found[f"kvtc bytes / ferry bytes at KL {kl}"] = with_mean(
            {text: ferry[text] / kvtc[text] for text in ferry}
        )
    four = {
        text: min(p, key=lambda point: abs(math.log(point[0] / 3.6)))
        for text, p in points["affine"].items()
    }
    found["affine 4 bit: KL"] = {text: kl for text, (_, kl) in four.items()}
    found["affine 4 bit bytes / ferry bytes at its KL"] = with_mean(
        {text: ratio_at(points["ferry"][text], kl) / ratio for text, (ratio, kl) in four.items()}
    )
    return found


def with_mean(values: Mapping[str, float]) -> dict[str, float]:
    """The values and their geometric mean."""
    mean = math.exp(sum(math.log(v) for v in values.values()) / len(values))
    return {**values, "mean": mean}


def main() -> None:
    """Measure, write the result and the picture."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rate.json"
        command = "kvferry plot rate --model smollm2 --points 8"
        for codec in ("ferry", "kvtc", "affine"):
            command += f" --codec {codec}"
        texts = [part for path in TEXTS.values() for part in ("--text", str(path))]
        picture = HERE / "codec.png"
        subprocess.run(
            [sys.executable, "-m", *command.split(), *texts, "--out", picture, "--json", out],
            check=True,
        )
        raw = json.loads(out.read_text())
    names = {path.name: name for name, path in TEXTS.items()}
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for point in raw["points"]:
        text = names.get(Path(point["text"]).name, point["text"])
        own = points.setdefault(point["codec"], {}).setdefault(text, [])
        own.append((point["compression_ratio"], point["kl_mean"]))
    figures = {"points": points, **summary(points)}
    print(write_result("codec", command + " --text PROSE --text SOURCE --text CHAT", figures))
    print(json.dumps(summary(points), indent=2))


if __name__ == "__main__":
    main()
