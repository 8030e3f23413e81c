"""``kvferry presets``: what a model's cache holds, told by the model itself."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from model_zoo import CONFIGS, config_of, model_of, prefilled, save_model, tokens_of

from kvferry.cli.main import main
from kvferry.codec.base import RING_KEYS
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.preset_report import rope_report
from kvferry.codec.mlx.probe import describe
from kvferry.codec.rope import RopeSpec

Told = dict[str, Any]


class Command:
    """The command in this process, as a shell would give it its arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        self._monkeypatch.setattr("sys.argv", ["kvferry", "presets", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err

    def told(self, model: str | Path) -> Told:
        code, out, err = self.run("--model", model, "--json", "-")
        assert code == 0, err
        found: Told = json.loads(out)
        return found


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def config_folder(config: Any, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bytes_told_are_those_that_a_real_cache_gives_away(
    name: str, presets: Command, tmp_path: Path
) -> None:
    save_model(name, tmp_path)
    found = presets.told(tmp_path)
    model, tokens = model_of(name), tokens_of(40)
    shape = describe(model, config_of(name))
    snapshot = adapters.snapshot(prefilled(model, tokens), 40, latent=shape.latent)
    page = snapshot.page(snapshot.layers, (0, 40))
    assert found["bytes_per_token"] * 40 == sum(s.data.nbytes for s in page.streams.values())
    assert found["bytes_per_token_fp16"] * 40 == page.raw_bytes_fp16
    assert found["page_bytes"] == 256 * found["bytes_per_token"]
    states = list(snapshot.state_pages((0, 40)))
    assert found["state_bytes"] == sum(
        s.data.nbytes for state in states for s in state.streams.values()
    )
    assert {s["name"] for s in found["streams"]} == set(page.streams)
    assert found["kv_heads"] == shape.kv_heads
    assert [x for group in found["layer_groups"] for x in group] == found["page_layers"]
    assert found["weights_found"] is True

    bare = config_folder(config_of(name), tmp_path / "bare")
    without = presets.told(bare)
    assert without == found | {"model": str(bare), "weights_found": False}


def test_layers_of_another_kind_are_told_apart(presets: Command, tmp_path: Path) -> None:
    gemma = presets.told(config_folder(config_of("gemma3_text"), tmp_path))
    assert (gemma["page_layers"], gemma["state_layers"]) == ([1, 3], [0, 2])
    ring = next(kind for kind in gemma["kinds"] if kind["holds"] == "ring")
    assert (ring["cache"], ring["layers"], ring["window_tokens"]) == ("RotatingKVCache", [0, 2], 32)
    assert ring["arrays"][RING_KEYS] == [2, 32, 16]
    assert {tuple(r["layers"]): r["base"] for r in gemma["rope"]} == {(0, 2): 1e4, (1, 3): 1e6}

    next_ = presets.told(config_folder(config_of("qwen3_next"), tmp_path))
    assert next_["rope"] == [{
        "layers": [1, 3], "dims": 8, "traditional": False, "base": 1e4, "slowed": 1.0,
        "still_pairs": 0, "key_scale": 1.0, "position_scale": 1.0,
    }]  # fmt: skip

    yarn = presets.told(config_folder(config_of("gpt_oss"), tmp_path))["rope"][0]
    assert (yarn["base"], yarn["slowed"]) == (1e4, 32.0)
    assert yarn["key_scale"] == pytest.approx(0.1 * math.log(32) + 1, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "family", "mode", "head_dim"),
    [
        ("lfm2", "lfm2", "dual_stream", 16),
        ("qwen3_moe", "qwen3", "dual_stream", 16),
        ("glm4_moe_lite", "glm", "single_stream", 48),
        ("llama", "llama", "dual_stream", 16),
    ],
)
def test_families_keep_their_names_and_dims_are_the_models_own(
    name: str, family: str, mode: str, head_dim: int, presets: Command, tmp_path: Path
) -> None:
    found = presets.told(config_folder(config_of(name), tmp_path))
    assert (found["family"], found["architecture"], found["mode"]) == (family, name, mode)
    assert found["head_dim"] == head_dim
    wider = config_of(name) | {"num_hidden_layers": 6}
    assert presets.told(config_folder(wider, tmp_path))["model_layers"] == 6


def test_large_models_are_told_from_their_config_at_once(presets: Command, tmp_path: Path) -> None:
    huge = config_of("llama") | {
        "hidden_size": 16384, "num_hidden_layers": 126, "intermediate_size": 53248,
        "num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256,
    }  # fmt: skip
    found = presets.told(config_folder(huge, tmp_path))
    assert found["bytes_per_token_fp16"] == 126 * 8 * 128 * 2 * 2
    assert max(len(group) for group in found["layer_groups"]) * 8 * 128 <= 4096


@pytest.mark.model
def test_the_model_that_is_always_there(presets: Command) -> None:
    found = presets.told("smollm2")
    assert (found["model_layers"], found["kv_heads"], found["head_dim"]) == (30, 3, 64)
    assert found["page_bytes_fp16"] == 256 * 30 * 3 * 64 * 2 * 2
    assert found["rope"][0]["base"] == 1e5
    assert found["layer_groups"] == [list(range(15)), list(range(15, 30))]
    code, out, _ = presets.run("--model", "smollm2")
    assert code == 0
    assert "22.5 KiB as fp16" in out
    assert "0-14 (15); 15-29 (15)" in out
    assert "\x1b" not in out


@pytest.mark.long
def test_a_screen_for_every_kind_of_model(presets: Command, tmp_path: Path) -> None:
    for name in CONFIGS:
        code, out, err = presets.run("--model", config_folder(config_of(name), tmp_path))
        assert code == 0, err
        assert "the weights are not here" in out
    mamba = {
        "model_type": "mamba", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128,
        "state_size": 16, "num_hidden_layers": 2, "conv_kernel": 4, "use_bias": False,
        "use_conv_bias": True, "time_step_rank": 4,
    }  # fmt: skip
    code, out, _ = presets.run("--model", config_folder(mamba, tmp_path))
    assert code == 0
    assert "2 of the model, 2 with states" in out
    assert "a token" not in out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model_type": "nothing"}', "not supported"),
        ('{"model_type": "llama"}', "missing"),
        ("{", "double quotes"),
        ("[]", "no object"),
        (None, "no config.json"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(
    content: str | None, said: str, presets: Command, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    code, out, err = presets.run("--model", tmp_path)
    assert (code, out) == (1, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_family_is_no_model(presets: Command) -> None:
    code, _, err = presets.run("--model", "qwen3")
    assert code == 2
    assert "a folder or hub id: qwen3 is a family" in err


def test_damaged_weights_are_refused_in_one_line(presets: Command, tmp_path: Path) -> None:
    config_folder(config_of("llama"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"xx")
    code, _, err = presets.run("--model", tmp_path)
    assert code == 1
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("spec", "base", "slowed", "still"),
    [
        (RopeSpec(0, False, ()), None, 1.0, 0),
        (RopeSpec(2, False, (1.0,)), None, 1.0, 0),
        (RopeSpec(4, False, (0.5, 0.25)), None, 1.0, 0),
        (RopeSpec(4, False, (1.0, 0.01)), 10000.0, 1.0, 0),
        (RopeSpec(8, False, (1.0, 0.1, 0.0, 0.0)), 10000.0, 1.0, 2),
        (RopeSpec(6, False, (1.0, 0.01, 0.00001)), 1e6, 10.0, 0),
    ],
)
def test_frequencies_say_what_they_can(
    spec: RopeSpec, base: float | None, slowed: float, still: int
) -> None:
    found = rope_report([0], spec)
    assert (found.base, found.slowed, found.still) == (base, slowed, still)
