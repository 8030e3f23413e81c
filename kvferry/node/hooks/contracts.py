"""Whether the programs that we hook into are here, and still as we know them."""

import importlib.util
from importlib import import_module

from kvferry.node.hooks.exo import checks as exo_checks
from kvferry.node.hooks.server import checks as server_checks


def server_contract() -> str:
    """Why `kvferry serve` could not do its work; empty where it can. Raises: ImportError."""
    server = import_module("mlx_lm.server")
    return server_checks.loading_problem(server) or server_checks.cache_problem(server)


def exo_contract() -> str | None:
    """Why `kvferry exo` could not do its work; empty where it can; None: no exo here.

    Raises: ImportError: it is here and does not import.
    """
    if importlib.util.find_spec("exo") is None:
        return None
    from kvferry.node.hooks.exo import child

    supervisor = import_module("exo.worker.runner.supervisor")
    # exo patches mlx-lm before it imports its engine.
    import_module("exo.worker.engines.mlx.patches").apply_mlx_patches()
    cache, builder, utils = (import_module(n) for n in (child.CACHE, child.BUILDER, child.UTILS))
    problem = exo_checks.supervisor_problem(supervisor)
    return problem or exo_checks.engine_problem(cache, builder, utils)
