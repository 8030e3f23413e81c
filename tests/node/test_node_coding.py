"""From a policy to codecs."""

import dataclasses

from curve_samples import GROUPS, calibration, shard, tensors

from kvferry.codec.centroid import CentroidCodec
from kvferry.codec.rope import RopeSpec
from kvferry.errors import CalibrationMissingError
from kvferry.node.coding import page_coding
from kvferry.proto.v1 import coordinator_pb2 as pb

ROPE = RopeSpec(4, False, (1.0, 0.5))
POLICY = pb.Policy(
    name="own", rules=[pb.LayerRule(codec="centroid", options={"ratio": "4", "window": "16"})]
)


def test_centroid_is_told_by_the_calibration_how_keys_rotate() -> None:
    known, plain = calibration()
    ropes = {"k": (ROPE, ROPE)}
    groups = {name: dataclasses.replace(group, ropes=ropes) for name, group in plain.items()}
    coded = page_coding(POLICY, shard((0, 4)), known, lambda found, _, __: groups[found])
    assert [part.layers for part in coded] == list(GROUPS)
    for part in coded:
        assert isinstance(part.codec, CentroidCodec)
        assert part.codec.ropes == (ROPE, ROPE)
        assert part.codec.params["ratio"] == 4
        assert part.codec.encode(tensors(part.layers, (0, 64))).entries == 16


def test_without_a_calibration_nobody_knows_and_eight_bits_take_its_place() -> None:
    def missing(found: bytes, layers: object, heads: object) -> None:
        raise CalibrationMissingError("")

    known, _ = calibration()
    for source in (None, known):
        coded = page_coding(POLICY, shard((0, 4)), source, missing)  # type: ignore[arg-type]
        assert {(part.codec.name, part.codec.params["bits"]) for part in coded} == {("affine", 8)}
        part = coded[0]
        assert part.codec.encode(tensors(part.layers, (0, 64))).sections


def test_bitpack_takes_its_options_from_the_rule() -> None:
    rule = pb.LayerRule(codec="bitpack", options={"bits": "8", "page_size_kb": "16"})
    coded = page_coding(pb.Policy(name="own", rules=[rule]), shard((0, 4)), None, None)  # type: ignore[arg-type]
    assert [part.codec.params["page_size_kb"] for part in coded] == [16]
    assert coded[0].codec.encode(tensors((0, 4), (256, 512))).sections
