"""The model's identity: any change of weights, tokenizer or config changes it."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from kvferry.codec.mlx.load import LoadedModel, load_model
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.weights import fingerprint
from kvferry.errors import ModelError
from kvferry.proto.identity import ModelFingerprint, merge, model_id


def identity(folder: Path, cache_dir: Path) -> bytes:
    return model_id(fingerprint(load_model(str(folder)), cache_dir=cache_dir))


def test_it_is_the_same_twice_and_in_another_place(tiny_folder: Path, tmp_path: Path) -> None:
    first = identity(tiny_folder, tmp_path / "cache")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in tiny_folder.glob("*.*"):
        (elsewhere / file.name).write_bytes(file.read_bytes())
    assert identity(tiny_folder, tmp_path / "cache") == first
    assert identity(elsewhere, tmp_path / "cache") == first


@pytest.mark.parametrize("at", [-1, -3000, -40_000])
def test_one_weight_byte_changes_it(tiny_folder: Path, tmp_path: Path, at: int) -> None:
    before = identity(tiny_folder, tmp_path / "cache")
    file = tiny_folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    assert identity(tiny_folder, tmp_path / "cache") != before


@pytest.mark.parametrize(("old", "new"), [(b'"U32"', b'"I32"'), (b"q_proj", b"x_proj")])
def test_what_the_bytes_mean_changes_it(
    tiny_folder: Path, tmp_path: Path, old: bytes, new: bytes
) -> None:
    loaded = load_model(str(tiny_folder))
    before = fingerprint(loaded, cache_dir=tmp_path / "cache")
    file = tiny_folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(old, new))
    after = fingerprint(loaded, cache_dir=tmp_path / "cache")
    assert model_id(after) != model_id(before)


def test_a_tokenizer_changes_it(tiny_folder: Path, tmp_path: Path) -> None:
    before = identity(tiny_folder, tmp_path / "cache")
    file = tiny_folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"a"', '"A"'))
    assert identity(tiny_folder, tmp_path / "cache") != before


@pytest.mark.parametrize(
    ("name", "value", "changes"),
    [
        ("rope_theta", 20_000.0, True),
        ("rms_norm_eps", 1e-6, True),
        ("transformers_version", "9.9", False),
        ("_name_or_path", "/somebody/else", False),
    ],
)
def test_config_counts_unless_it_is_volatile(
    tiny_folder: Path, tmp_path: Path, name: str, value: object, changes: bool
) -> None:
    before = identity(tiny_folder, tmp_path / "cache")
    file = tiny_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    assert (identity(tiny_folder, tmp_path / "cache") != before) is changes


def test_parts_of_two_machines_make_the_whole(tiny_folder: Path, tmp_path: Path) -> None:
    whole = fingerprint(load_model(str(tiny_folder)), cache_dir=tmp_path / "a")
    parts = [
        fingerprint(load_model(str(tiny_folder), layers), cache_dir=tmp_path / "b")
        for layers in ((0, 1), (1, 2))
    ]
    assert not parts[0].complete
    with pytest.raises(ModelError, match=r"\[1\] are missing"):
        model_id(parts[0])
    assert model_id(merge(parts)) == model_id(whole)


def test_machines_with_different_models_do_not_merge(tiny_folder: Path, tmp_path: Path) -> None:
    one = fingerprint(load_model(str(tiny_folder)), cache_dir=tmp_path / "cache")
    file = tiny_folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    changed = fingerprint(load_model(str(tiny_folder)), cache_dir=tmp_path / "cache")
    with pytest.raises(ModelError, match="different weights"):
        merge([one, changed])


def test_a_layer_whose_weights_are_not_here_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(str(tiny_folder))
    file = tiny_folder / "model.safetensors"
    kept = {k: v for k, v in mx.load(str(file)).items() if "layers.1." not in k}
    mx.eval(kept)
    mx.save_safetensors(str(tiny_folder / "model-rest.safetensors"), kept)
    file.unlink()
    (tiny_folder / "model-rest.safetensors").replace(file)
    with pytest.raises(ModelError, match=r"\[1\]"):
        fingerprint(loaded, cache_dir=tmp_path / "cache")


def test_damaged_weight_files_are_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(str(tiny_folder))
    file = tiny_folder / "model.safetensors"
    data = file.read_bytes()
    for bad in (b"", data[:5], data[:300], data[:-9], b"\xff" * 64):
        file.write_bytes(bad)
        with pytest.raises(ModelError) as caught:
            fingerprint(loaded, cache_dir=tmp_path / "cache")
        assert "\n" not in str(caught.value)


def test_kept_digests_are_used_and_damage_to_them_is_harmless(
    tiny_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    before = identity(tiny_folder, cache)
    (kept,) = (cache / "digests").glob("*.json")
    digests = json.loads(kept.read_text())
    kept.write_text(json.dumps(digests | {"0": "00" * 32}))
    assert identity(tiny_folder, cache) != before  # so it was read
    for damage in ("", "[]", "{", '{"0": "zz"}', '{"0": 5}', '{"0": "00"}'):
        kept.write_text(damage)
        assert identity(tiny_folder, cache) == before


@pytest.mark.model
def test_the_packaged_model_has_an_identity(smollm2: LoadedModel, tmp_path: Path) -> None:
    whole: ModelFingerprint = fingerprint(smollm2, cache_dir=tmp_path)
    halves = [fingerprint(smollm2, part, cache_dir=tmp_path) for part in ((0, 13), (13, 30))]
    assert set(whole.shared) == {"embedding", "norm"}
    assert model_id(merge(halves)) == model_id(whole)


@pytest.mark.model
def test_the_packaged_models_cache_is_described(smollm2: LoadedModel) -> None:
    shape = describe(smollm2.model, smollm2.config)
    assert (shape.layers, shape.kv_heads, shape.head_dim) == (30, 3, 64)
    assert [(s.name, s.rotated) for s in shape.streams.values()] == [("k", True), ("v", False)]
