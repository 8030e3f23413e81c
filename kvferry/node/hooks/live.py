"""Whether a model's calibration is gathered from live traffic, and what that takes."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from kvferry.codec.lab.gathered import Gathered
from kvferry.codec.mlx.adapters import CacheSnapshot
from kvferry.codec.mlx.shape import ModelShape
from kvferry.codec.rope import RopeSpec
from kvferry.node.calibrations import Calibrations
from kvferry.node.hooks.gather import LiveCalibration, Made
from kvferry.node.hooks.gather_finish import ListClient, finish_alone, finish_rank
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.standing import Standing

log = logging.getLogger(__name__)


class Live:
    """A `LiveCalibration` from the first offer of a model whose policy wants one.

    Args:
        specs: one rope spec per layer of the model.
        layers: absolute layers of this rank.
        alone: the whole model is on this rank.
        calibrations: what is known now.
        made: called when a new one was saved.
    """

    def __init__(
        self,
        model: Any,
        shape: ModelShape,
        specs: Sequence[RopeSpec],
        layers: tuple[int, int],
        options: HookOptions,
        counters: Counter[str],
        *,
        alone: bool,
        client: ListClient,
        calibrations: Callable[[], Calibrations],
        made: Callable[[], None],
    ) -> None:
        self._model, self._shape, self._specs, self._layers = model, shape, specs, layers
        self._options, self._counters, self._alone = options, counters, alone
        self._client, self._calibrations, self._made = client, calibrations, made
        self._off = options.gather_tokens <= 0
        self._running: LiveCalibration | None = None

    @property
    def running(self) -> LiveCalibration | None:
        """None: not begun, or not to be."""
        return self._running

    def touch(self) -> None:
        """A request is being served."""
        if self._running is not None:
            self._running.touch()

    def offered(
        self, standing: Standing, tokens: Sequence[int], snapshot: CacheSnapshot, restored: int
    ) -> None:
        """See `LiveCalibration.offered`; begins where there is reason to."""
        model_id = standing.model_id
        if self._off or model_id is None:
            return
        if snapshot.heads != (0, self._shape.kv_heads):
            self._refuse("gather_split_heads", "this rank holds some of the KV heads")
            return
        if self._running is None:
            if not any(rule.codec == "ferry" for rule in standing.policy.rules):
                return
            self._running = self._begin(model_id)
        if self._running is not None:
            self._running.touch()
            self._running.offered(tokens, snapshot, restored)

    def idle(self, budget_s: float) -> bool:
        """See `LiveCalibration.idle`. A bug ends it, and is not raised."""
        try:
            return self._running is not None and self._running.idle(budget_s)
        except Exception:
            log.exception("idle work failed")
            self._counters["gather_bug"] += 1
            self.close(0.0)
        return False

    def close(self, timeout_s: float) -> None:
        """Stop gathering."""
        self._off = True
        if self._running is not None:
            self._running.close(timeout_s)

    def _begin(self, model_id: bytes) -> LiveCalibration | None:
        if self._layers[0] == self._layers[1]:
            self._off = True
            return None
        rotated = [name for name, stream in self._shape.streams.items() if stream.rotated]
        ropes = dict.fromkeys(rotated, tuple(self._specs))
        gathered = Gathered(model_id, self._shape, ropes, self._layers)
        covered = sum(group.layers[1] - group.layers[0] for group in gathered.groups)
        if covered < self._layers[1] - self._layers[0]:
            self._refuse("gather_split_group", "this rank holds a part of a layer group")
            return None
        if gathered.most_bytes > self._options.gather_max_bytes:
            size = gathered.most_bytes >> 20
            self._refuse("gather_memory", f"{size} MiB exceed gather_max_bytes")
            return None

        def finish(made: Made) -> None:
            if self._alone:
                finish_alone(made, model_id, self._shape, self._options.cache_dir)
                self._made()
                return
            assert self._running is not None  # noqa: S101 - it is what calls this
            whole = finish_rank(
                made,
                model_id,
                self._shape,
                self._options.cache_dir,
                self._calibrations(),
                self._client,
                self._running.pause,
            )
            if whole is not None:
                self._made()

        return LiveCalibration(
            gathered,
            self._options,
            self._counters,
            # Samples hold rows only: with states, the model cannot go on from them.
            model=self._model if self._alone and not self._shape.states else None,
            wanted=lambda: self._calibrations().find(model_id) is None,
            finish=finish,
        )

    def _refuse(self, reason: str, why: str) -> None:
        self._off = True
        self._counters[reason] += 1
        log.info("no calibration from live traffic: %s; run `kvferry calibrate`", why)
