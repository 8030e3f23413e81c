"""What need not be stored again, and a calibration's curves as the coordinator wants them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from curve_samples import BITS, GROUPS, KL, MODEL, STEPS, calibration, shard

from kvferry.cluster.curves import check_curve
from kvferry.cluster.repository import BlobInfo, CodecInfo, LookupQuery, LookupResult
from kvferry.codec.base import Codec
from kvferry.codec.registry import make_codec
from kvferry.errors import StoreUnavailableError
from kvferry.node.already import complete_pages, is_stored, stands_in
from kvferry.node.coding import CodedRange
from kvferry.node.curve import model_curve
from kvferry.proto.keys import BlobKey


def info(codec: Codec, layers: tuple[int, int] = (0, 2), **params: object) -> BlobInfo:
    told: Mapping[str, object] = {**codec.params, **params}
    return BlobInfo(
        key=BlobKey("page", b"p" * 32, layers, (0, 2), f"{codec.name}.1-{'0' * 16}"),
        size=10,
        codec=CodecInfo(
            name=codec.name,
            version=codec.version,
            params_json=json.dumps(told),
            calibration_id=codec.calibration_id,
        ),
        model_id=MODEL,
        previous_key=b"r" * 32,
        tokens=(0, 256),
        layers=layers,
        heads=(0, 2),
        model_layers=4,
        model_heads=2,
    )


@pytest.fixture(scope="module")
def ferry() -> dict[float, Codec]:
    _, groups = calibration()
    first = next(g for g in groups.values() if g.layers == (0, 2))
    return {step: make_codec("ferry", {"step": step}, first) for step in (0.5, 1.0)}


def test_somewhat_finer_is_good_enough_and_coarser_or_far_larger_is_not(
    ferry: dict[float, Codec],
) -> None:
    fine, coarse = ferry[0.5], ferry[1.0]
    eight, four = make_codec("affine", {"bits": 8}), make_codec("affine", {"bits": 4})
    exact = make_codec("zstd", {})
    order = [exact, fine, coarse]
    for place, stored in enumerate(order):
        for wanted in range(place):
            assert not stands_in(info(stored).codec, order[wanted])
        assert stands_in(info(stored).codec, stored)
    assert stands_in(info(fine).codec, coarse)
    assert not stands_in(info(fine, step=0.01).codec, coarse)  # many times its bytes
    assert not stands_in(info(exact).codec, coarse)
    assert not stands_in(info(eight).codec, coarse)
    assert not stands_in(info(four).codec, coarse)
    assert stands_in(info(make_codec("raw", {})).codec, exact)
    assert stands_in(info(exact).codec, eight)
    assert not stands_in(info(exact).codec, four)
    assert stands_in(info(eight).codec, four)
    assert not stands_in(info(four).codec, eight)
    assert not stands_in(info(eight).codec, exact)
    assert not stands_in(info(coarse).codec, eight)
    packed = {bits: make_codec("bitpack", {"bits": bits}) for bits in (6, 8)}
    assert stands_in(info(packed[8]).codec, packed[6])
    assert not stands_in(info(packed[6]).codec, packed[8])
    assert not stands_in(info(packed[8]).codec, four)


def test_what_cannot_be_compared_is_not_good_enough(ferry: dict[float, Codec]) -> None:
    codec = ferry[1.0]
    known = info(codec).codec
    for other in (
        replace(known, calibration_id=b"c" * 32),  # its steps are others
        replace(known, version=1),
        replace(known, params_json="{"),
        replace(known, params_json="[]"),
        replace(known, params_json='{"step": "fine", "adapt": 1}'),
        replace(known, name="kvtc"),
        info(codec, adapt=0.123).codec,
    ):
        assert not stands_in(other, codec)
    assert stands_in(known, codec)


def test_blobs_of_other_splits_count_where_they_cover() -> None:
    exact, held = make_codec("raw", {}), shard((0, 4))
    wanted = CodedRange((0, 3), make_codec("zstd", {}))
    assert is_stored([info(exact, (0, 1)), info(exact, (1, 4))], wanted, held)
    assert not is_stored([info(exact, (0, 1)), info(exact, (2, 4))], wanted, held)
    assert not is_stored([], wanted, held)


class Asked:
    def __init__(self, answer: LookupResult | None) -> None:
        self.answer = answer

    def lookup(self, query: LookupQuery) -> LookupResult:
        if self.answer is None:
            raise StoreUnavailableError("store")
        return self.answer


def test_only_what_the_store_says_is_complete_counts(ferry: dict[float, Codec]) -> None:
    pages: Sequence[Sequence[BlobInfo]] = [[info(ferry[1.0])]]
    arguments = (b"r" * 32, [b"p" * 32], shard((0, 2)), frozenset({"ferry"}))
    whole, part = LookupResult(pages=pages), LookupResult(pages=pages, partial=True)
    assert complete_pages(Asked(whole), *arguments) == pages
    assert complete_pages(Asked(part), *arguments) == []
    assert complete_pages(Asked(None), *arguments) == []


def test_a_calibrations_curves_reach_the_coordinator_by_layer_group() -> None:
    made, _ = calibration()
    curve = model_curve(made)
    assert curve is not None
    check_curve(curve)
    assert tuple(curve.steps) == STEPS
    assert tuple(curve.measured_kl) == tuple(4 * kl for kl in KL)
    assert [(g.layer_start, g.layer_end, g.width) for g in curve.groups] == [
        (*layers, 256) for layers in GROUPS
    ]
    assert list(curve.groups[0].bits_per_token) == [256 * bits for bits in BITS]
    assert list(curve.groups[0].kl) == [2 * kl for kl in KL]
    assert model_curve(replace(made, rates=None)) is None
