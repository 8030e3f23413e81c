"""Rate-distortion curves on their way to the coordinator: checked, capped, asked for once."""

import copy
from collections.abc import Callable

import pytest
from optimizer_samples import curve

from kvferry.cluster.curves import MAX_CURVES, CurveBook, check_curve, curve_id
from kvferry.errors import ProtocolError
from kvferry.proto.v1 import coordinator_pb2 as pb


def test_a_curve_is_known_by_its_content() -> None:
    assert curve_id(curve()) == curve_id(copy.deepcopy(curve()))
    other = curve()
    other.groups[1].kl[0] *= 1.001
    assert curve_id(other) != curve_id(curve())
    check_curve(curve(measured=[0.1, 0.05, 0.01]))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: setattr(c, "model_id", b"x"), "no digest"),
        (lambda c: setattr(c, "model_layers", 0), "layers and heads"),
        (lambda c: setattr(c, "model_layers", 9), "do not cover"),
        (lambda c: setattr(c, "model_heads", 1 << 20), "layers and heads"),
        (lambda c: c.steps.reverse(), "falling"),
        (lambda c: c.steps.append(1e-5), "points"),
        (lambda c: c.steps.__setitem__(2, 0.0), "step"),
        (lambda c: c.steps.extend(1e-3 / n for n in range(2, 99)), "falling steps"),
        (lambda c: c.measured_kl.append(1.0), "measured"),
        (lambda c: c.measured_kl.extend([1.0, float("nan"), 1.0]), "measured"),
        (lambda c: c.groups.pop(), "do not cover"),
        (lambda c: setattr(c.groups[1], "layer_start", 5), "layer by layer"),
        (lambda c: setattr(c.groups[1], "layer_end", 4), "layer by layer"),
        (lambda c: setattr(c.groups[0], "width", 0), "without values"),
        (lambda c: c.groups[0].kl.pop(), "points"),
        (lambda c: c.groups[0].kl.__setitem__(0, -1.0), "number"),
        (lambda c: c.groups[0].bits_per_token.__setitem__(0, float("inf")), "number"),
        (lambda c: c.groups[0].kl.extend([0.0] * 100_000), "bytes"),
        (lambda c: c.groups.clear(), "layer groups"),
    ],
)
def test_what_can_be_no_curve_is_refused(
    change: Callable[[pb.ModelCurve], object], part: str
) -> None:
    made = curve()
    change(made)
    with pytest.raises(ProtocolError, match=part):
        check_curve(made)


def test_a_curve_is_asked_for_once_and_again_if_nobody_tells() -> None:
    now = [0.0]
    book, made = CurveBook(lambda: now[0]), curve()
    shard = pb.ShardInfo(model_id=made.model_id, curve_id=curve_id(made))
    assert book.wanted([pb.ShardInfo(), shard]) == [curve_id(made)]
    assert book.wanted([shard]) == []  # another node's heartbeat: the first was asked
    now[0] += 6
    assert book.wanted([shard, shard]) == [curve_id(made)]
    assert book.get(curve_id(made)) is None
    book.learn([made])
    assert book.wanted([shard]) == []
    assert book.get(curve_id(made)) == made


def test_no_more_than_so_many_curves_are_kept() -> None:
    book = CurveBook()
    first = curve(width=1)
    book.learn([first])
    for width in range(2, MAX_CURVES + 1):
        book.learn([curve(width=width)])
        assert book.get(curve_id(first)) is not None  # used, so it stays
    book.learn([curve(width=9999), curve(width=9998)])
    assert book.get(curve_id(first)) is not None
    assert book.get(curve_id(curve(width=2))) is None
