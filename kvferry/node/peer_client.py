"""What a node daemon asks of another one, beside its blobs."""

from typing import TYPE_CHECKING

from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.status import rpc_errors
from kvferry.proto.v1 import peer_pb2
from kvferry.proto.v1.peer_pb2_grpc import PeerStub

if TYPE_CHECKING:
    from kvferry.proto.v1.peer_pb2_grpc import PeerAsyncStub


class PeerClient:
    """The service Peer over the connection of a blob client.

    Raises in every call: StoreUnavailableError, StoreTimeoutError, ProtocolError (a peer of
    an older release does not have the service).
    """

    def __init__(self, blobs: BlobStoreClient) -> None:
        self._address = blobs.address
        self._stub: PeerAsyncStub = PeerStub(blobs.channel)

    async def holdings(self, version: int, timeout_s: float) -> peer_pb2.HoldingsReply:
        """What it holds, unless that is still ``version``."""
        request = peer_pb2.HoldingsRequest(version=version)
        with rpc_errors(self._address):
            return await self._stub.Holdings(request, timeout=timeout_s)

    async def take_over(
        self, request: peer_pb2.TakeOverRequest, timeout_s: float
    ) -> peer_pb2.TakeOverReply:
        """Have it fetch blobs from here. Raises: FencedError."""
        with rpc_errors(self._address):
            return await self._stub.TakeOver(request, timeout=timeout_s)
