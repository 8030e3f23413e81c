"""Which of the blobs that a hook is about to encode shall be stored."""

from collections import Counter
from collections.abc import Sequence

from kvferry.node.second_use import SecondUse
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import node_pb2

WANTED = node_pb2.ADMISSION_WANTED
HELD = node_pb2.ADMISSION_HELD
DECLINED = node_pb2.ADMISSION_DECLINED


def admit(
    keys: Sequence[BlobKey],
    held: Sequence[bool],
    second_use: SecondUse | None,
    counters: Counter[str],
    again: bool = False,
) -> "list[node_pb2.Admission.ValueType]":
    """One answer for each key, in order.

    Args:
        held: which need not be put.
        second_use: None: what is offered for the first time is stored too. Calibrations
            always are.
        again: the same request has offered before: what was declined then still is.
    """
    missing = [key for key, there in zip(keys, held, strict=True) if not there]
    new: set[BlobKey] = set()
    if second_use is not None:
        lasting = [key for key in missing if key.kind != "calibration"]
        new = {key for key in lasting if again or not second_use.seen(key)}
        for key in lasting:
            second_use.note(key)
    counters["declined_first_use"] += len(new)
    return [
        HELD if there else DECLINED if key in new else WANTED
        for key, there in zip(keys, held, strict=True)
    ]
