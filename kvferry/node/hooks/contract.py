"""What we lean on in programs that have no plugin mechanism, looked up before it is touched."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any


def first_problem(
    module: Any, called: Mapping[str, Sequence[str]], used: Mapping[str, Sequence[str]]
) -> str:
    """Why we cannot take hold of ``module``; empty where we can.

    Args:
        called: dotted name -> parameters that we name or pass on.
        used: dotted name -> names that its own code must still reach.
    """
    for name, wanted in called.items():
        function = _lookup(module, name)
        if function is None:
            return f"{name} is not there"
        missing = _missing_parameters(function, wanted)
        if missing:
            return f"{name} does not take {', '.join(missing)}"
    for name, wanted in used.items():
        function = _lookup(module, name)
        if function is None:
            return f"{name} is not there"
        code = getattr(function, "__code__", None)
        unused = sorted(set(wanted) - _names(code)) if code is not None else list(wanted)
        if unused:
            return f"{name} does not use {', '.join(unused)}"
    return ""


def _lookup(module: Any, name: str) -> Callable[..., Any] | None:
    found: Any = module
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
