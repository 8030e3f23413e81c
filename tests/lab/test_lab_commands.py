"""``kvferry calibrate`` and ``kvferry eval`` as a user meets them, on the real model."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvferry.cli.evaluate import parse_options
from kvferry.errors import ConfigError

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Ok = Callable[..., dict[str, Any]]
CONTRACT = {
    "model", "codec", "context_tokens", "continuation_tokens", "raw_bytes_fp16", "blob_bytes",
    "compression_ratio", "bits_per_value", "kl_mean", "kl_p99", "ppl_exact", "ppl_restored",
    "ppl_delta_pct", "top1_agreement", "encode_seconds", "decode_seconds", "window_tokens",
    "tail_bytes", "ratio_with_tail", "logit_cosine", "errors",
}  # fmt: skip


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    """A text of another kind than the calibration's: this repository's licence."""
    path = tmp_path / "licence.txt"
    path.write_text((Path(__file__).parents[2] / "LICENSE").read_text())
    return path


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_default_codec_reaches_its_figures(calibrated: Path, prose: Path, ok: Ok) -> None:
    sizes = ("--context", "1024", "--continuation", "128")
    given = ("--model", "smollm2", "--text", prose, *sizes)
    found = ok("eval", *given, "--codec", "ferry", "--opt", "target_kl=0.005")
    assert set(found) >= CONTRACT
    assert (found["model"], found["codec"]) == ("smollm2", "ferry")
    assert (found["context_tokens"], found["continuation_tokens"]) == (1024, 128)
    assert found["raw_bytes_fp16"] == 2 * 1024 * 30 * 2 * 3 * 64
    assert found["compression_ratio"] == pytest.approx(
        found["raw_bytes_fp16"] / found["blob_bytes"]
    )
    # A small calibration, another domain, few tokens: the figures proper are a benchmark.
    assert found["compression_ratio"] > 10
    assert found["kl_mean"] < 0.03
    assert found["top1_agreement"] > 0.85


@pytest.mark.model
@pytest.mark.slow
def test_eight_bits_are_close_and_need_no_calibration(prose: Path, ok: Ok, tmp_path: Path) -> None:
    sizes = ("--context", "300", "--continuation", "32", "--skip-chars", "500")
    given = ("--model", "smollm2", "--text", prose, *sizes)
    found = ok("eval", *given, "--codec", "affine", "--opt", "bits=8", "--greedy", "3")
    assert (found["greedy_tokens"], found["token_match"]) == (3, 1.0)
    assert all(0 < found["errors"][name]["relative"] < 0.02 for name in ("k", "v"))
    assert len(found["errors"]["k"]["relative_by_layer"]) == 30
    assert found["logit_cosine"] > 0.999
    assert 1.7 < found["compression_ratio"] < 2.0
    assert found["kl_mean"] < 0.001


@pytest.mark.model
@pytest.mark.timeout(600)
def test_a_calibration_is_made_once(calibrated: Path, ok: Ok) -> None:
    found = ok("calibrate", "--model", "smollm2", "--if-missing")
    assert found["made"] is False
    assert Path(found["folder"]).is_relative_to(calibrated)


@pytest.mark.model
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--codec", "nonsense"], 2, "nonsense"),
        (["--codec", "affine", "--opt", "bits"], 2, "NAME=VALUE"),
        (["--codec", "affine", "--opt", "bits=5"], 2, "bits"),
        (["--codec", "raw", "--context", "0"], 2, "context"),
        (["--codec", "raw", "--context", "900000"], 1, "tokens"),
        (["--codec", "ferry", "--calibration", "/no/such/folder"], 2, "calibrat"),
        (["--codec", "raw", "--text", "/no/such/text"], 1, "/no/such/text"),
        (["--codec", "raw", "--model", "/no/such/model"], 1, "/no/such/model"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    prose: Path, kvferry: Run, arguments: list[str], code: int, says: str
) -> None:
    given = ["eval", "--model", "smollm2", "--text", str(prose), *arguments]
    done = kvferry(*given)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("kvferry:")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in done.stderr


def test_options_are_names_and_values() -> None:
    assert parse_options(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    for bad in ("a", "=1", "a=", ""):
        with pytest.raises(ConfigError):
            parse_options([bad])
