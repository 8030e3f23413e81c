"""What we lean on in exo, looked up before anything of it is touched."""

from typing import Any

from kvferry.node.hooks.contract import first_problem

_CACHE = {
    "KVPrefixCache.get_kv_cache": ("self", "model", "prompt_tokens", "media_regions"),
    "KVPrefixCache.add_kv_cache": (
        "self",
        "prompt_tokens",
        "cache",
        "ssm_snapshots",
        "media_regions",
        "prefill_tps",
    ),
    "KVPrefixCache.update_kv_cache": (
        "self",
        "index",
        "prompt_tokens",
        "cache",
        "snapshots",
        "restore_pos",
        "media_regions",
        "prefill_tps",
    ),
    "KVPrefixCache._evict_if_needed": ("self",),
    "KVPrefixCache.get_memory_used_percentage": ("self",),
    "KVPrefixCache": ("group",),
    "KVPrefixCache.clear": ("self",),
    "make_kv_cache": ("model", "max_kv_size", "keep"),
}
_CACHE_USES = {
    "KVPrefixCache.add_kv_cache": ("_evict_if_needed",),
    "KVPrefixCache._evict_if_needed": ("get_memory_used_percentage", "_MEMORY_THRESHOLD"),
}
_BUILDER = {
    "MlxBuilder.load": ("self", "bound_instance"),
    "MlxBuilder.build": ("self",),
}
_BUILDER_USES = {
    "MlxBuilder.load": ("load_mlx_items", "group"),
    "MlxBuilder.build": ("KVPrefixCache", "inference_model", "group"),
}
_UTILS = {"build_model_path": ("model_id",), "mx_barrier": ("group",)}
_UTILS_USES = {
    "shard_and_load": ("mx_barrier",),
    "load_mlx_items": ("shard_and_load",),
}
_SUPERVISOR = {
    "entrypoint": (
        "bound_instance",
        "event_sender",
        "task_receiver",
        "cancel_receiver",
        "_logger",
    )
}
_SUPERVISOR_USES = {"RunnerSupervisor.create": ("entrypoint",)}


def engine_problem(cache: Any, builder: Any, utils: Any) -> str:
    """Why our prefix cache does not fit into exo's engine; empty where it does."""
    return (
        first_problem(cache, _CACHE, _CACHE_USES)
        or first_problem(builder, _BUILDER, _BUILDER_USES)
        or first_problem(utils, _UTILS, _UTILS_USES)
    )


def supervisor_problem(supervisor: Any) -> str:
    """Why we cannot get into the processes that exo starts; empty where we can."""
    return first_problem(supervisor, _SUPERVISOR, _SUPERVISOR_USES)
