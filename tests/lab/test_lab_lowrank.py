"""Low rank on small models: calibrated through the live model, evaluated, resumed, its norms."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import utils

from kvferry.cli.evaluate import chosen
from kvferry.cli.lab_input import calibration_of
from kvferry.codec.lab.checkpoint import Checkpoint, checkpoint_key
from kvferry.codec.lab.evaluate import Setup, evaluate
from kvferry.codec.lab.lowrank import LowRankPlan, calibrate, calibration_set
from kvferry.codec.lab.memory import lowrank_memory_need
from kvferry.codec.lab.plan import Stopped
from kvferry.codec.lowrank_calibration import LowRankCalibration
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.norms import attention_norms
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.rope import stream_ropes
from kvferry.codec.registry import make_codec
from kvferry.errors import ConfigError

MODEL_ID = bytes(range(32))
PLAN = LowRankPlan(tokens=2048, sequence=512)
_NORMED = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "vocab_size": 97,
    "rope_theta": 10_000.0,
}


def silent(done: float, note: str) -> None:
    """Tells nobody."""


@pytest.fixture(scope="module")
def made(tiny: LoadedModel, text: list[int]) -> LowRankCalibration:
    reports: list[float] = []
    found = calibrate(
        tiny, MODEL_ID, text[: PLAN.tokens], "tests", PLAN, lambda done, _: reports.append(done)
    )
    assert reports == sorted(reports)
    assert reports[-1] == PLAN.tokens
    return found


def test_it_covers_the_whole_model(made: LowRankCalibration) -> None:
    assert (made.layers, made.heads) == ((0, 3), (0, 2))
    assert {n: b.vectors.shape for n, b in made.bases.items()} == {
        "k": (3, 2, 16, 16),
        "v": (3, 2, 16, 16),
    }
    assert made.tokens == PLAN.tokens - 4 * 4  # four sequences, four sinks in each
    assert set(made.ropes) == {"k"}
    assert (made.norm, dict(made.nulls)) == ("rmsnorm", {})
    with pytest.raises(ConfigError, match="RMSNorm"):
        make_codec("lowrank", {"ln_nullspace": "true"}, made)


def test_eval_measures_ranks_bits_and_targets(
    tiny: LoadedModel, text: list[int], made: LowRankCalibration
) -> None:
    def measured(codec: str = "lowrank", **options: object) -> tuple[float, float]:
        groups = [made] if codec == "lowrank" else []
        setup = Setup(codec=codec, options=options, context=512, continuation=128, groups=groups)
        found = evaluate(tiny, MODEL_ID, text[-setup.text_tokens :], setup, lambda _: None)
        return found.found.kl_mean, 2 * found.pages.values / found.pages.blob_bytes

    exact, low, lower = measured(rank=16), measured(rank=8), measured(rank=4)
    tail = measured("zstd")[0]  # which is coded in 8 bits whatever the codec of pages
    assert exact[0] == pytest.approx(tail, rel=0.1)
    assert exact[0] < low[0] < lower[0]
    assert 1 < exact[1] < low[1] < lower[1]
    eight = measured(rank=8, bits=8)
    assert eight[1] > low[1]
    assert eight[0] < 2 * low[0] + 1e-4
    part = measured(rank=4, identity="0-2")
    assert part[0] < lower[0]
    assert part[1] < lower[1]


def test_wherever_it_is_stopped_the_end_is_the_same(
    tiny: LoadedModel, text: list[int], tmp_path: Path, made: LowRankCalibration
) -> None:
    given = text[: PLAN.tokens]
    kept = Checkpoint(tmp_path, checkpoint_key(MODEL_ID, given, [], PLAN))
    reads = 0

    def stopping(done: float, note: str) -> None:
        nonlocal reads
        reads += note == "reading"
        if done > 1024:
            raise Stopped

    with pytest.raises(Stopped):
        calibrate(tiny, MODEL_ID, given, "tests", PLAN, stopping, kept)
    before, reads = reads, 0

    def counting(done: float, note: str) -> None:
        nonlocal reads
        reads += note == "reading"

    again = calibrate(tiny, MODEL_ID, given, "tests", PLAN, counting, kept)
    assert again.id == made.id
    assert 0 < reads < 2 * before


def test_memory_is_told_and_does_not_grow_with_the_text(tiny: LoadedModel) -> None:
    shape = describe(tiny.model, tiny.config)
    need = lowrank_memory_need(tiny, shape, PLAN)
    assert need.covariances == 2 * 3 * 2 * 16 * 16 * np.dtype("f8").itemsize
    longer = lowrank_memory_need(tiny, shape, LowRankPlan(tokens=10**6, sequence=512))
    assert longer.additional == need.additional


def test_a_folder_holds_it_and_is_taken_for_no_other(
    made: LowRankCalibration, tmp_path: Path
) -> None:
    found = calibration_set(made)
    found.save(tmp_path / "lowrank", [made])
    known = calibration_of("lowrank", tmp_path, MODEL_ID)
    assert isinstance(known.groups[0], LowRankCalibration)
    assert (known.groups[0].id, known.id) == (made.id, found.id)
    with pytest.raises(ConfigError, match="of ferry; `kvferry calibrate --codec ferry` makes one"):
        calibration_of("ferry", tmp_path / "lowrank", MODEL_ID)
    with pytest.raises(ConfigError, match="calibrate --codec lowrank"):
        calibration_of("lowrank", tmp_path / "none", MODEL_ID)


def layer_normed(**more: object) -> LoadedModel:
    """A real model class with a LayerNorm before attention, and random gains."""
    config: dict[str, Any] = {**_NORMED, **more}
    get_classes: Any = utils._get_classes
    model_class, arguments = get_classes(config)
    mx.random.seed(5)
    model = model_class(arguments.from_dict(config))
    for layer in model.layers:
        norm = layer.ln_1 if hasattr(layer, "ln_1") else layer.input_layernorm
        norm.weight = mx.random.uniform(0.5, 2.0, norm.weight.shape)
        norm.bias = mx.random.normal(norm.bias.shape)
    mx.eval(model.parameters())
    words: Any = None
    return LoadedModel("normed", model, words, config, (), (), (0, 2))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "starcoder2", "num_attention_heads": 1, "num_key_value_heads": 1},
        # One fused projection for queries, keys and values, and no RoPE.
        {
            "model_type": "gpt2",
            "n_embd": 32,
            "n_head": 1,
            "num_key_value_heads": 1,
            "n_layer": 2,
            "n_positions": 4096,
            "n_ctx": 4096,
            "layer_norm_epsilon": 1e-5,
        },
    ],
)
def test_a_layer_norm_before_heads_as_wide_as_the_model_saves_a_direction(
    config: dict[str, object], text: list[int]
) -> None:
    loaded = layer_normed(**config)
    plan = LowRankPlan(tokens=512, sequence=512)
    made = calibrate(loaded, MODEL_ID, text[:512], "tests", plan, silent)
    assert made.norm == "layernorm"
    assert {name: flags.tolist() for name, flags in made.nulls.items()} == {
        "k": [[1.0], [1.0]],
        "v": [[1.0], [1.0]],
    }
    kl = {}
    for nullspace in ("false", "true"):
        options = {"rank": 32, "target": "kv", "ln_nullspace": nullspace}
        setup = Setup(codec="lowrank", options=options, context=256, continuation=64, groups=[made])
        found = evaluate(loaded, MODEL_ID, text[-setup.text_tokens :], setup, lambda _: None)
        kl[nullspace] = found.found.kl_mean
    assert kl["true"] == pytest.approx(kl["false"], rel=0.02, abs=1e-7)


def test_narrow_heads_behind_a_layer_norm_have_no_empty_direction() -> None:
    loaded = layer_normed(model_type="starcoder2", num_attention_heads=2, num_key_value_heads=2)
    shape = describe(loaded.model, loaded.config)
    norms = attention_norms(loaded.model, shape, stream_ropes(loaded.model, shape))
    assert (norms.kind, dict(norms.nulls)) == ("layernorm", {})


@pytest.mark.parametrize(
    ("option", "says"),
    [("target=q", "one of v, k, kv"), ("preset=/no/such/file.json", r"/no/such/file\.json")],
)
def test_mistakes_are_said_before_anything_is_loaded(option: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        chosen("lowrank", [option], None)
