"""What people should know of a policy that they put in force."""

import logging
from contextlib import aclosing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvferry.cluster.policy_keeper import PolicyKeeper
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


async def warn_of_file(policies: "PolicyKeeper") -> None:
    """Log what there is to know of every policy that the policy file brings, for ever."""
    version = 0
    async with aclosing(policies.watch()) as watch:
        async for policy in watch:
            if policies.source == "file" and policy.version != version:
                version = policy.version
                for line in policy_warnings(policy):
                    logging.getLogger(__name__).warning("policy file: %s", line)
