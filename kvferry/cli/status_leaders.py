"""What ``kvferry status`` says of several coordinators: who leads, who stands by."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvferry.errors import FerryError
    from kvferry.proto.v1 import coordinator_pb2 as pb


def roles(said: "Mapping[str, pb.LeadershipReply | FerryError]") -> list[dict[str, Any]]:
    """One for each address, in the words of ``--json``."""
    from kvferry.errors import FerryError

    return [
        {"address": address, "role": "down", "problem": str(one)}
        if isinstance(one, FerryError)
        else {
            "address": address,
            "role": one.role,
            "term": one.term,
            "policy_version": one.policy_version,
            "version": one.version,
        }
        for address, one in said.items()
    ]


def somebody_leads(found: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of them can be asked about the cluster, or none is there at all."""
    return any(one["role"] in ("leader", "alone") for one in found) or all(
        one["role"] == "down" for one in found
    )


def leaderless(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The answer for a cluster that nobody leads: all that is known of it."""
    return {
        "coordinators": list(found), "term": 0, "policy_name": "", "policy_version": 0,
        "members": [],
    }  # fmt: skip


def words(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """For the screen; nothing where there is only one, and it is alone."""
    if [one["role"] for one in found] == ["alone"]:
        return []
    told = []
    for one in found:
        term = f", term {one['term']}" if one["role"] == "leader" else ""
        told.append(f"{one['address']}: {one['role']}{term}")
    if not somebody_leads(found):
        told.append("none leads: is etcd there?")
    return told
