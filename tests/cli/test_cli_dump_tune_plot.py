"""``kvferry dump``, ``tune``, ``plot`` and ``bench codec`` as a user meets them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvferry.cli.main import main
from kvferry.codec.mlx.openblas import GUARD, model_environment

PROSE = Path(__file__).parents[2] / "LICENSE"
CODE = Path(__file__)
SHORT = ("--context", "256", "--continuation", "16")


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "kvferry", *map(str, arguments)],
        env=dict(os.environ) | model_environment(),
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def ok(*arguments: str | Path) -> dict[str, Any]:
    done = run(*arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.model
def test_dump_a_prompt_and_what_follows(tmp_path: Path) -> None:
    out = tmp_path / "cache.npz"
    found = ok(
        "dump", "--model", "smollm2", "--prompt", "The capital of France is",
        "--max-tokens", "4", "--out", out,
    )  # fmt: skip
    assert (found["prompt_tokens"], found["generated_tokens"], found["tokens"]) == (5, 4, 9)
    assert "Paris" in found["generated_text"]
    assert found["shapes"] == {"k": [30, 1, 3, 9, 64], "v": [30, 1, 3, 9, 64]}
    assert found["bytes"] == out.stat().st_size
    with np.load(out) as cache:
        assert list(cache["k"].shape) == found["shapes"]["k"]
        assert len(cache["tokens"]) == 9


@pytest.mark.model
def test_dump_a_text_without_rope(tmp_path: Path) -> None:
    out = tmp_path / "cache.safetensors"
    given = ("dump", "--model", "smollm2", "--text", PROSE, "--out", out)
    found = ok(*given, "--context", "12", "--undo-rope")
    assert found["tokens"] == 12
    assert found["rope_applied"] is False
    shown = run(*given, "--context", "12")
    assert shown.returncode == 0, shown.stderr
    assert "RoPE applied" in shown.stdout
    assert "12 tokens" in shown.stdout


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.long
def test_tune_writes_a_preset_that_eval_takes(calibrated: Path, tmp_path: Path) -> None:
    out = tmp_path / "preset.json"
    texts = ("--text", PROSE, "--text", CODE)
    found = ok("tune", "--model", "smollm2", *texts, "--max-kl", "0.05", "--out", out, *SHORT)
    assert found["codec"] == "ferry"
    assert [text["text"] for text in found["measured"]] == ["LICENSE", CODE.name]
    assert all(text["kl_mean"] <= 0.05 for text in found["measured"])
    assert found["compression_ratio"] > 5
    assert len(found["tried"]) <= 8
    assert {**found, **json.loads(out.read_text())} == found
    given = ("eval", "--model", "smollm2", "--text", PROSE, *SHORT)
    again = ok(*given, "--preset", out)
    assert again["options"] == found["options"]
    first = found["measured"][0]
    assert again["kl_mean"] == pytest.approx(first["kl_mean"], rel=1e-3)
    assert again["blob_bytes"] == first["blob_bytes"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(out.read_text()), "model_id": "00" * 32}))
    refused = run(*given, "--preset", other)
    assert refused.returncode == 2
    assert "kvferry tune" in refused.stderr


@pytest.mark.model
@pytest.mark.slow
def test_tune_needs_no_calibration_for_affine(tmp_path: Path) -> None:
    out = tmp_path / "preset.json"
    found = ok(
        "tune", "--model", "smollm2", "--text", PROSE, "--codec", "affine",
        "--max-ppl-delta", "20", "--out", out, *SHORT,
    )  # fmt: skip
    assert found["options"]["bits"] in (2, 3, 4, 8)
    assert found["bound"] == {"metric": "ppl_delta_pct", "max": 20.0}
    assert found["calibration_id"] == ""


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.long
def test_plots_are_pngs(calibrated: Path, tmp_path: Path) -> None:
    rate, layers = tmp_path / "rate.png", tmp_path / "layers.png"
    given = ("plot", "rate", "--model", "smollm2", "--text", PROSE, "--out", rate, *SHORT)
    found = ok(*given, "--codec", "affine", "--codec", "ferry", "--points", "2")
    assert [point["codec"] for point in found["points"]] == ["affine"] * 2 + ["ferry"] * 2
    assert found["points"][1]["kl_mean"] > found["points"][0]["kl_mean"]
    found = ok(
        "plot", "layers", "--model", "smollm2", "--text", PROSE, "--out", layers,
        "--no-measure", *SHORT,
    )  # fmt: skip
    assert np.shape(found["predicted_kl_per_head"]["v"]) == (30, 3)
    for path in (rate, layers):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.long
def test_bench_codec_prints_its_contract(calibrated: Path) -> None:
    found = ok("bench", "codec", "--rounds", "3", "--prefills", "1")
    for name in (
        "encode_vs_gemm", "decode_vs_gemm", "decode_tokens_per_second",
        "prefill_tokens_per_second", "decode_fp16_bytes_per_second",
    ):  # fmt: skip
        assert found[name] > 0
    assert (found["model"], found["dtype"]) == ("smollm2", "float32")
    assert found["options"] == {"target_kl": 0.005}
    assert found["machine"]["cores"] == os.cpu_count()


MODEL = ("--model", "smollm2")
TEXT = ("--text", str(PROSE))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["dump", *MODEL, *TEXT, "--out", "c.txt"], 2, ".safetensors or .npz"),
        (["dump", *MODEL, *TEXT, "--out", "no/such/c.npz"], 2, "no/such"),
        (["dump", *MODEL, *TEXT, "--prompt", "x", "--out", "c.npz"], 2, "--prompt"),
        (["dump", *MODEL, "--out", "c.npz"], 2, "--prompt"),
        (["dump", *MODEL, "--text", "/no/such/text", "--out", "c.npz"], 1, "/no/such/text"),
        (["dump", "--model", "/no/model", "--prompt", "x", "--out", "c.npz"], 1, "/no/model"),
        (["tune", *MODEL, *TEXT, "--out", "p.json"], 2, "--max-ppl-delta"),
        (["tune", *MODEL, *TEXT, "--max-kl", "0", "--out", "p.json"], 2, "above 0"),
        (["tune", *MODEL, *TEXT, "--max-kl", "nan", "--out", "p.json"], 2, "above 0"),
        (["tune", *MODEL, *TEXT, "--target-ppl-delta", "-1", "--out", "p.json"], 2, "--target-ppl"),
        (["tune", *MODEL, *TEXT, "--max-kl", "1", "--out", "no/p.json"], 2, "folder"),
        (["tune", *MODEL, *TEXT, "--max-kl", "1", "--codec", "x", "--out", "p.json"], 2, "ferry"),
        (["plot", "rate", *MODEL, *TEXT, "--out", "a.jpg"], 2, ".png"),
        (["plot", "rate", *MODEL, *TEXT, "--codec", "x", "--out", "a.png"], 2, "affine"),
        (["plot", "rate", *MODEL, *TEXT, "--json", "no/a.json", "--out", "a.png"], 2, "--json"),
        (["eval", *MODEL, *TEXT, "--json", "no/a.json"], 2, "--json"),
        (["calibrate", "--json", "no/a.json"], 2, "--json"),
        (["experiment", "a.toml", "--json", "."], 2, "--json"),
        (["experiment", "a.toml", "--report", "no/a.md"], 2, "--report"),
        (["experiment", "--report", "a.md", "--out", "no"], 2, "'no'"),
        (["plot", "layers", *MODEL, "--text", "/no/t", "--out", "a.png"], 1, "/no/t"),
        (["bench", "codec", "--dtype", "int8"], 2, "bfloat16"),
        (["bench", "codec", "--text", "/no/such/text"], 1, "/no/such/text"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    arguments: Sequence[str],
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process: refused before a model is loaded, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(GUARD, "1")  # else the process would start anew with OpenBLAS
    monkeypatch.setattr(sys, "argv", ["kvferry", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1
    assert shown[0].startswith("kvferry: ")
    assert says in shown[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tune", *MODEL, *TEXT, "--max-kl", "0.01", "--out", "p.json"], "calibrate"),
        (
            ["plot", "rate", *MODEL, *TEXT, "--codec", "kvtc", "--out", "a.png"],
            "calibrate --codec kvtc",
        ),
        (["bench", "codec"], "calibrate"),
    ],
)
def test_a_missing_calibration_says_which_command_makes_one(
    arguments: Sequence[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    done = run(*arguments, "--calibration", empty)
    assert done.returncode == 2, done.stderr
    assert f"`kvferry {says}`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.model
def test_too_short_a_text_says_how_much_is_needed(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    given = ("tune", "--model", "smollm2", "--text", short, "--codec", "affine")
    done = run(*given, "--max-kl", "1", "--out", tmp_path / "p.json")
    assert done.returncode == 1, done.stderr
    assert "short.txt gives 4 tokens where 2,689 are needed" in done.stderr
