"""What commands say, and where to."""

from pathlib import Path

import pytest

from kvferry.cli.evaluate import described
from kvferry.cli.output import write_json
from kvferry.errors import ConfigError

MEASURED = {
    "compression_ratio": 4.4,
    "bits_per_value": 3.6,
    "kl_mean": 0.05,
    "ppl_delta_pct": -0.8,
    "top1_agreement": 0.906,
    "encode_seconds": 0.1,
    "decode_seconds": 0.2,
}


def test_json_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--json"):
        write_json({}, str(tmp_path))


def test_eval_says_what_was_asked_for() -> None:
    assert described("streaming", {}, MEASURED) == (
        "streaming: 4.4x (3.60 bits/value), KL 0.05000, perplexity -0.80 %, same top-1 90.6 %, "
        "encode 0.10 s, decode 0.20 s"
    )
    generated = {**MEASURED, "greedy_tokens": 8, "token_match": 0.875}
    line = described("random", {"keep": "0.5", "seed": "1"}, generated)
    assert line.startswith("random keep=0.5 seed=1: ")
    assert "same 87.5 % of 8 greedy tokens" in line
