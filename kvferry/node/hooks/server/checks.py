"""What we lean on in `mlx_lm.server`, looked up before anything of it is touched.

Written against 0.31.3 and 0.32.2. A release that does things otherwise gets one line,
and runs as it would without us.
"""

from typing import Any

from kvferry.node.hooks.contract import first_problem

# What is called or overridden: dotted name in the module -> parameters we name or pass on.
_LOAD = {"load": ("path_or_hf_repo", "tokenizer_config", "adapter_path", "lazy", "return_config")}
_CACHE = {
    "LRUPromptCache.fetch_nearest_cache": ("self", "model", "tokens"),
    "LRUPromptCache.insert_cache": ("self", "model", "tokens", "prompt_cache", "cache_type"),
    "sharded_load": ("repo", "pipeline_group", "tensor_group", "return_config"),
    "ModelProvider._load": ("self", "model_path", "adapter_path", "draft_model_path"),
    "ModelProvider.load_default": ("self",),
    "ResponseGenerator.stop_and_join": ("self",),
    "ResponseGenerator._next_request": ("self", "timeout"),
}
# What the server's own code must still reach by name, for what we put there to be used.
_LOAD_USES = {"ModelProvider._load": ("load",)}
_CACHE_USES = {
    "main": ("run", "ModelProvider"),
    "run": ("LRUPromptCache", "ResponseGenerator"),
    "ModelProvider._load": ("model_key", "model", "draft_model", "sharded_load"),
    "ResponseGenerator._generate": ("fetch_nearest_cache", "insert_cache", "_next_request"),
    "ModelProvider.__init__": ("pipeline_group",),
    "ResponseGenerator._serve_single": (
        "fetch_nearest_cache",
        "insert_cache",
        "stream_generate",
    ),
}


def loading_problem(server: Any) -> str:
    """Why we cannot load models for it; empty where we can."""
    return first_problem(server, _LOAD, _LOAD_USES)


def cache_problem(server: Any) -> str:
    """Why our prompt cache does not fit into it; empty where it does."""
    return first_problem(server, _CACHE, _CACHE_USES)
