"""Codecs that drop tokens, measured as any other."""

import pytest

from kvferry.codec.lab.evaluate import Setup, evaluate
from kvferry.codec.mlx.load import LoadedModel

MODEL_ID = bytes(range(32))
CONTEXT = 600


def measured(tiny: LoadedModel, text: list[int], codec: str, **options: object) -> dict[str, float]:
    setup = Setup(codec=codec, options=options, context=CONTEXT, continuation=40)
    given = text[: setup.text_tokens]
    found = evaluate(tiny, MODEL_ID, given, setup, lambda _: None).to_json("tiny")
    return {k: v for k, v in found.items() if isinstance(v, int | float)}


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("codec", ["streaming", "random"])
def test_tokens_that_were_dropped_are_not_paid_for_and_not_remembered(
    tiny: LoadedModel, text: list[int], codec: str, positions: str
) -> None:
    found = measured(tiny, text, codec, ratio=5, positions=positions)
    assert (found["context_tokens"], found["context_entries"]) == (CONTEXT, CONTEXT // 5)
    assert 4.5 < found["compression_ratio"] < 8
    assert found["kl_mean"] > 1e-3
    whole = measured(tiny, text, codec, ratio=1, positions=positions)
    assert whole["context_entries"] == CONTEXT
    assert whole["kl_mean"] < found["kl_mean"] / 50
