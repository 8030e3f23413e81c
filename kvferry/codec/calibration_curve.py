"""What a calibration was measured to cost: bits against KL, by step, stream and text.

The codec's transform is weighted so that squared error is predicted KL (design 6.1):
every layer group and stream has the same unit, nats per predicted token, and they add
up. `RateDistortion` holds that prediction for each of them beside what the model was
measured to lose on several texts, so that one can see how far a prediction holds.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvferry.codec import calibration_format as fmt
from kvferry.errors import ConfigError
from kvferry.proto.keys import MAX_LAYERS

RATES_VERSION = 1
MAX_CURVE_POINTS = 4096
MAX_STREAM_CURVES = 64 * MAX_LAYERS
MAX_TEXTS = 64
# A step for a KL is one that so large a share of the measured texts keeps to; of fewer
# than ten texts that is all of them.
SAFE_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One measured point: step, stored bits per value, mean KL in nats."""

    step: float
    bits_per_value: float
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCurve:
    """One stream of one layer group; the tuples follow ``RateDistortion.steps``.

    Attributes:
        layers: absolute, half-open.
        stream: "k", "v", ...
        width: values of one token.
        bits: stored bits per value, headers included.
        kl: predicted share of the model's mean KL in nats: the squared error of what
            was decoded, in the metric of the weights, mean over tokens.
    """

    layers: tuple[int, int]
    stream: str
    width: int
    bits: tuple[float, ...]
    kl: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextCurve:
    """One text that the bases were not fitted on; tuples follow ``RateDistortion.steps``.

    Attributes:
        name: what kind of text, for people.
        tokens: predicted tokens that ``kl`` is the mean of.
        bits: stored bits per value of the whole model, headers included.
        kl: measured mean KL in nats.
        predicted: the sum of all streams' predictions on this text.
    """

    name: str
    tokens: int
    bits: tuple[float, ...]
    kl: tuple[float, ...]
    predicted: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """How predictions held: measured KL / predicted KL, over all texts and steps.

    Attributes:
        median: of all ratios.
        worst: the one furthest from 1, either way.
    """

    median: float
    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RateDistortion:
    """The curves of a `CalibrationSet`.

    Attributes:
        steps: falling.
        streams: by layer group, then stream.
        texts: what it was measured on.
    """

    steps: tuple[float, ...]
    streams: tuple[StreamCurve, ...]
    texts: tuple[TextCurve, ...]

    def problem(self, groups: Sequence[tuple[int, int]]) -> str:
        """Why this cannot be the curves of these layer groups; empty if it can."""
        count = len(self.steps)
        if not count or any(b >= a for a, b in itertools.pairwise(self.steps)):
            return "its steps do not fall"
        columns = [self.steps]
        for stream in self.streams:
            if stream.layers not in groups or stream.width < 1:
                return f"a curve is of layers {stream.layers}, which are no group"
            columns += [stream.bits, stream.kl]
        for text in self.texts:
            if text.tokens < 1:
                return f"text {text.name!r} has no tokens"
            columns += [text.bits, text.kl, text.predicted]
        if any(len(column) != count for column in columns):
            return "its curves differ in length"
        if not all(math.isfinite(n) and n >= 0 for column in columns for n in column):
            return "its curves hold a number that cannot be"
        return ""

    @property
    def prediction(self) -> Prediction | None:
        """None where nothing was both predicted and measured."""
        ratios = sorted(
            measured / predicted
            for text in self.texts
            for measured, predicted in zip(text.kl, text.predicted, strict=True)
            if measured > 0 and predicted > 0
        )
        if not ratios:
            return None
        middle = len(ratios) // 2
        median = math.sqrt(ratios[middle] * ratios[-1 - middle])
        return Prediction(median, max(ratios, key=lambda ratio: abs(math.log(ratio))))

    def of_group(self, layers: tuple[int, int]) -> dict[str, StreamCurve]:
        """Stream name -> curve of one layer group."""
        return {curve.stream: curve for curve in self.streams if curve.layers == layers}

    def safe_curve(self) -> tuple[CurvePoint, ...]:
        """Per step the mean bits, and a KL that `SAFE_SHARE` of the texts stay within."""
        points = []
        for index, step in enumerate(self.steps):
            costs = sorted(text.kl[index] for text in self.texts)
            bits = [text.bits[index] for text in self.texts]
            if costs:
                kl = costs[math.ceil(SAFE_SHARE * len(costs)) - 1]
                points.append(CurvePoint(step, sum(bits) / len(bits), kl))
        return tuple(points)

    def to_json(self) -> dict[str, object]:
        """What is stored."""
        prediction = self.prediction
        return {
            "version": RATES_VERSION,
            "steps": _floats(self.steps),
            "streams": [
                {
                    "layers": list(s.layers),
                    "stream": s.stream,
                    "width": s.width,
                    "bits": _floats(s.bits),
                    "kl": _floats(s.kl),
                }
                for s in self.streams
            ],
            "texts": [
                {
                    "name": t.name,
                    "tokens": t.tokens,
                    "bits": _floats(t.bits),
                    "kl": _floats(t.kl),
                    "predicted": _floats(t.predicted),
                }
                for t in self.texts
            ],
            "prediction": None
            if prediction is None
            else {"median": prediction.median, "worst": prediction.worst},
        }

    @classmethod
    def from_fields(cls, fields: fmt.Fields) -> "RateDistortion":
        """Raises: CalibrationCorruptError; UnsupportedVersionError."""
        fields.version(RATES_VERSION, "rate-distortion curves")
        streams, texts = fields.objects("streams"), fields.objects("texts")
        if len(streams) > MAX_STREAM_CURVES or len(texts) > MAX_TEXTS:
            raise fields.fail("streams")
        return cls(
            steps=fields.numbers("steps", MAX_CURVE_POINTS),
            streams=tuple(
                StreamCurve(
                    layers=s.range("layers"),
                    stream=s.text("stream"),
                    width=s.integer("width", 1),
                    bits=s.numbers("bits", MAX_CURVE_POINTS),
                    kl=s.numbers("kl", MAX_CURVE_POINTS),
                )
                for s in streams
            ),
            texts=tuple(
                TextCurve(
                    name=t.text("name"),
                    tokens=t.integer("tokens", 1),
                    bits=t.numbers("bits", MAX_CURVE_POINTS),
                    kl=t.numbers("kl", MAX_CURVE_POINTS),
                    predicted=t.numbers("predicted", MAX_CURVE_POINTS),
                )
                for t in texts
            ),
        )


def _floats(column: Sequence[float]) -> list[float]:
    return [float(value) for value in column]  # an int would read back as another text


def total_prediction(streams: Sequence[StreamCurve]) -> tuple[float, ...]:
    """The whole model's predicted KL at each step: contributions add up."""
    return tuple(math.fsum(column) for column in zip(*(s.kl for s in streams), strict=True))


def mean_curves(texts: Sequence[Sequence[StreamCurve]]) -> tuple[StreamCurve, ...]:
    """Curves of the same streams, measured on several texts, as one each."""
    by_stream: Mapping[tuple[tuple[int, int], str], list[StreamCurve]] = {
        (curve.layers, curve.stream): [] for curve in (texts[0] if texts else ())
    }
    for curves in texts:
        for curve in curves:
            by_stream[curve.layers, curve.stream].append(curve)
    return tuple(
        StreamCurve(
            layers=layers,
            stream=stream,
            width=same[0].width,
            bits=_means([curve.bits for curve in same]),
            kl=_means([curve.kl for curve in same]),
        )
        for (layers, stream), same in by_stream.items()
    )


def _means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(math.fsum(column) / len(rows) for column in zip(*rows, strict=True))


def step_on_curve(curve: Sequence[CurvePoint], target_kl: float) -> float:
    """Coarsest step whose predicted mean KL is at most ``target_kl`` nats.

    Interpolated between measured points, both axes logarithmic. A target above all
    points gives the coarsest step measured. One below all of them scales the finest
    down by the square root: small errors cost KL in proportion to their square.

    Raises: ConfigError: no curve, or a target that is no number above 0.
    """
    if not (math.isfinite(target_kl) and target_kl > 0):
        raise ConfigError("target_kl", target_kl, "a number of nats above 0")
    points = sorted((p for p in curve if p.kl > 0), key=lambda p: p.step)
    if not points:
        raise ConfigError("target_kl", target_kl, "left out: this calibration has no curve")
    if target_kl <= points[0].kl:
        return points[0].step * math.sqrt(target_kl / points[0].kl)
    for low, high in itertools.pairwise(points):
        if low.kl <= target_kl < high.kl:
            share = math.log(target_kl / low.kl) / math.log(high.kl / low.kl)
            return float(low.step * (high.step / low.step) ** share)
    return max(points, key=lambda p: p.step if p.kl <= target_kl else 0.0).step
