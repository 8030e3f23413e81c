"""What this node tells the coordinator, and what it does with the answers."""

import asyncio
import logging
import shutil
from collections import Counter
from pathlib import Path

from kvferry import __version__
from kvferry.cluster.credentials import PLAINTEXT, Credentials
from kvferry.node.coordinator_link import CoordinatorLink, Reply
from kvferry.node.departure import Departure
from kvferry.node.events import EventHub
from kvferry.node.exo_watch import ExoWatch
from kvferry.node.hook_service import NodeFacts
from kvferry.node.link_table import LinkTable
from kvferry.node.pressure import memory_used_share
from kvferry.node.remotes import Peers
from kvferry.node.state import NodeState
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.proto.v1 import node_pb2

log = logging.getLogger(__name__)

MAX_COUNTERS = 256


class Coordination:
    """Belongs to the event loop.

    Attributes:
        own_address: where peers reach this node.
    """

    def __init__(
        self,
        facts: NodeFacts,
        state: NodeState,
        data_dir: Path,
        hub: EventHub,
        peers: Peers,
        links: LinkTable,
        departure: Departure,
        exo: ExoWatch,
        counters: Counter[str],
    ) -> None:
        self._facts, self._state, self._data_dir, self._hub = facts, state, data_dir, hub
        self._peers, self._links, self._departure = peers, links, departure
        self._exo, self._counters = exo, counters
        self.own_address = ""

    def link(self, address: str, credentials: Credentials = PLAINTEXT) -> CoordinatorLink:
        """A link to the coordinator at ``address``; empty: not known yet."""
        made = CoordinatorLink(
            address,
            self._facts.node_id,
            self._facts.incarnation,
            self._greet,
            self._beat,
            self._on_reply,
            self._on_policy,
            credentials,
        )
        self._departure.link = made
        return made

    def _greet(self) -> pb.RegisterRequest:
        return pb.RegisterRequest(
            address=self.own_address,
            version=__version__,
            policy_version=self._facts.policy.version,
            shards=list(self._facts.shards.values()),
            namespace_salt=self._facts.salt,
            draining=self._departure.draining,
        )

    def _beat(self) -> pb.HeartbeatRequest:
        facts = self._facts
        return pb.HeartbeatRequest(
            memory_used_share=memory_used_share(),
            free_disk_bytes=_free_bytes(self._data_dir),
            prefill_tokens_per_s=facts.prefill_tokens_per_s,
            decode_tokens_per_s=facts.decode_tokens_per_s,
            links=self._links.samples(),
            shards=list(facts.shards.values()),
            policy_version=facts.policy.version,
            decode_values_per_s=facts.decode_values_per_s,
            near_bytes_per_s=facts.near_bytes_per_s,
            counters=dict(self._counters.most_common(MAX_COUNTERS)),
            phase=self._departure.phase if facts.salt else pb.NODE_PHASE_JOINING,
            drained=self._departure.drained,
            exo=self._exo.state,
            curves=[c for i, c in facts.curves.items() if i in facts.curves_wanted],
        )

    async def _on_reply(self, reply: Reply) -> None:
        await self._peers.update(reply.peers, reply.partial_peers)
        if isinstance(reply, pb.HeartbeatReply):
            self._departure.wanted(reply.drain)
            self._facts.curves_wanted = tuple(reply.wanted_curves)
        elif reply.namespace_salt != self._facts.salt:
            self._facts.salt = reply.namespace_salt
            await asyncio.to_thread(self._state.save_salt, reply.namespace_salt)
            self._hub.publish(node_pb2.NodeEvent(namespace_salt=reply.namespace_salt))

    async def _on_policy(self, policy: pb.Policy) -> None:
        if policy == self._facts.policy:
            return
        log.info("policy %s, version %d", policy.name, policy.version)
        self._facts.policy = policy
        self._hub.publish(node_pb2.NodeEvent(policy=policy))
        await asyncio.to_thread(self._state.save_policy, policy)

    async def on_restore(self, report: pb.RestoreReport) -> None:
        """Pass a hook's report on to the coordinator."""
        link = self._departure.link
        if link is not None and link.reachable:
            report.node_id = self._facts.node_id
            await link.report(report)


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
