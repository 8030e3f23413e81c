"""In the process of one exo runner: the prefix cache is replaced before the model loads."""

import logging
from collections.abc import Callable, Generator
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx

from kvferry.codec.mlx.load import LoadedModel, loaded_elsewhere
from kvferry.errors import FerryError
from kvferry.node.hooks.exo.checks import engine_problem
from kvferry.node.hooks.exo.handshake import asking
from kvferry.node.hooks.exo.media import name_images, vision_id, vision_problem
from kvferry.node.hooks.exo.prefix import KEEP_LAST, Link, with_ferry
from kvferry.node.hooks.group import Group, group_of
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache

log = logging.getLogger(__name__)

CACHE = "exo.worker.engines.mlx.cache"
BUILDER = "exo.worker.engines.mlx.builder"
UTILS = "exo.worker.engines.mlx.utils_mlx"
VISION = "exo.worker.engines.mlx.vision"


def entrypoint(
    bound_instance: Any,
    event_sender: Any,
    task_receiver: Any,
    cancel_receiver: Any,
    _logger: Any,
) -> None:
    """Runs in the process that exo's supervisor starts, in the place of exo's function."""
    bootstrap: Any = import_module("exo.worker.runner.bootstrap")
    bootstrap.logger = _logger  # modules below take it from there as they are imported
    if not bound_instance.is_image_model:
        try:
            _install(HookOptions(keep_last=KEEP_LAST), _logger)
        except Exception as exc:
            _logger.warning(f"kvferry: exo runs as without it: {exc}")
    bootstrap.entrypoint(bound_instance, event_sender, task_receiver, cancel_receiver, _logger)


def _install(options: HookOptions, logger: Any) -> None:
    # exo patches mlx-lm before it imports its engine; doing so twice does no harm.
    import_module("exo.worker.engines.mlx.patches").apply_mlx_patches()
    cache, builder, utils = (import_module(name) for name in (CACHE, BUILDER, UTILS))
    problem = engine_problem(cache, builder, utils)
    if problem:
        logger.warning(f"kvferry: exo runs as without it, since exo has changed: {problem}")
        return
    install(cache, builder, utils, options, logger, import_module(VISION))


def install(
    cache: Any, builder: Any, utils: Any, options: HookOptions, logger: Any, vision: Any = None
) -> None:
    """Put our prefix cache where exo's builder looks for it.

    Args:
        cache, builder, utils, vision: exo's modules of these names; without the last,
            prompts are stored up to their first image.
    """
    problem = vision_problem(vision) if vision is not None else ""
    if problem:
        logger.warning(f"kvferry: images are not stored, since exo has changed: {problem}")
    elif vision is not None:
        name_images(vision)
    named = vision is not None and not problem
    engine = builder.MlxBuilder
    load, build, base = engine.load, engine.build, builder.KVPrefixCache

    def loading(self: Any, bound_instance: Any) -> Generator[Any]:
        self.kvferry_shard = bound_instance.bound_shard
        with asking(utils, self.group) as handshake:
            yield from load(self, bound_instance)
        self.kvferry_everywhere = handshake.everyone

    def building(self: Any) -> Any:
        shard = getattr(self, "kvferry_shard", None)

        def connect() -> Link | None:
            if not getattr(self, "kvferry_everywhere", False):
                logger.warning(
                    "kvferry: exo runs as without it, since not every machine of this model "
                    "does: start all of them with `kvferry exo`, of one release"
                )
                return None
            group = group_of(self.group)
            ferry = _connected(self, shard, group, cache.make_kv_cache, utils, options, logger)
            if ferry is None:
                return None
            seen = _vision(self, shard, utils, logger) if named else b""
            model = self.inference_model
            return Link(ferry, lambda: cache.make_kv_cache(model), group.all_min, seen, _settle)

        made = with_ferry(base, connect, float(cache._MEMORY_THRESHOLD))
        builder.KVPrefixCache = made
        try:
            return build(self)
        finally:
            builder.KVPrefixCache = base

    engine.load, engine.build = loading, building


def _settle() -> None:
    """Wait for what other requests' next tokens have under way.

    Under tensor parallelism that takes collectives of its own, which must not mix with ours.
    """
    mx.synchronize(import_module("mlx_lm.generate").generation_stream)


def _vision(builder: Any, shard: Any, utils: Any, logger: Any) -> bytes:
    """`vision_id`; empty where there is no vision tower, or it cannot be told."""
    processor = getattr(builder, "vision_processor", None)
    if processor is None:
        return b""
    try:
        name = shard.model_card.model_id
        folder = utils.build_model_path(type(name)(processor.vision_config.weights_repo))
        return vision_id(processor, Path(folder), Path(utils.build_model_path(name)))
    except Exception as exc:
        logger.warning(f"kvferry: prompts are stored up to their first image: {exc}")
        return b""


def _connected(
    builder: Any,
    shard: Any,
    group: Group,
    make_kv_cache: Callable[[Any], list[Any]],
    utils: Any,
    options: HookOptions,
    logger: Any,
) -> PrefixCache | None:
    """A collective of all ranks: all of them get one, or none."""
    made: PrefixCache | None = None
    try:
        model = builder.inference_model
        made = PrefixCache(
            _loaded(model, builder.tokenizer, shard, utils),
            options,
            group=group,
            layers=_layers(shard),
            tensor=_tensor(shard),
            make_cache=lambda: list(make_kv_cache(model)),
        )
    except FerryError as exc:
        logger.warning(f"kvferry: prompts of this model are not stored: {exc}")
    except Exception as exc:
        logger.opt(exception=exc).warning("kvferry: prompts of this model are not stored")
    if not group.all_min([int(made is not None)])[0]:
        if made is not None:
            logger.warning("kvferry: prompts are not stored, since another rank cannot")
            made.close()
        return None
    logger.info("kvferry: prompts are stored, and restored from machines that have seen them")
    return made


def _loaded(model: Any, tokenizer: Any, shard: Any, utils: Any) -> LoadedModel:
    from mlx_lm.utils import load_config

    folder = Path(utils.build_model_path(shard.model_card.model_id))
    config = load_config(folder)
    whole = shard.world_size == 1
    return loaded_elsewhere(
        str(shard.model_card.model_id), model, tokenizer, config, folder, whole=whole
    )


def _layers(shard: Any) -> tuple[int, int]:
    return (int(shard.start_layer), int(shard.end_layer))


def _tensor(shard: Any) -> tuple[int, int]:
    if type(shard).__name__ == "TensorShardMetadata":
        return (int(shard.device_rank), int(shard.world_size))
    return (0, 1)
