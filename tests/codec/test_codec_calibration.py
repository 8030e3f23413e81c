import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from codec_samples import (
    MODEL_ID,
    page_of,
    random_calibration,
    random_page,
    restored,
    rope_spec,
    worst_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec import calibration_format as fmt
from kvferry.codec.calibration import (
    CalibrationSet,
    CurvePoint,
    GroupAccumulator,
    GroupCalibration,
    GroupEntry,
    fit_group,
    layer_groups,
)
from kvferry.codec.calibration_store import CalibrationStore
from kvferry.codec.ferry import FerryCodec
from kvferry.errors import (
    CalibrationCorruptError,
    CalibrationMissingError,
    CodecError,
    ConfigError,
    CorruptBlobError,
    UnsupportedTensorError,
    UnsupportedVersionError,
)
from kvferry.proto import container
from kvferry.proto.container import SectionData

CURVE = (CurvePoint(0.1, 3.0, 0.0001), CurvePoint(1.0, 1.0, 0.01), CurvePoint(2.0, 0.5, 0.05))


def a_set(*groups: GroupCalibration, curve: tuple[CurvePoint, ...] = CURVE) -> CalibrationSet:
    return CalibrationSet(
        model_id=MODEL_ID,
        model_layers=groups[-1].layers[1],
        model_heads=groups[0].heads[1],
        groups=tuple(GroupEntry(g.id, g.layers, g.heads) for g in groups),
        curve=curve,
        text_source="pydoc topics",
        tokens=16_000,
    )


def same(a: GroupCalibration, b: GroupCalibration) -> bool:
    parts = [
        np.array_equal(getattr(a.bundles[n], p), getattr(b.bundles[n], p))
        for n in a.bundles
        for p in ("mean", "basis", "sigma", "importance")
    ]
    return a.id == b.id and all(parts) and a.ropes == b.ropes


def test_layer_groups_are_equal_and_cut_by_width() -> None:
    assert layer_groups(30, 3, 64) == [(0, 15), (15, 30)]
    assert layer_groups(28, 8, 128) == [(i, i + 4) for i in range(0, 28, 4)]
    assert layer_groups(4, 64, 128) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    for layers in range(1, 80):
        groups = layer_groups(layers, 3, 64)
        sizes = {b - a for a, b in groups}
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) * 3 * 64 <= 4096
        assert [a for a, _ in groups] == [0, *(b for _, b in groups[:-1])]
        assert groups[-1][1] == layers
    with pytest.raises(ConfigError):
        layer_groups(0, 3, 64)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_group_survives_storage(weighted: bool, joint: bool) -> None:
    known = random_calibration(weighted=weighted, joint=joint, importance=weighted)
    key, data = known.to_blob()
    assert key.page_key == known.id
    found = GroupCalibration.from_blob(data)
    assert same(found, known)
    assert found.to_blob() == (key, data)


def test_id_depends_on_everything_that_changes_numbers() -> None:
    known = random_calibration()
    both = known.bundles["k+v"]
    others = [
        random_calibration(weighted=True),
        random_calibration(seed=2),
        random_calibration(rope=rope_spec(32, traditional=True)),
        dataclasses.replace(known, model_id=bytes(32)),
        dataclasses.replace(known, layers=(1, 3)),
        dataclasses.replace(known, bundles={"k+v": dataclasses.replace(both, mean=both.mean + 1)}),
        random_calibration(importance=True),
        random_calibration(joint=False),
    ]
    assert len({c.id for c in [known, *others]}) == 9


def test_cut_is_addressed_by_its_content_and_names_its_parent() -> None:
    known = random_calibration(layers=(10, 16), heads=(0, 4), weighted=True)
    part = known.cut((12, 15), (1, 3))
    assert (part.layers, part.heads, part.parent) == ((12, 15), (1, 3), known.id)
    assert part.bundles["k+v"].width == 2 * 3 * 2 * 32
    assert part.ropes["k"] == known.ropes["k"][2:5]
    found = GroupCalibration.from_blob(part.to_blob()[1])
    assert same(found, part)
    assert part.id != known.id
    assert known.cut((10, 16), (0, 4)) is known
    page = page_of(known, (300, 360))
    inner = page.cut_layers((12, 15)).cut_heads((1, 3))
    FerryCodec(0.1, part).encode(inner)
    for layers, heads in (((9, 12), (0, 4)), ((12, 17), (0, 4)), ((12, 15), (3, 5))):
        with pytest.raises(ConfigError):
            known.cut(layers, heads)


def test_a_cut_keeps_each_layers_own_rope() -> None:
    specs = tuple(rope_spec(32, dims=dims) for dims in (32, 16, 0, 8))
    known = dataclasses.replace(random_calibration(layers=(4, 8)), ropes={"k": specs})
    part = known.cut((5, 7), (0, 2))
    assert part.ropes["k"] == specs[1:3]
    assert set(part.layer_ropes) == {5, 6}
    assert part.layer_ropes[6] == {specs[2].fingerprint()}
    assert part.rope_fingerprint != known.rope_fingerprint
    page = page_of(known, (256, 290))
    whole = restored(FerryCodec(0.1, known), page)
    for layers in ((4, 5), (5, 7), (7, 8)):
        inner = known.cut(layers, (0, 2))
        back = restored(FerryCodec(0.1, inner), page.cut_layers(layers))
        assert worst_error(back, page.cut_layers(layers)) < 0.6
    assert worst_error(whole, page) < 0.6


def test_a_stream_with_one_head_is_cut_by_layers_only() -> None:
    known = random_calibration(heads=(0, 1))
    known = dataclasses.replace(known, heads=(0, 4))
    part = known.cut((1, 2), (2, 3))
    assert part.streams["k"].heads == 1
    assert part.bundles["k+v"].width == 2 * 32


def test_fit_leaves_out_the_exact_tokens() -> None:
    pages = [random_page(tokens=(at, at + 64), seed=at) for at in (0, 64)]
    loud = random_page(tokens=(0, 64))
    for stream in loud.streams.values():
        stream.data[:, :, :4] = 1e6
    fits = []
    for first in (pages[0], loud):
        seen = GroupAccumulator(
            model_id=MODEL_ID, layers=(0, 2), heads=(0, 2), ropes={"k": [rope_spec(32)] * 2}
        )
        seen.add(first)
        seen.add(pages[1])
        fits.append(fit_group(seen, max_rank=40, source="test"))
    assert fits[0].tokens == 124
    assert fits[0].bundles["k+v"].rank == 40
    assert np.abs(fits[1].bundles["k+v"].sigma - fits[0].bundles["k+v"].sigma).max() < 1


def test_fit_takes_the_groups_part_of_a_larger_page_and_merges_ranks() -> None:
    def fresh() -> GroupAccumulator:
        ropes = {"k": [rope_spec(32)] * 2}
        return GroupAccumulator(model_id=MODEL_ID, layers=(4, 6), heads=(1, 3), ropes=ropes)

    pages = [random_page(layers=(3, 8), heads=(0, 4), tokens=(at, at + 90)) for at in (0, 90)]
    both, one, two = fresh(), fresh(), fresh()
    for page in pages:
        both.add(page)
    one.add(pages[0])
    two.add(pages[1])
    one.merge(two)
    whole, merged = fit_group(both), fit_group(one)
    np.testing.assert_allclose(whole.bundles["k+v"].sigma, merged.bundles["k+v"].sigma, rtol=1e-3)
    with pytest.raises(UnsupportedTensorError):
        both.add(random_page(layers=(4, 5), heads=(1, 3)))
    with pytest.raises(UnsupportedTensorError):
        both.merge(
            GroupAccumulator(model_id=MODEL_ID, layers=(4, 6), heads=(0, 2), ropes=both.ropes)
        )


def test_set_survives_storage_and_folder(tmp_path: Path) -> None:
    groups = [random_calibration(layers=(0, 2)), random_calibration(layers=(2, 4), seed=3)]
    known = a_set(*groups)
    key, data = known.to_blob()
    assert CalibrationSet.from_blob(data) == known
    assert key.page_key == known.id
    known.save(tmp_path / "new" / "folder", groups)
    found, loaded = CalibrationSet.load(tmp_path / "new" / "folder")
    assert found == known
    assert all(same(a, b) for a, b in zip(groups, loaded, strict=True))
    with pytest.raises(ConfigError):
        known.save(tmp_path, groups[:1])
    with pytest.raises(ConfigError, match="kvferry calibrate"):
        CalibrationSet.load(tmp_path / "nowhere")


def test_damaged_calibration_folder_is_refused(tmp_path: Path) -> None:
    groups = [random_calibration(layers=(0, 2)), random_calibration(layers=(2, 4), seed=3)]
    known = a_set(*groups)
    known.save(tmp_path, groups)
    files = sorted(tmp_path.glob("*.kvferry"))
    kept = [f.read_bytes() for f in files]
    files[0].write_bytes(kept[1])
    with pytest.raises(CalibrationCorruptError):
        CalibrationSet.load(tmp_path)
    files[0].write_bytes(kept[0][:-1])
    with pytest.raises(CodecError):
        CalibrationSet.load(tmp_path)
    files[0].unlink()
    with pytest.raises(CalibrationCorruptError):
        CalibrationSet.load(tmp_path)
    for text in (
        "",
        "[]",
        "{",
        '{"kind": "set"}',
        "[" * 100_000,
        "\ud800".encode("utf-8", "ignore"),
    ):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "calibration.json").write_bytes(data)
        with pytest.raises(CalibrationCorruptError):
            CalibrationSet.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"model_layers": 5},
        {"model_heads": 3},
        {"model_id": b"short"},
        {"groups": ()},
        {"curve": (CurvePoint(0.0, 1.0, 1.0),)},
        {"curve": (CurvePoint(1.0, float("nan"), 1.0),)},
        {"text_source": "two\nlines"},
    ],
)
def test_set_that_does_not_hold_together_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CalibrationCorruptError):
        dataclasses.replace(a_set(random_calibration()), **change)  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(target=st.floats(1e-6, 10.0))
def test_step_for_a_target_is_on_the_curve(target: float) -> None:
    known = a_set(random_calibration())
    step = known.step_for_kl(target)
    assert 0 < step <= 2.0
    assert known.step_for_kl(target * 1.1) >= step
    for point in CURVE:
        assert known.step_for_kl(point.kl) == pytest.approx(point.step)


def test_target_without_a_curve_says_so() -> None:
    with pytest.raises(ConfigError, match="no curve"):
        a_set(random_calibration(), curve=()).step_for_kl(0.01)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError):
            a_set(random_calibration()).step_for_kl(bad)


def forged(data: bytes, **changes: object) -> bytes:
    """A calibration blob with other description fields; every digest made to fit."""
    blob = container.parse(data)
    fields = json.loads(bytes(blob.sections["description"].data))
    fields.update(changes)
    text = json.dumps(fields).encode()
    raw = bytes(blob.sections["tensors"].data)
    blob.header.page_key = fmt._digest(text, raw)
    for name in ("layers", "heads"):
        value = fields.get(name)
        if isinstance(value, list) and len(value) == 2 and name == "layers":
            blob.header.layer_start, blob.header.layer_end = (max(0, v) for v in value)
    sections = [SectionData("description", text, len(text)), SectionData("tensors", raw, len(raw))]
    return container.pack(blob.header, sections)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": [0, 3]},
        {"layers": [2, 1]},
        {"layers": "0-2"},
        {"heads": [0, 4]},
        {"model_id": "zz" * 32},
        {"model_id": MODEL_ID.hex().upper()},
        {"parent": "ab"},
        {"streams": []},
        {"streams": {}},
        {"streams": [{"name": "k", "heads": 2, "dim": 32, "weighted": True}]},
        {"streams": [{"name": "k", "heads": 1 << 60, "dim": 32, "weighted": False}]},
        {"streams": [{"name": "q", "heads": 2, "dim": 32, "weighted": False}]},
        {"streams": [{"name": "k", "heads": 2, "dim": 32, "weighted": False}]},
        {"ropes": {"k": [0]}},
        {"ropes": {"k": [0, 7]}},
        {"ropes": {"q": [0, 0]}},
        {"ropes": []},
        {"rope_specs": [{"dims": 2}]},
        {"tokens": -1},
        {"tokens": 1.5},
        {"source": "a\nb"},
        {"extra": 1},
    ],
)
def test_forged_calibrations_are_refused(changes: dict[str, object]) -> None:
    data = random_calibration().to_blob()[1]
    with pytest.raises((CalibrationCorruptError, CorruptBlobError)):
        GroupCalibration.from_blob(forged(data, **changes))


def test_newer_and_foreign_calibrations_are_named() -> None:
    group, data = random_calibration(), random_calibration().to_blob()[1]
    with pytest.raises(UnsupportedVersionError):
        GroupCalibration.from_blob(forged(data, version=9))
    with pytest.raises(CalibrationCorruptError, match="manifest"):
        GroupCalibration.from_blob(a_set(group).to_blob()[1])
    blob = container.parse(data)
    swapped = [SectionData("description", b"{}", 2), blob.sections["tensors"]]
    with pytest.raises(CalibrationCorruptError, match="hash"):
        GroupCalibration.from_blob(container.pack(blob.header, swapped))


def test_every_flipped_bit_and_truncation_is_refused() -> None:
    data = random_calibration(layers=(0, 1), heads=(0, 1), dim=8, rank=2, rope=rope_spec(8))
    raw = data.to_blob()[1]
    for position in range(len(raw)):
        with pytest.raises(CodecError):
            GroupCalibration.from_blob(raw[:position])
        flipped = bytearray(raw)
        flipped[position] ^= 1 << (position % 8)
        with pytest.raises(CodecError):
            GroupCalibration.from_blob(bytes(flipped))


def test_store_finds_what_it_kept_after_a_restart(tmp_path: Path) -> None:
    known = random_calibration(layers=(0, 4))
    manifest = a_set(known)
    store = CalibrationStore(tmp_path / "calibrations")
    with pytest.raises(CalibrationMissingError):
        store.get(known.id)
    store.put(known)
    store.put(manifest)
    again = CalibrationStore(tmp_path / "calibrations")
    assert same(again.get(known.id), known)
    assert again.get(known.id) is again.get(known.id)
    assert again.get_set(manifest.id) == manifest
    assert again.blob(known.id) == known.to_blob()[1]
    assert again.has(known.id)
    assert not again.has(bytes(32))
    for wrong in (lambda: again.get(manifest.id), lambda: again.get_set(known.id)):
        with pytest.raises(CalibrationCorruptError):
            wrong()
    with pytest.raises(CalibrationMissingError):
        again.get(b"short")


def test_store_keeps_a_blob_from_elsewhere_only_if_it_is_whole(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path)
    data = random_calibration().to_blob()[1]
    with pytest.raises(CodecError):
        store.put_blob(data[:-1])
    assert list(tmp_path.iterdir()) == []
    assert store.get(store.put_blob(data)).id == random_calibration().id


def test_store_sets_a_damaged_file_aside(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path)
    known = random_calibration()
    store.put(known)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    fresh = CalibrationStore(tmp_path)
    with pytest.raises(CalibrationCorruptError):
        fresh.get(known.id)
    with pytest.raises(CalibrationMissingError):
        fresh.get(known.id)
    other = random_calibration(seed=9)
    file.write_bytes(other.to_blob()[1])
    with pytest.raises(CalibrationCorruptError, match="another"):
        fresh.get(known.id)


def test_store_cuts_once_and_remembers(tmp_path: Path) -> None:
    known = random_calibration(layers=(0, 4))
    store = CalibrationStore(tmp_path)
    store.put(known)
    assert store.cut(known.id, (0, 4), (0, 2)) is store.get(known.id)
    part = store.cut(known.id, (1, 3), (0, 2))
    assert store.cut(known.id, (1, 3), (0, 2)) is part
    again = CalibrationStore(tmp_path)
    assert again.cut(known.id, (1, 3), (0, 2)).id == part.id
    assert again.has(part.id)
    (note,) = tmp_path.glob("*.cut")
    note.write_text("nonsense")
    assert CalibrationStore(tmp_path).cut(known.id, (1, 3), (0, 2)).parent == known.id
