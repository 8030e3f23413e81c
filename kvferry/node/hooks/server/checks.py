"""What we lean on in `mlx_lm.server`, looked up before anything of it is touched.

Written against 0.31.3 and 0.32.2. A release that does things otherwise gets one line,
and runs as it would without us.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any

# What is called or overridden: dotted name in the module -> parameters we name or pass on.
_LOAD = {"load": ("path_or_hf_repo", "tokenizer_config", "adapter_path", "lazy", "return_config")}
_CACHE = {
    "LRUPromptCache.fetch_nearest_cache": ("self", "model", "tokens"),
    "LRUPromptCache.insert_cache": ("self", "model", "tokens", "prompt_cache", "cache_type"),
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
    "ModelProvider._load": ("model_key", "model"),
    "ResponseGenerator._generate": ("fetch_nearest_cache", "insert_cache", "_next_request"),
    "ResponseGenerator._serve_single": ("fetch_nearest_cache", "insert_cache"),
}


def loading_problem(server: Any) -> str:
    """Why we cannot load models for it; empty where we can."""
    return _first(server, _LOAD, _LOAD_USES)


def cache_problem(server: Any) -> str:
    """Why our prompt cache does not fit into it; empty where it does."""
    return _first(server, _CACHE, _CACHE_USES)


def _first(
    server: Any, called: Mapping[str, Sequence[str]], used: Mapping[str, Sequence[str]]
) -> str:
    for name, wanted in called.items():
        function = _lookup(server, name)
        if function is None:
            return f"{name} is not there"
        missing = _missing_parameters(function, wanted)
        if missing:
            return f"{name} does not take {', '.join(missing)}"
    for name, wanted in used.items():
        function = _lookup(server, name)
        if function is None:
            return f"{name} is not there"
        code = getattr(function, "__code__", None)
        unused = sorted(set(wanted) - _names(code)) if code is not None else list(wanted)
        if unused:
            return f"{name} does not use {', '.join(unused)}"
    return ""


def _lookup(server: Any, name: str) -> Callable[..., Any] | None:
    found: Any = server
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if callable(found) else None


def _missing_parameters(function: Callable[..., Any], wanted: Sequence[str]) -> list[str]:
    """Wanted ones that are missing; and those that would have to be given and are not known."""
    parameters = inspect.signature(function).parameters
    free = [p.name for p in parameters.values() if p.default is p.empty and _is_named(p)]
    return [name for name in wanted if name not in parameters] or (
        [f"our arguments without {name}" for name in free if name not in wanted]
    )


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def _names(code: CodeType) -> set[str]:
    """All names that a function's code, and that of functions in it, looks up."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return found
