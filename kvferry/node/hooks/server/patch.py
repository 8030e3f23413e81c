"""The one place that takes hold of `mlx_lm.server`: three classes and a function, for a while.

``main`` and ``run`` of that module make these by name, so they are replaced there, by
subclasses that leave everything else as it is, and put back afterwards.
"""

import _thread
import copy
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvferry.node.hooks.server.bridge import Bridge
from kvferry.node.hooks.server.models import ModelLoading
from kvferry.node.hooks.server.ranks import all_ranks, ranks_of
from kvferry.node.hooks.server.served import Quantized, Served
from kvferry.node.hooks.thread_end import wait_ended

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Running:
    """What came of the server that was started.

    Attributes:
        generator: its ``ResponseGenerator``, once there is one.
        failure: why the model it was told to serve could not be loaded.
    """

    generator: Any = None
    failure: Exception | None = None

    def stop(self) -> None:
        """End the thread that runs the model, where it was started."""
        if self.generator is None:
            return
        self.generator.stop_and_join()
        thread = getattr(self.generator, "_generation_thread", None)
        wait_ended(getattr(thread, "native_id", None))


@dataclass(slots=True)
class Patch:
    """What to put into the server.

    Args:
        server: the module `mlx_lm.server`.
        bridge: None: only the loading of models is ours.
    """

    server: Any
    bridge: Bridge | None
    running: Running = field(default_factory=Running)

    @contextmanager
    def installed(self) -> Iterator[Running]:
        """The server's names are ours within; as they were after."""
        bridge, running = self.bridge, self.running
        loading = ModelLoading(self.server.load, keep=bridge is not None)
        new: dict[str, Any] = {"load": loading.load}
        if bridge is not None:
            new["sharded_load"] = partial(loading.load_sharded, self.server.sharded_load)
            new["stream_generate"] = _one_at_a_time(self.server.stream_generate, bridge)
            new["LRUPromptCache"] = _prompt_cache(self.server.LRUPromptCache, bridge)
            new["ModelProvider"] = _provider(self.server.ModelProvider, loading, bridge, running)
            new["ResponseGenerator"] = _generator(self.server.ResponseGenerator, bridge, running)
        old = {name: getattr(self.server, name) for name in new}
        try:
            for name, value in new.items():
                setattr(self.server, name, value)
            yield running
        finally:
            for name, value in old.items():
                setattr(self.server, name, value)
            if bridge is not None:
                bridge.detach()


def _prompt_cache(base: Any, bridge: Bridge) -> type:
    class PromptCache(base):  # type: ignore[misc]
        """The server's own, and behind it what is stored."""

        def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> Any:
            cache, rest = super().fetch_nearest_cache(model, tokens)
            return bridge.fetch(model, tokens, cache, rest)

        def insert_cache(
            self, model: Any, tokens: list[int], prompt_cache: list[Any], **kwargs: Any
        ) -> None:
            tokens = bridge.aligned(model, tokens, prompt_cache)
            super().insert_cache(model, tokens, prompt_cache, **kwargs)
            bridge.inserted(model, tokens, prompt_cache, **kwargs)

    return PromptCache


def _one_at_a_time(original: Callable[..., Any], bridge: Bridge) -> Callable[..., Any]:
    def stream_generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
        """The server's own; when the prompt is in the cache, that is known."""
        cache, report = kwargs.get("prompt_cache"), kwargs.get("prompt_progress_callback")
        speculating = kwargs.get("draft_model") is not None

        def progress(done: int, total: int) -> None:
            if report is not None:
                report(done, total)
            if 0 < done == total - 1:
                bridge.prefilled(cache or [])

        kwargs["prompt_progress_callback"] = progress
        with closing(original(*args, **kwargs)) as pieces:
            for count, piece in enumerate(pieces):
                if count == 0 and speculating:  # which reports no progress, and whose caches
                    bridge.prefilled(cache or [])  # can be cut at a token
                yield piece

    return stream_generate


def _provider(base: Any, loading: ModelLoading, bridge: Bridge, running: Running) -> type:
    class Provider(base):  # type: ignore[misc]
        """The server's own; each model it loads is made known to kvferry."""

        def _load(
            self,
            model_path: str,
            adapter_path: str | None = None,
            draft_model_path: str | None = None,
        ) -> None:
            bridge.detach()
            try:
                super()._load(model_path, adapter_path, draft_model_path)
                served = _served(self, loading, model_path, adapter_path, draft_model_path)
            except Exception as exc:
                if self.model is None:
                    raise
                log.warning("served without stored caches: %s", exc)  # the server has its model
                bridge.absent(all_ranks())
                return
            finally:
                loading.forget()
            bridge.attach(self.model_key, served)

        def reset(self) -> None:
            """In releases that have it: the model is let go of."""
            bridge.detach()
            if hasattr(base, "reset"):
                super().reset()

        def load_default(self) -> None:
            try:
                super().load_default()
            except Exception as exc:
                # Without it there is nothing to serve. We are on the model's thread: the
                # main thread ends the server, and says why.
                running.failure = exc
                _thread.interrupt_main(signal.SIGTERM)
                raise SystemExit(1) from exc

    return Provider


def _served(
    provider: Any, loading: ModelLoading, name: str, adapter: str | None, draft: str | None
) -> Served:
    """Raises: ModelError."""
    how = provider.cli_args
    bits = getattr(how, "kv_bits", None)  # since 0.32
    return Served(
        loading.describe(provider.model, name, adapter),
        None if draft is None else loading.describe(provider.draft_model, draft),
        None if bits is None else Quantized(bits, how.kv_group_size, how.quantized_kv_start),
        ranks_of(provider),
        how.prefill_step_size,
    )


def _look_ahead(generator: Any, bridge: Bridge, request: Any) -> bool:
    """Whether blobs for a request that joins others are now being fetched beside these."""
    try:
        _, asked, how = request
        provider = generator.model_provider
        key = (
            provider._model_map.get(how.model.model, how.model.model),
            provider._adapter_map.get(how.model.model, how.model.adapter),
            provider._draft_model_map.get(how.model.draft, how.model.draft),
        )
        if key != provider.model_key or how.seed is not None:
            return False
        # It changes the messages, and will do so again when the request is taken up.
        tokens = generator._tokenize(provider.tokenizer, copy.deepcopy(asked), how)[0]
        found = generator.prompt_cache._trie.search(provider.model_key, tokens)
        held = max(len(found.shorter or ()), found.common_prefix if found.longer else 0)
    except Exception as exc:  # the server finds it again, and says so
        log.debug("not looked ahead: %s", exc)
        return False
    return found.exact is None and bridge.look_ahead(key, tokens, held)


def _generator(base: Any, bridge: Bridge, running: Running) -> type:
    class Generator(base):  # type: ignore[misc]
        """The server's own; where it waits for a request there is time for other work."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            running.generator = self
            self.kvferry_waiting: Any = None  # a request of which blobs are being fetched
            super().__init__(*args, **kwargs)

        def _next_request(self, timeout: float | None = None) -> Any:
            if self.kvferry_waiting is not None:
                # Answers under way are generated meanwhile; where there are none, we wait.
                if bridge.looking(timeout or 0.0):
                    return None
                request, self.kvferry_waiting = self.kvferry_waiting, None
                return request
            request = super()._next_request(timeout)
            if request is not None and timeout is None and _look_ahead(self, bridge, request):
                self.kvferry_waiting = request
                return None
            # It waits only where no answer is being generated.
            if request is None and timeout is not None:
                bridge.idle()
            return request

    return Generator
