"""From a policy to codecs: which layers of a shard are coded together, and how."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from kvferry.cluster.policy import layer_rules
from kvferry.codec.base import RING_KEYS, RING_VALUES, Codec
from kvferry.codec.calibration import CalibrationSet, GroupCalibration, layer_groups
from kvferry.codec.registry import make_codec
from kvferry.codec.unrotating import UnrotatingCodec
from kvferry.errors import CodecError
from kvferry.proto.keys import DEFAULT_PAGE_TOKENS, pages_behind_window, root_key
from kvferry.proto.v1 import coordinator_pb2

NOT_STORED = "none"
UNCALIBRATED = ("affine", {"bits": 8})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank holds of which model. Ranges absolute, half-open.

    Attributes:
        layers: page layers, those with rows of tokens; (a, a) where there are none.
        states: state layers, likewise.
        state_part: tensor-parallel ranks divide states: which part this is, of how many.
        writes_rows: False: another rank holds the same rows and stores them.
    """

    model_id: bytes
    model_layers: int
    model_heads: int
    head_dim: int
    layers: tuple[int, int]
    heads: tuple[int, int]
    page_tokens: int = DEFAULT_PAGE_TOKENS
    model_states: int = 0
    states: tuple[int, int] = (0, 0)
    state_part: tuple[int, int] = (0, 1)
    writes_rows: bool = True

    def pages_before_tail(self, tokens: int) -> int:
        """Pages of a sequence that are coded as pages; without page layers there are none."""
        return pages_behind_window(tokens, self.page_tokens) if self.model_layers else 0

    def root(self, salt: bytes) -> bytes:
        """Root of the key chain in the namespace of ``salt``."""
        return root_key(salt, self.model_id, self.page_tokens)


@dataclass(frozen=True, slots=True)
class CodedRange:
    """Layers that go into one blob, and the codec that writes it."""

    layers: tuple[int, int]
    codec: Codec


CutGroup = Callable[[bytes, tuple[int, int], tuple[int, int]], GroupCalibration]


def page_coding(
    policy: coordinator_pb2.Policy,
    shard: Shard,
    calibration: CalibrationSet | None,
    cut_group: CutGroup,
    node: str = "",
    lowrank: GroupCalibration | None = None,
) -> list[CodedRange]:
    """How each page of ``shard`` is to be coded; empty: the policy stores nothing.

    Layers are cut where the policy's rules change, at group boundaries and at the
    shard's ends, so that blobs do not depend on which machine holds which layer unless
    a machine holds a part of a group.

    Args:
        calibration: of this model; None: ``ferry``, and ``centroid``, which asks it how
            keys are rotated, give way to 8-bit ``affine``.
        lowrank: of this whole model, for ``lowrank``, which without it gives way likewise.
        cut_group: (group id, layers, heads) -> calibration of just that part.
        node: id of the node that codes them.
    Raises:
        ConfigError: a rule names options that its codec does not have.
    """
    whole = layer_rules(policy, shard.model_id, (0, shard.model_layers), node)
    if any(rule.codec == NOT_STORED for _, rule in whole):
        return []  # a page that lacks layers is never complete, so none is worth writing
    coded: list[CodedRange] = []
    for group, group_id in _groups(shard, calibration):
        for span, rule in whole:
            layers = _overlap(_overlap(span, group), shard.layers)
            if layers[0] < layers[1]:
                if rule.codec == "lowrank":
                    codec = _lowrank(rule, layers, shard, lowrank, cut_group)
                else:
                    codec = _codec(rule, layers, shard, calibration, group_id, cut_group)
                coded.append(CodedRange(layers, codec))
    return coded


def stores(policy: coordinator_pb2.Policy, shard: Shard) -> bool:
    """Whether anything of this model is to be stored."""
    whole = layer_rules(policy, shard.model_id, (0, max(1, shard.model_layers)))
    return all(rule.codec != NOT_STORED for _, rule in whole)


def uses(policy: coordinator_pb2.Policy, codec: str) -> bool:
    """Whether a rule of a policy names a codec."""
    return any(rule.codec == codec for rule in policy.rules)


def exact(policy: coordinator_pb2.Policy) -> bool:
    """Whether no rule of a policy changes a bit, nor its tail."""
    names = {rule.codec for rule in policy.rules} | {policy.tail.codec or "affine"}
    return names <= {"raw", "zstd", "recompute", NOT_STORED}


def state_codec(streams: Collection[str], tail: Codec) -> Codec:
    """Rings are cached keys and values, and coded as tails are. Recurrent state is exact:
    an error in it stays for all tokens to come."""
    return tail if {RING_KEYS, RING_VALUES} == set(streams) else make_codec("zstd", {})


def tail_codec(policy: coordinator_pb2.Policy) -> Codec | None:
    """The tail's codec; None: tails are recomputed."""
    name = policy.tail.codec or "affine"
    return None if name == "recompute" else make_codec(name, dict(policy.tail.options))


def _groups(
    shard: Shard, calibration: CalibrationSet | None
) -> Sequence[tuple[tuple[int, int], bytes]]:
    if calibration is not None:
        return [(group.layers, group.id) for group in calibration.groups]
    if not shard.model_layers:
        return []
    spans = layer_groups(shard.model_layers, shard.model_heads, shard.head_dim)
    return [(span, b"") for span in spans]


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return max(a[0], b[0]), min(a[1], b[1])


def _codec(
    rule: coordinator_pb2.LayerRule,
    layers: tuple[int, int],
    shard: Shard,
    calibration: CalibrationSet | None,
    group_id: bytes,
    cut_group: CutGroup,
) -> Codec:
    options: dict[str, object] = dict(rule.options)
    plain = None if rule.codec == "ferry" else make_codec(rule.codec, options)
    if plain is not None and not isinstance(plain, UnrotatingCodec):
        return plain
    if calibration is None:
        return make_codec(*UNCALIBRATED)
    try:
        part = cut_group(group_id, layers, shard.heads)
    except CodecError:
        return make_codec(*UNCALIBRATED)
    return make_codec(rule.codec, options, part, calibration.curve)


def _lowrank(
    rule: coordinator_pb2.LayerRule,
    layers: tuple[int, int],
    shard: Shard,
    lowrank: GroupCalibration | None,
    cut_group: CutGroup,
) -> Codec:
    if lowrank is None:
        return make_codec(*UNCALIBRATED)
    try:
        part = cut_group(lowrank.id, layers, shard.heads)
    except CodecError:
        return make_codec(*UNCALIBRATED)
    return make_codec(rule.codec, dict(rule.options), part)
