"""What `bench codec` times is a page's real work, and what it prints fits together."""

from pathlib import Path

import pytest

from kvferry.codec.base import DType
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.lab.bench_codec import RUN_TOKENS, Bench
from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import ConfigError

MODEL_ID = bytes(range(32))


@pytest.fixture(scope="module")
def words() -> list[int]:
    return [ord(c) % 97 for c in Path(__file__).read_text() * 2][:RUN_TOKENS]


def bench(tiny: LoadedModel, fitted: list[GroupCalibration], dtype: DType | None = None) -> Bench:
    return Bench(
        loaded=tiny,
        model_id=MODEL_ID,
        groups=fitted,
        curve=(),
        options={"step": 0.05},
        dtype=dtype,
        rounds=3,
        prefills=2,
    )


@pytest.mark.parametrize("dtype", [None, DType.FLOAT16, DType.BFLOAT16])
def test_it_says_what_it_measured(
    tiny: LoadedModel, fitted: list[GroupCalibration], words: list[int], dtype: DType | None
) -> None:
    done: list[float] = []
    subject = bench(tiny, fitted, dtype)
    found = subject.run(words, lambda work, note: done.append(work))
    assert done == sorted(done)
    assert done[-1] == pytest.approx(subject.work)
    assert found["dtype"] == (dtype or DType.FLOAT32).value
    for name in ("encode_vs_gemm", "decode_vs_gemm", "decode_run_vs_gemm"):
        assert float(str(found[name])) > 0
    rate, prompt = found["decode_tokens_per_second"], found["prefill_tokens_per_second"]
    assert float(str(found["decode_vs_prefill"])) == pytest.approx(
        float(str(rate)) / float(str(prompt))
    )
    # Two bytes for each of 3 layers x 2 streams x 2 heads x 16.
    assert float(str(found["decode_fp16_bytes_per_second"])) == pytest.approx(
        float(str(rate)) * 2 * 3 * 2 * 2 * 16
    )
    assert float(str(found["compression_ratio"])) > 1
    timed = found["timed"]
    assert isinstance(timed, dict)
    for figures in timed.values():
        low, high = figures["ratio_quartiles"]
        assert low <= figures["ratio"] <= high
        assert figures["seconds"] > 0 < figures["gemm_seconds"]


def test_another_number_of_tokens_is_refused(
    tiny: LoadedModel, fitted: list[GroupCalibration], words: list[int]
) -> None:
    with pytest.raises(ConfigError, match="2048 tokens"):
        bench(tiny, fitted).run(words[:-1], lambda *_: None)
