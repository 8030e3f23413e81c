"""The gRPC service Peer: what other node daemons ask of this one."""

from collections.abc import Callable

import grpc

from kvferry.cluster.handlers import unary
from kvferry.cluster.server import Service
from kvferry.node.holdings import Holdings
from kvferry.node.take_over import TakeOvers
from kvferry.proto.v1 import peer_pb2

SERVICE = "kvferry.v1.Peer"


class PeerServicer:
    """One method for each call of the service."""

    def __init__(self, holdings: Holdings, take_overs: TakeOvers) -> None:
        self._holdings, self._take_overs = holdings, take_overs

    async def holdings(self, request: peer_pb2.HoldingsRequest) -> peer_pb2.HoldingsReply:
        """Holdings."""
        return self._holdings.reply(request.version)

    async def take_over(self, request: peer_pb2.TakeOverRequest) -> peer_pb2.TakeOverReply:
        """TakeOver."""
        return peer_pb2.TakeOverReply(taken=await self._take_overs.take(request))

    def service(self, on_failure: Callable[[str], None]) -> Service:
        """To be given to `kvferry.cluster.server.start_server`."""
        handlers = {
            "Holdings": unary(self.holdings, peer_pb2.HoldingsRequest, on_failure),
            "TakeOver": unary(self.take_over, peer_pb2.TakeOverRequest, on_failure),
        }
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        return Service(SERVICE, lambda server: server.add_generic_rpc_handlers((generic,)))
