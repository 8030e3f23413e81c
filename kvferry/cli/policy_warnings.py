"""What people should know of a policy that they put in force."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvferry.proto.v1 import coordinator_pb2 as pb


def policy_warnings(policy: "pb.Policy") -> list[str]:
    """One line for each thing that its rules cost and that is easily missed."""
    from kvferry.cluster.policy_rules import dropping_codecs
    from kvferry.codec.lowrank_options import warning

    told = [
        f"{codec} drops tokens: pages stored by it are never put back into a live cache, "
        "so prompts are prefilled every time"
        for codec in dropping_codecs(policy)
    ]
    told += (warning(rule.options) for rule in policy.rules if rule.codec == "lowrank")
    return [line for line in dict.fromkeys(told) if line]
