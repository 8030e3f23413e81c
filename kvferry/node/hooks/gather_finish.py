"""From fitted groups to a calibration that this machine and the cluster use."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from kvferry.cluster.repository import BlobInfo, ListQuery
from kvferry.codec.calibration import (
    CalibrationSet,
    GroupCalibration,
    GroupEntry,
    RateDistortion,
    layer_groups,
)
from kvferry.codec.calibration_store import CalibrationStore
from kvferry.codec.lab.estimate import estimated_curve
from kvferry.codec.mlx.shape import ModelShape
from kvferry.errors import CalibrationMissingError, StoreError
from kvferry.node.calibrations import Calibrations, calibration_folder
from kvferry.node.hooks.gather import SOURCE, Made

ASSEMBLE_WAIT_S = 600.0
_ASK_S = 5.0


class ListClient(Protocol):
    """What is asked of the node daemon."""

    def list(self, query: ListQuery) -> list[BlobInfo]:
        """Raises: StoreUnavailableError."""


def finish_alone(made: Made, model_id: bytes, shape: ModelShape, cache_dir: Path) -> CalibrationSet:
    """Save what this machine gathered of a whole model. Raises: CodecError, OSError."""
    return _save(made.groups, made.rates, made.tokens, model_id, shape, cache_dir)


def finish_rank(
    made: Made,
    model_id: bytes,
    shape: ModelShape,
    cache_dir: Path,
    calibrations: Calibrations,
    client: ListClient,
    pause: Callable[[float], bool],
) -> CalibrationSet | None:
    """Publish one rank's groups; the rank with the first layer then puts all together.

    Args:
        pause: waits so many seconds; True: give up.
    Returns: the whole, on the rank with the first layer once all groups are published.
    Raises: FerryError, OSError.
    """
    store = CalibrationStore(cache_dir / "calibrations" / "by-id")
    calibrations.publish([store.put(group) for group in made.groups])
    if made.groups[0].layers[0] != 0:
        return None
    end = time.monotonic() + ASSEMBLE_WAIT_S
    while time.monotonic() < end:
        groups = published_groups(client, calibrations, model_id, shape)
        if groups is not None:
            return _save(groups, None, made.tokens, model_id, shape, cache_dir)
        if pause(_ASK_S):
            break
    return None


def published_groups(
    client: ListClient, calibrations: Calibrations, model_id: bytes, shape: ModelShape
) -> list[GroupCalibration] | None:
    """The newest calibration of each layer group in the store; None: some are missing."""
    try:
        listed = client.list(ListQuery(model_id=model_id, kind="calibration"))
    except StoreError:
        return None
    heads = (0, shape.kv_heads)
    found = []
    for span in layer_groups(shape.layers, shape.kv_heads, shape.head_dim):
        fitting = [i for i in listed if i.codec.name != "manifest"]
        fitting = [i for i in fitting if (i.layers, i.heads) == (span, heads)]
        if not fitting:
            return None
        newest = max(fitting, key=lambda info: (info.stored_unix_s, str(info.key)))
        try:
            found.append(calibrations.get(newest.key.page_key))
        except CalibrationMissingError:
            return None
    return found


def _save(
    groups: Sequence[GroupCalibration],
    rates: RateDistortion | None,
    tokens: int,
    model_id: bytes,
    shape: ModelShape,
    cache_dir: Path,
) -> CalibrationSet:
    made = CalibrationSet(
        model_id=model_id,
        model_layers=shape.layers,
        model_heads=shape.kv_heads,
        groups=tuple(GroupEntry(g.id, g.layers, g.heads) for g in groups),
        curve=estimated_curve(groups) if rates is None else rates.safe_curve(),
        text_source=SOURCE,
        tokens=tokens,
        rates=rates,
    )
    made.save(calibration_folder(cache_dir, model_id), groups)
    return made
