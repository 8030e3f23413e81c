"""How this rank's pages are coded now: policy, namespace and calibration made concrete."""

import logging
import threading
from pathlib import Path

from kvferry.cluster.curves import curve_id
from kvferry.codec.calibration import CalibrationSet, GroupCalibration
from kvferry.errors import FerryError
from kvferry.node.calibrations import Calibrations
from kvferry.node.client import NodeClient
from kvferry.node.coding import Shard, page_coding, stores, tail_codec, uses
from kvferry.node.curve import model_curve
from kvferry.node.hooks.part import Part
from kvferry.node.hooks.standing import Standing
from kvferry.node.offer import Coding
from kvferry.proto.keys import namespace_tag
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

DAY_S = 86_400


class CurrentCoding:
    """Kept until policy, namespace or calibration change. Any thread may ask.

    Args:
        part: what this rank holds.
        alone: no other rank has to enter `Standing.identify` with this one.

    Attributes:
        calibrations: of this machine and the cluster.
    """

    def __init__(
        self,
        standing: Standing,
        part: Part,
        client: NodeClient,
        cache_dir: Path,
        *,
        alone: bool,
    ) -> None:
        self._standing = standing
        self._part = part
        self._client, self._cache_dir, self._alone = client, cache_dir, alone
        self.calibrations = Calibrations(client, cache_dir)
        self._lock = threading.Lock()
        self._made_for: tuple[object, ...] = ()
        self._made: Coding | None = None
        self._warming: threading.Thread | None = None

    def now(self) -> Coding | None:
        """None where keys cannot be made yet. Raises: FerryError."""
        standing = self._standing
        if self._alone:
            standing.identify()
        model_id = standing.model_id
        if model_id is None or not standing.salt:
            return None
        calibration = self.calibrations.find(model_id)
        policy = standing.policy
        lowrank = self.calibrations.find_lowrank(model_id) if uses(policy, "lowrank") else None
        known = calibration and calibration.id, lowrank and lowrank.id
        basis = (policy.version, policy.name, standing.node_id, standing.salt, known)
        with self._lock:
            if basis != self._made_for:
                self._made = self._make(model_id, policy, calibration, lowrank)
                self._made_for = basis
            return self._made

    def renew(self) -> None:
        """A calibration was saved on this machine: use and publish it from now on."""
        self.calibrations = Calibrations(self._client, self._cache_dir)
        try:
            self.now()
        except FerryError as exc:
            log.info("the new calibration is published with the next offer: %s", exc)

    def start_warming(self) -> None:
        """Read the calibrations of this shard, so that no request waits for it."""
        self._warming = threading.Thread(target=self._warm_up, daemon=True)
        self._warming.start()

    def wait_warm(self, timeout_s: float) -> None:
        """Until that is done."""
        if self._warming is not None:
            self._warming.join(timeout_s)

    def _warm_up(self) -> None:
        try:
            coding = self.now()
            for coded in coding.pages if coding is not None else ():
                if coded.codec.calibration_id:
                    self.calibrations.warm(coded.codec.calibration_id)
        except FerryError as exc:
            log.info("no warm start: %s", exc)
        except Exception:
            log.exception("no warm start")

    def _make(
        self,
        model_id: bytes,
        policy: pb.Policy,
        calibration: CalibrationSet | None,
        lowrank: GroupCalibration | None,
    ) -> Coding:
        shard = self._part.shard(model_id)
        self._tell(shard, calibration)
        node = self._standing.node_id
        pages = page_coding(policy, shard, calibration, self.calibrations.cut, node, lowrank)
        used = [coded.codec.calibration_id for coded in pages]
        if any(used):
            whole = [] if lowrank is None else [lowrank.id]
            if calibration is not None:
                whole += [*(group.id for group in calibration.groups), calibration.id]
            self.calibrations.publish([*used, *whole])
        tail = tail_codec(policy)
        return Coding(
            shard=shard,
            root=shard.root(self._standing.salt),
            pages=pages,
            tail=tail,
            tail_ttl_s=policy.tail.ttl_s or DAY_S,
            enabled=stores(policy, shard),
            accept=frozenset(policy.accept),
            namespace_tag=namespace_tag(self._standing.salt),
        )

    def _tell(self, shard: Shard, calibration: CalibrationSet | None) -> None:
        """Let the coordinator know which part of the model is here, and what coding it costs."""
        if shard.writes_rows and shard.layers[0] < shard.layers[1]:
            curve = None if calibration is None else model_curve(calibration)
            self._client.tell(
                pb.ShardInfo(
                    model_id=shard.model_id,
                    layer_start=shard.layers[0],
                    layer_end=shard.layers[1],
                    head_start=shard.heads[0],
                    head_end=shard.heads[1],
                    curve_id=b"" if curve is None else curve_id(curve),
                ),
                curve,
            )
