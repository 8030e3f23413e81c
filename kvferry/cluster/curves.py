"""Rate-distortion curves as the coordinator keeps them: soft state, known by content."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from blake3 import blake3

from kvferry.errors import ProtocolError
from kvferry.proto.keys import DIGEST_BYTES, MAX_HEADS, MAX_LAYERS
from kvferry.proto.v1 import coordinator_pb2 as pb

MAX_CURVE_BYTES = 512 << 10
MAX_POINTS = 64
MAX_GROUPS = 4096
MAX_CURVES = 64
MAX_WIDTH = 1 << 24
ASK_AGAIN_S = 5.0


def curve_id(curve: pb.ModelCurve) -> bytes:
    """32 bytes: BLAKE3 of what it says."""
    content = curve.SerializeToString(deterministic=True)
    return blake3(b"kvferry/curve/1" + content).digest()


def check_curve(curve: pb.ModelCurve) -> None:
    """Whether it can be a curve. Raises: ProtocolError."""
    if curve.ByteSize() > MAX_CURVE_BYTES:
        raise ProtocolError(f"curve of {curve.ByteSize():,} bytes: at most {MAX_CURVE_BYTES:,}")
    if problem := _problem(curve):
        raise ProtocolError(f"curve of model {curve.model_id.hex()[:12]}: {problem}")


def _problem(curve: pb.ModelCurve) -> str:
    if len(curve.model_id) != DIGEST_BYTES:
        return "its model id is no digest"
    if not (1 <= curve.model_layers <= MAX_LAYERS and 1 <= curve.model_heads <= MAX_HEADS):
        return "no such number of layers and heads"
    steps, points = curve.steps, len(curve.steps)
    if not 1 <= points <= MAX_POINTS or any(b >= a for a, b in pairwise(steps)):
        return f"1 to {MAX_POINTS} falling steps wanted"
    if not all(1e-30 < step < 1e30 for step in steps):
        return "a step that cannot be"
    if len(curve.measured_kl) not in (0, points) or not _numbers(curve.measured_kl):
        return "what was measured does not go with the steps"
    if not 1 <= len(curve.groups) <= MAX_GROUPS:
        return f"1 to {MAX_GROUPS} layer groups wanted"
    at = 0
    for group in curve.groups:
        if group.layer_start != at or group.layer_end <= at:
            return "its groups do not cover the model layer by layer"
        at = group.layer_end
        if not 1 <= group.width <= MAX_WIDTH:
            return "a group without values"
        if {len(group.bits_per_token), len(group.kl)} != {points}:
            return "a group's points do not go with the steps"
        if not (_numbers(group.bits_per_token) and _numbers(group.kl)):
            return "a number that cannot be"
    return "" if at == curve.model_layers else "its groups do not cover the model"


def _numbers(values: Iterable[float]) -> bool:
    return all(math.isfinite(value) and 0 <= value < 1e30 for value in values)


class CurveBook:
    """The curves of the models that members hold. At most `MAX_CURVES`, the last ones used."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._curves: dict[bytes, pb.ModelCurve] = {}
        self._asked: dict[bytes, float] = {}

    def get(self, identity: bytes) -> pb.ModelCurve | None:
        """None: not told yet."""
        found = self._curves.pop(identity, None)
        if found is not None:
            self._curves[identity] = found
        return found

    def learn(self, curves: Sequence[pb.ModelCurve]) -> None:
        """Take curves in that were checked."""
        for curve in curves:
            identity = curve_id(curve)
            self._asked.pop(identity, None)
            self._curves[identity] = curve
        while len(self._curves) > MAX_CURVES:
            del self._curves[next(iter(self._curves))]

    def wanted(self, shards: Iterable[pb.ShardInfo]) -> list[bytes]:
        """Ids to ask a node for; one that another node was just asked for is left out."""
        now = self._clock()
        wanted = []
        for identity in {s.curve_id for s in shards if s.curve_id} - self._curves.keys():
            if now - self._asked.get(identity, -ASK_AGAIN_S) >= ASK_AGAIN_S:
                self._asked[identity] = now
                wanted.append(identity)
        while len(self._asked) > MAX_CURVES:
            del self._asked[next(iter(self._asked))]
        return wanted[:1]  # one at a time keeps heartbeats small
