"""Start exo with its runners taken hold of."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from kvferry.errors import FerryError
from kvferry.node.hooks.exo import child
from kvferry.node.hooks.exo.checks import engine_problem, supervisor_problem


def run(arguments: Sequence[str]) -> None:
    """exo's own main, in this process.

    Raises: FerryError: exo is not installed beside kvferry.
    """
    try:
        main = import_module("exo.main")
    except ImportError as exc:
        raise FerryError(
            f"exo is not in this environment ({exc}): install kvferry into the one that exo "
            "runs from, as source"
        ) from exc
    problem = take_hold(import_module("exo.worker.runner.supervisor"))
    if problem:
        sys.stderr.write(f"kvferry: exo runs as without it, since {problem}\n")
    sys.argv = ["exo", *arguments]
    main.main()


def take_hold(supervisor: Any) -> str:
    """Have runners begin with our function; returns why not, or nothing."""
    problem = supervisor_problem(supervisor)
    if not problem:
        modules = (import_module(name) for name in (child.CACHE, child.BUILDER, child.UTILS))
        problem = engine_problem(*modules)
    if not problem:
        supervisor.entrypoint = child.entrypoint
    return problem and f"exo has changed: {problem}"
