import json
from pathlib import Path

import numpy as np
import pytest
from codec_samples import rope_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec import rope
from kvferry.codec.rope import RopeSpec
from kvferry.errors import CalibrationCorruptError, UnsupportedTensorError

GOLDEN = Path(__file__).parent.parent / "golden" / "keys.json"


def reference(x: np.ndarray, spec: RopeSpec, position: int) -> np.ndarray:
    """One vector, rotated pair by pair; angles rounded to float32 as MLX has them."""
    out = x.astype(np.float64).copy()
    half = spec.dims // 2
    for i, freq in enumerate(spec.inv_freq):
        a, b = (2 * i, 2 * i + 1) if spec.traditional else (i, i + half)
        angle = float(np.float32(position) * np.float32(spec.position_scale) * np.float32(freq))
        c, s = np.cos(angle), np.sin(angle)
        out[a] = (x[a] * c - x[b] * s) * spec.key_scale
        out[b] = (x[a] * s + x[b] * c) * spec.key_scale
    return out


@settings(max_examples=40, deadline=None)
@given(
    dim=st.sampled_from([32, 48, 64, 96, 128]),
    part=st.sampled_from([0, 0.25, 0.5, 1.0]),
    traditional=st.booleans(),
    scales=st.sampled_from([(1.0, 1.0), (1.3, 1.0), (0.7, 0.25)]),
    tokens=st.integers(1, 40),
    start=st.sampled_from([0, 1, 255, 40_000, 1_000_000]),
)
def test_rope_matches_the_definition_and_is_undone(
    dim: int, part: float, traditional: bool, scales: tuple[float, float], tokens: int, start: int
) -> None:
    spec = rope_spec(dim, dims=int(dim * part), traditional=traditional)
    spec = RopeSpec(spec.dims, traditional, spec.inv_freq, *scales)
    rng = np.random.default_rng(dim + tokens)
    x = rng.standard_normal((2, 3, tokens, dim), dtype=np.float32)
    positions = rope.positions_of((start, start + tokens))
    rotated = rope.apply(x, spec, positions)
    np.testing.assert_allclose(
        rotated[1, 2, -1], reference(x[1, 2, -1], spec, start + tokens - 1), atol=2e-6
    )
    np.testing.assert_allclose(rope.undo(rotated, spec, positions), x, atol=2e-6)


def test_rope_agrees_with_mlx() -> None:
    mx = pytest.importorskip("mlx.core")
    x = np.random.default_rng(0).standard_normal((1, 2, 9, 64), dtype=np.float32)
    for traditional in (False, True):
        spec = rope_spec(64, dims=32, traditional=traditional)
        wanted = mx.fast.rope(
            mx.array(x), 32, traditional=traditional, base=10_000.0, scale=1.0, offset=100
        )
        got = rope.apply(x, spec, rope.positions_of((100, 109)))
        np.testing.assert_allclose(got, np.array(wanted), atol=2e-5)


def test_fingerprint_tells_every_difference_that_changes_keys() -> None:
    base = rope_spec(64)
    others = [
        rope_spec(64, traditional=True),
        rope_spec(64, dims=32),
        RopeSpec(64, False, tuple(f / 8 for f in base.inv_freq)),
        RopeSpec(64, False, base.inv_freq, key_scale=1.2),
        RopeSpec(64, False, base.inv_freq, position_scale=0.25),
    ]
    assert len({spec.fingerprint() for spec in [base, *others]}) == 6


def test_fingerprint_survives_the_last_bits_of_another_math_library() -> None:
    base = rope_spec(64)
    nudged = RopeSpec(64, False, tuple(f * (1 - 1e-7) for f in base.inv_freq))
    assert nudged != base
    assert nudged.fingerprint() == base.fingerprint()


def test_fingerprints_are_the_published_ones() -> None:
    for vector in json.loads(GOLDEN.read_text())["ropes"]:
        assert RopeSpec.from_json(vector["spec"]).fingerprint().hex() == vector["fingerprint"]


def test_json_round_trip() -> None:
    spec = RopeSpec(4, True, (1.0, 0.1), 1.5)
    assert RopeSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "change",
    [
        {"dims": 3},
        {"dims": 2},
        {"dims": -4},
        {"dims": "4"},
        {"dims": True},
        {"traditional": 1},
        {"inv_freq": [1.0]},
        {"inv_freq": [1.0, None]},
        {"inv_freq": [1.0, float("inf")]},
        {"inv_freq": [1.0, 10**400]},
        {"inv_freq": "ab"},
        {"key_scale": 0.0},
        {"key_scale": 10**400},
        {"key_scale": float("nan")},
        {"extra": 1},
    ],
)
def test_bad_specification_is_refused(change: dict[str, object]) -> None:
    value = {**RopeSpec(4, True, (1.0, 0.1), 1.5).to_json(), **change}
    with pytest.raises(CalibrationCorruptError):
        RopeSpec.from_json(value)


def test_heads_narrower_than_the_rotation_are_refused() -> None:
    with pytest.raises(UnsupportedTensorError):
        rope.apply(np.zeros((1, 32), np.float32), rope_spec(64), rope.positions_of((0, 1)))
