"""Python, mlx, mlx-lm, exo, OpenBLAS: is what runs models here, and as we know it?"""

import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from kvferry.cli.doctor.finding import FAIL, OK, WARN, Finding

# First release that cannot be relied on: below the first, or not tried with it yet.
_TESTED = {"mlx": ((0, 31), (0, 33)), "mlx-lm": ((0, 31), (0, 33))}
_MLX = "pip install 'kvferry[mlx]'"


def has_mlx() -> bool:
    """Whether this machine is meant to run models."""
    return importlib.util.find_spec("mlx") is not None


def python() -> Iterator[Finding]:
    """The interpreter."""
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info < (3, 14):
        yield Finding("python", OK, found)
    else:
        yield Finding("python", FAIL, found, "use Python 3.11, 3.12 or 3.13")


def packages() -> Iterator[Finding]:
    """mlx and mlx-lm: there, importable, of a release that was tried."""
    if not has_mlx():
        yield Finding(
            "mlx",
            WARN,
            "not installed: this machine can run a store or a coordinator, and no model",
            f"{_MLX}, if models shall run here",
        )
        return
    for name, (first, beyond) in _TESTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(name, FAIL, "not installed", _MLX)
            continue
        numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
        allowed = f"{first[0]}.{first[1]} to {beyond[0]}.{beyond[1] - 1}"
        if numbers < first:
            yield Finding(name, FAIL, f"{found}, too old", f"pip install '{name}>=0.31'")
        elif numbers >= beyond:
            yield Finding(name, WARN, f"{found}, newer than was tried ({allowed})")
        else:
            yield Finding(name, OK, found)


def device() -> Iterator[Finding]:
    """What mlx computes on."""
    if not has_mlx():
        return
    try:
        import mlx.core as mx
    except (ImportError, OSError) as exc:
        yield Finding("device", FAIL, f"mlx does not import: {exc}", _MLX)
        return
    yield Finding("device", OK, "GPU" if mx.default_device().type == mx.gpu else "CPU")


def openblas() -> Iterator[Finding]:
    """On Linux a model on the CPU is ten times slower without."""
    from kvferry.codec.mlx.openblas import HINT, find_openblas

    if not sys.platform.startswith("linux") or not has_mlx():
        return
    found = find_openblas()
    if found is not None:
        yield Finding("openblas", OK, str(found))
    else:
        what, _, remedy = HINT.removeprefix("kvferry: ").partition("; ")
        yield Finding("openblas", WARN, what, remedy)


def hooks() -> Iterator[Finding]:
    """Whether what we take hold of in mlx-lm's server and in exo is as we know it."""
    if not has_mlx():
        return
    from kvferry.node.hooks.contracts import exo_contract, server_contract

    try:
        problem = server_contract()
    except ImportError as exc:
        problem = f"it does not import ({_first_line(exc)})"
    if problem:
        remedy = "pip install 'mlx-lm>=0.31,<0.33'; till then `kvferry serve` restores nothing"
        yield Finding("mlx-lm's server", FAIL, problem, remedy)
    else:
        yield Finding("mlx-lm's server", OK, "`kvferry serve` fits it")
    try:
        exo = exo_contract()
    except Exception as exc:  # whatever it raises while it is imported
        exo = f"it does not import ({_first_line(exc)})"
    if exo is None:
        yield Finding("exo", OK, "not in this environment; only `kvferry exo` needs it")
    elif exo:
        remedy = "use a release of exo and kvferry that fit; till then exo runs as without it"
        yield Finding("exo", FAIL, exo, remedy)
    else:
        yield Finding("exo", OK, "`kvferry exo` fits it")


def _first_line(exc: Exception) -> str:
    return (str(exc) or type(exc).__name__).splitlines()[0]
