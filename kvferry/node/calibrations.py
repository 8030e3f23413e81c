"""Calibrations as a hook needs them: found for a model, fetched by id, published once."""

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from kvferry.cluster.repository import BlobInfo, ListQuery
from kvferry.codec.calibration import CalibrationSet, GroupCalibration
from kvferry.codec.calibration_format import LOWRANK_NAME
from kvferry.codec.calibration_kinds import group_from_blob
from kvferry.codec.calibration_set import SET_FILE
from kvferry.codec.calibration_store import CalibrationStore
from kvferry.codec.lowrank_calibration import LowRankCalibration
from kvferry.errors import (
    CalibrationMissingError,
    CodecError,
    ConfigError,
    FerryError,
    StoreError,
)
from kvferry.proto.keys import BlobKey

log = logging.getLogger(__name__)

RETRY_S = 30.0


class CalibrationClient(Protocol):
    """What is asked of the node daemon."""

    def has(self, keys: Sequence[BlobKey]) -> list[bool]:
        """Which are held."""

    def get(self, key: BlobKey) -> bytes:
        """Raises: BlobNotFoundError, StoreUnavailableError."""

    def put(self, key: BlobKey, data: bytes) -> bool:
        """Raises: FerryError."""

    def list(self, query: ListQuery) -> list[BlobInfo]:
        """Raises: StoreUnavailableError."""


def calibration_folder(cache_dir: Path, model_id: bytes) -> Path:
    """Where ``kvferry calibrate`` leaves the calibration of a model."""
    return cache_dir / "calibrations" / model_id.hex()[:32]


def codec_folder(cache_dir: Path, model_id: bytes, codec: str) -> Path:
    """Where it leaves one for ``codec``: in that folder, other codecs' than ferry's below it."""
    folder = calibration_folder(cache_dir, model_id)
    return folder if codec == "ferry" else folder / codec


class Calibrations:
    """A `kvferry.codec.base.CalibrationSource` that also asks the cluster.

    Args:
        client: of the node daemon; None: local folder only.
        cache_dir: the user's cache folder.
    """

    def __init__(self, client: CalibrationClient | None, cache_dir: Path) -> None:
        self._client, self._cache_dir = client, cache_dir
        self._store = CalibrationStore(cache_dir / "calibrations" / "by-id")
        self._sets: dict[bytes, CalibrationSet] = {}
        self._lowrank: dict[bytes, LowRankCalibration] = {}
        self._asked: dict[tuple[str, bytes], float] = {}
        self._published: set[bytes] = set()
        self._lock = threading.Lock()

    def find(self, model_id: bytes) -> CalibrationSet | None:
        """The model's calibration: this machine's own, else the newest in the store.

        None where there is none yet; asked again after `RETRY_S`.
        """
        with self._lock:
            if model_id in self._sets:
                return self._sets[model_id]
            if not self._may_ask(("ferry", model_id)):
                return None
            found = self._local(model_id) or self._remote(model_id)
            if found is not None:
                self._sets[model_id] = found
            return found

    def find_lowrank(self, model_id: bytes) -> LowRankCalibration | None:
        """The model's calibration for `lowrank`, all layers and heads; found as `find` does."""
        with self._lock:
            if model_id in self._lowrank:
                return self._lowrank[model_id]
            if not self._may_ask(("lowrank", model_id)):
                return None
            found = self._local_lowrank(model_id) or self._remote_lowrank(model_id)
            if found is not None:
                self._lowrank[model_id] = found
            return found

    def _may_ask(self, what: tuple[str, bytes]) -> bool:
        now = time.monotonic()
        if now - self._asked.get(what, -RETRY_S) < RETRY_S:
            return False
        self._asked[what] = now
        return True

    def _local(self, model_id: bytes) -> CalibrationSet | None:
        folder = calibration_folder(self._cache_dir, model_id)
        if not (folder / "calibration.json").is_file():
            return None
        try:
            found, groups = CalibrationSet.load(folder)
        except (CodecError, ConfigError) as exc:
            log.warning("calibration in %s is left aside: %s", folder, exc)
            return None
        if found.model_id != model_id:
            return None
        for group in groups:
            self._store.put(group)
        self._store.put(found)
        return found

    def _remote(self, model_id: bytes) -> CalibrationSet | None:
        if self._client is None:
            return None
        try:
            listed = self._client.list(ListQuery(model_id=model_id, kind="calibration"))
            manifests = [info for info in listed if info.codec.name == "manifest"]
            for info in sorted(manifests, key=lambda i: (i.stored_unix_s, str(i.key)))[::-1]:
                found = CalibrationSet.from_blob(self._client.get(info.key))
                if found.model_id == model_id:
                    self._store.put(found)
                    return found
        except FerryError as exc:
            log.info("no calibration from the cluster: %s", exc)
        return None

    def _local_lowrank(self, model_id: bytes) -> LowRankCalibration | None:
        folder = codec_folder(self._cache_dir, model_id, LOWRANK_NAME)
        if not (folder / SET_FILE).is_file():
            return None
        try:
            _, groups = CalibrationSet.load(folder)
        except (CodecError, ConfigError) as exc:
            log.warning("calibration in %s is left aside: %s", folder, exc)
            return None
        found = groups[0]
        if not isinstance(found, LowRankCalibration) or found.model_id != model_id:
            return None
        self._store.put(found)
        return found

    def _remote_lowrank(self, model_id: bytes) -> LowRankCalibration | None:
        if self._client is None:
            return None
        try:
            listed = self._client.list(ListQuery(model_id=model_id, kind="calibration"))
            # Cuts are there too, under their own ids; the whole is what they were cut from.
            own = [info for info in listed if info.codec.name == LOWRANK_NAME]
            own.sort(key=lambda i: (i.layers[1] - i.layers[0], i.stored_unix_s, str(i.key)))
            for info in own[::-1]:
                found = group_from_blob(self._client.get(info.key))
                if isinstance(found, LowRankCalibration) and not found.parent:
                    self._store.put(found)
                    return found
        except FerryError as exc:
            log.info("no calibration for lowrank from the cluster: %s", exc)
        return None

    def get(self, calibration_id: bytes) -> GroupCalibration:
        """By id, from this machine, else through the node daemon.

        Raises: CalibrationMissingError, CalibrationCorruptError.
        """
        if not self._store.has(calibration_id):
            self._fetch(calibration_id)
        return self._store.get(calibration_id)

    def warm(self, calibration_id: bytes) -> None:
        """Have it and the matrices that decode in memory. Raises: as `get`."""
        for bundle in self.get(calibration_id).bundles.values():
            _ = bundle.fold

    def _fetch(self, calibration_id: bytes) -> None:
        if self._client is None:
            raise CalibrationMissingError(calibration_id.hex())
        try:
            data = self._client.get(BlobKey("calibration", calibration_id))
        except StoreError as exc:
            raise CalibrationMissingError(calibration_id.hex()) from exc
        self._store.put_blob(data)

    def cut(
        self, group_id: bytes, layers: tuple[int, int], heads: tuple[int, int]
    ) -> GroupCalibration:
        """The part of a group that a shard holds. Raises: as `get`."""
        self.get(group_id)
        return self._store.cut(group_id, layers, heads)

    def publish(self, ids: Iterable[bytes]) -> None:
        """Give the cluster what it lacks, once a process. Raises: FerryError."""
        wanted = [i for i in dict.fromkeys(ids) if i and i not in self._published]
        if self._client is None or not wanted:
            return
        keys = [BlobKey("calibration", i) for i in wanted]
        for key, held in zip(keys, self._client.has(keys), strict=True):
            if not held:
                self._client.put(key, self._store.blob(key.page_key))
            self._published.add(key.page_key)
