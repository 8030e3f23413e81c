"""The whole journey, as a user runs it: one command, and what it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvferry.cli.demo.table import print_table

pytestmark = [pytest.mark.model, pytest.mark.processes, pytest.mark.slow]

# The fields that other tools read (design section 13).
FIELDS = {
    "model", "ranks", "prompt_tokens", "cold_ttft_seconds", "restored_ttft_seconds",
    "ttft_speedup", "restored_tokens", "compression_ratio", "kl_mean", "same_tokens",
    "exact_same_tokens", "reshard_restored_tokens", "store_down_ok",
}  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.long
def test_demo_restores_on_every_split_and_without_the_store(
    calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "kvferry", "demo", "--prompt-tokens", "700"]
    done = subprocess.run(
        [*command, "--max-tokens", "24", "--json", "-"],
        stdout=subprocess.PIPE,
        env=dict(os.environ),
        timeout=580,
        check=True,
    )
    result = json.loads(done.stdout)
    assert set(result) >= FIELDS
    prompt = result["prompt_tokens"]
    assert 600 <= prompt <= 800
    # All but the last token come back: pages and tail, on every split.
    assert result["restored_tokens"] == prompt - 1
    assert result["exact_restored_tokens"] == prompt - 1
    assert result["reshard_restored_tokens"] == prompt - 1
    assert result["store_down_restored_tokens"] == prompt - 1
    assert result["store_down_ok"] is True
    assert result["exact_same_tokens"] == 1.0
    assert result["same_tokens"] >= 0.8
    assert result["kl_mean"] < 0.05
    assert result["compression_ratio"] > 2
    assert [r["layers"] for r in result["reshards"]] == ["15/15", "10/20"]
    print_table(result)
    shown = capsys.readouterr().out
    assert "time to first token" in shown
    assert f"{result['ttft_speedup']:.1f}x" in shown
