"""A calibration's rate-distortion curves in the words of the coordinator."""

from collections.abc import Mapping, Sequence

from kvferry.cluster.curves import MAX_POINTS
from kvferry.codec.calibration import CalibrationSet, StreamCurve
from kvferry.proto.v1 import coordinator_pb2 as pb


def model_curve(calibration: CalibrationSet) -> pb.ModelCurve | None:
    """Curves per layer group; None: this calibration has none.

    One that was only estimated has none either: with identity weights, steps of different
    groups cannot be compared.
    """
    rates = calibration.rates
    if rates is None or not rates.streams or len(rates.steps) > MAX_POINTS:
        return None
    safe = {point.step: point.kl for point in rates.safe_curve()}
    groups = []
    for entry in calibration.groups:
        streams = rates.of_group(entry.layers)
        if not streams:
            return None
        groups.append(_group(entry.layers, streams, len(rates.steps)))
    return pb.ModelCurve(
        model_id=calibration.model_id,
        model_layers=calibration.model_layers,
        model_heads=calibration.model_heads,
        steps=rates.steps,
        measured_kl=_measured(rates.steps, safe),
        groups=groups,
    )


def _measured(steps: Sequence[float], safe: Mapping[float, float]) -> list[float]:
    return [safe[step] for step in steps] if len(safe) == len(steps) else []


def _group(
    layers: tuple[int, int], streams: Mapping[str, StreamCurve], points: int
) -> pb.GroupCurve:
    curves = list(streams.values())
    return pb.GroupCurve(
        layer_start=layers[0],
        layer_end=layers[1],
        width=sum(curve.width for curve in curves),
        bits_per_token=[sum(c.width * c.bits[i] for c in curves) for i in range(points)],
        kl=[sum(c.kl[i] for c in curves) for i in range(points)],
    )
