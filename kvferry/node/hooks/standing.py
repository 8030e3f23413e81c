"""Who this model is to the cluster, and what the cluster wants of it.

The model id needs the digests of all ranks, which are computed in the background after
load; namespace and policy come from the node daemon. Until model id and namespace are
known there are neither hits nor stores.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvferry.cluster.policy import default_policy
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.weights import fingerprint
from kvferry.errors import (
    FerryError,
    IdentityPendingError,
    ModelError,
    NamespaceUnknownError,
    StoreTimeoutError,
)
from kvferry.node.client import NodeClient
from kvferry.node.hooks.group import Group
from kvferry.node.hooks.identity import agreed_model_id
from kvferry.proto.identity import ModelFingerprint
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

_GREET_AGAIN_S = 0.5  # the daemon tells its salt by itself, unless it goes


class Standing:
    """Model id, namespace salt and policy of one rank, as far as they are known.

    Args:
        layers: absolute layers of this rank; ``layer_count`` of the whole model.
        identified: called once, when the model id is known.
        triggered: called when the daemon says that what waits shall be stored, on the
            client's thread.

    Attributes:
        policy: in force on this node.
        salt: of the namespace; empty until the daemon has said it.
        node_id: of this machine's daemon; empty likewise.
        model_id: None until all ranks' digests are known.
    """

    def __init__(
        self,
        client: NodeClient,
        loaded: LoadedModel,
        group: Group,
        layers: tuple[int, int],
        layer_count: int,
        cache_dir: Path,
        *,
        identified: Callable[[], None],
        triggered: Callable[[], None],
    ) -> None:
        self.policy: pb.Policy = default_policy()
        self.salt = b""
        self.node_id = ""
        self.model_id: bytes | None = None
        self._client, self._group, self._layer_count = client, group, layer_count
        self._identified, self._triggered = identified, triggered
        self._fingerprint: ModelFingerprint | None = None
        self._problem = ""
        self._salted = threading.Event()
        self._digest = threading.Thread(
            target=self._digest_weights, args=(loaded, layers, cache_dir), daemon=True
        )
        self._digest.start()

    @property
    def known(self) -> bool:
        """Whether keys can be made."""
        return self.model_id is not None and bool(self.salt)

    def start(self) -> None:
        """Greet the daemon and listen to what it says from then on."""
        self.greet()
        self._client.watch(self._on_event)

    def wait(self, timeout_s: float) -> None:
        """Until this rank's digests and the namespace are there; a collective.

        A daemon that started a moment ago has no salt before its coordinator has answered;
        one that is not there is not waited for.
        """
        end = time.monotonic() + timeout_s
        self._digest.join(timeout_s)
        while not self.salt and self.greet() and not self.salt and time.monotonic() < end:
            self._salted.wait(_GREET_AGAIN_S)
        try:
            self.identify()
        except ModelError as exc:
            log.warning("neither hits nor stores: %s", exc)

    def identify(self) -> None:
        """Exchange digests until the model id is known. Every rank enters it alike.

        Raises: ModelError, on every rank alike.
        """
        if self.model_id is not None:
            return
        self.model_id = agreed_model_id(self._group, self._fingerprint, self._layer_count)
        if self.model_id is not None:
            self._identified()

    def require(self) -> bytes:
        """The model id, once keys can be made. A collective, as `identify`.

        Raises: IdentityPendingError, NamespaceUnknownError, ModelError.
        """
        self.identify()
        if not self.salt:
            self.greet()
        if self.model_id is None:
            raise IdentityPendingError(self._problem or "digest not ready yet")
        if not self.salt:
            raise NamespaceUnknownError("the node daemon has no namespace salt yet")
        return self.model_id

    def greet(self) -> bool:
        """Ask the daemon for namespace and policy. False: none is there, which is no error."""
        try:
            hello = self._client.hello()
        except FerryError as exc:
            log.info("node daemon: %s", exc)
            return isinstance(exc, StoreTimeoutError)
        self.salt, self.node_id = hello.namespace_salt, hello.node_id
        if hello.policy.version:
            self.policy = hello.policy
        return True

    def _digest_weights(
        self, loaded: LoadedModel, layers: tuple[int, int], cache_dir: Path
    ) -> None:
        try:
            self._fingerprint = fingerprint(loaded, layers, cache_dir=cache_dir)
        except (ModelError, OSError) as exc:
            self._problem = str(exc)
            log.warning("no digest of the weights, so neither hits nor stores: %s", exc)

    def _on_event(self, event: Any) -> None:
        """Runs on the client's thread."""
        kind = event.WhichOneof("event")
        if kind == "policy":
            self.policy = event.policy
        elif kind == "namespace_salt":
            self.salt = event.namespace_salt
            self._salted.set()
        elif kind == "trigger" and event.trigger in self.policy.when:
            self._triggered()
