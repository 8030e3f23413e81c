"""Tuning holds its bound on every text, and presets come back as they were written."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.lab.evaluate import Prepared, Setup, evaluate, measure, prepare
from kvferry.codec.lab.knobs import knob_of
from kvferry.codec.lab.preset import Preset, load_preset, save_preset
from kvferry.codec.lab.tune import Bound, Trial, Tuner
from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import ConfigError

MODEL_ID = bytes(range(32))
CONTEXT, CONTINUATION = 320, 48
SIZES = Setup(codec="raw", context=CONTEXT, continuation=CONTINUATION)


def silent(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def words() -> list[int]:
    text = Path(__file__).read_text() * 4
    return [ord(c) % 97 for c in text]


@pytest.fixture(scope="module")
def texts(tiny: LoadedModel, words: list[int]) -> dict[str, Prepared]:
    def of(start: int) -> Prepared:
        part = words[start : start + SIZES.text_tokens]
        return prepare(tiny, MODEL_ID, part, CONTEXT, CONTINUATION, silent)

    return {"one": of(0), "two": of(2000)}


def tuner(texts: dict[str, Prepared], codec: str, limit: float, **more: Any) -> Tuner:
    return Tuner(texts=texts, knob=knob_of(codec), bound=Bound("kl_mean", limit), **more)


def test_prepared_once_measured_as_evaluate_does(
    tiny: LoadedModel, words: list[int], texts: dict[str, Prepared]
) -> None:
    for bits in (4, 8, 2, 4):  # settings leave no trace in what was prepared
        setup = Setup(
            codec="affine", options={"bits": bits}, context=CONTEXT, continuation=CONTINUATION
        )
        once = measure(texts["one"], setup, silent)
        whole = evaluate(tiny, MODEL_ID, words[: SIZES.text_tokens], setup, silent)
        assert once.pages.blob_bytes == whole.pages.blob_bytes
        assert once.tail.blob_bytes == whole.tail.blob_bytes
        assert once.found.kl_mean == pytest.approx(whole.found.kl_mean, rel=1e-4, abs=1e-9)
        assert once.found.ppl_exact == pytest.approx(whole.found.ppl_exact, rel=1e-6)


def test_another_size_than_prepared_is_refused(texts: dict[str, Prepared]) -> None:
    with pytest.raises(ConfigError, match="context"):
        measure(texts["one"], Setup(codec="raw", context=64, continuation=CONTINUATION), silent)


def test_the_coarsest_bits_that_hold_on_all_texts(texts: dict[str, Prepared]) -> None:
    kl: dict[int, float] = {}
    for bits in (2, 3, 4, 8):
        setup = Setup(
            codec="affine", options={"bits": bits}, context=CONTEXT, continuation=CONTINUATION
        )
        kl[bits] = max(measure(text, setup, silent).found.kl_mean for text in texts.values())
    assert kl[2] > kl[3] > kl[4] > kl[8]
    limit = (kl[3] * kl[4]) ** 0.5
    found = tuner(texts, "affine", limit).run()
    assert dict(found.best.options) == {"bits": 4}
    assert set(found.best.results) == set(texts)
    assert found.best.error == pytest.approx(kl[4], rel=1e-3)
    assert found.best.ratio < max(trial.ratio for trial in found.trials)  # coarser ones failed


def test_a_bound_out_of_reach_says_what_was_reached(texts: dict[str, Prepared]) -> None:
    with pytest.raises(ConfigError, match=r"--max-kl = 1e-12 .*\(bits=8\) gives .* on (one|two)"):
        tuner(texts, "affine", 1e-12).run()


def test_exact_codecs_have_one_setting(texts: dict[str, Prepared]) -> None:
    found = tuner(texts, "zstd", 0.01).run()
    assert dict(found.best.options) == {}
    assert len(found.trials) == 1


def test_ferry_ends_close_below_its_bound(
    texts: dict[str, Prepared], fitted: list[GroupCalibration]
) -> None:
    seen: list[Trial] = []
    bound = Bound("kl_mean", 0.02)
    found = Tuner(
        texts=texts,
        knob=knob_of("ferry", fitted),
        bound=bound,
        groups=fitted,
        budget=10,
        report=seen.append,
    ).run()
    assert list(found.trials) == seen
    assert found.best.error <= 0.02
    assert found.best.error > 0.012
    for result in found.best.results.values():
        assert result.found.kl_mean <= 0.02
    # Nothing that was tried and held on both texts is smaller.
    held = [trial for trial in seen if trial.error <= 0.02]
    assert found.best.ratio == max(trial.ratio for trial in held)


PRESET = Preset(
    model="tiny",
    model_id=MODEL_ID,
    codec="ferry",
    options={"step": 0.0125},
    calibration_id=bytes(32),
    metric="ppl_delta_pct",
    limit=0.5,
    context=CONTEXT,
    continuation=CONTINUATION,
    compression_ratio=17.5,
    measured=[{"text": "one", "kl_mean": 0.003}],
)


def test_a_preset_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    save_preset(PRESET, path)
    assert load_preset(path) == PRESET


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "kvferry/preset/9"),
        ("model", None),
        ("model_id", "abc"),
        ("model_id", ""),
        ("calibration_id", "00"),
        ("options", []),
        ("options", {"step": [1]}),
        ("options", {"step": True}),
        ("bound", {"metric": "kl_max", "max": 1}),
        ("bound", {"metric": "kl_mean", "max": "1"}),
        ("context_tokens", 1.5),
        ("measured", [1]),
        ("compression_ratio", None),
    ],
)  # fmt: skip
def test_a_preset_that_is_none_is_one_line(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(PRESET.to_json() | {name: value}))
    with pytest.raises(ConfigError) as caught:
        load_preset(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1", b"\xff\xfe", b"[" * 100_000, b"7"])
def test_a_file_that_is_no_preset(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="kvferry tune"):
        load_preset(path)
    with pytest.raises(ConfigError, match="kvferry tune"):
        load_preset(tmp_path / "missing.json")


def test_a_preset_is_held_to_its_model_and_calibration() -> None:
    PRESET.check(MODEL_ID, bytes(32), "p.json")
    with pytest.raises(ConfigError, match="tuned for this model"):
        PRESET.check(bytes(32), bytes(32), "p.json")
    with pytest.raises(ConfigError, match="--calibration"):
        PRESET.check(MODEL_ID, bytes([1]) * 32, "p.json")


def test_a_preset_serves_as_a_policy_rule() -> None:
    from kvferry.cluster.policy_file import parse_policy

    fields = PRESET.to_json()
    options: Any = fields["options"]
    inner = ", ".join(f"{name} = {json.dumps(value)}" for name, value in options.items())
    rule = f'[[rules]]\ncodec = "{fields["codec"]}"\noptions = {{ {inner} }}\n'
    policy = parse_policy(rule.encode())
    assert dict(policy.rules[0].options) == {"step": "0.0125"}
