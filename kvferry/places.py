"""Where kvferry's files are on this machine."""

import os
import sys
from pathlib import Path


def user_dir(kind: str) -> Path:
    """The user's "config", "cache", "state" or "runtime" folder for kvferry.

    XDG folders on Linux, ``~/Library`` on macOS; nothing is created.
    """
    if kind == "runtime" and (runtime := os.environ.get("XDG_RUNTIME_DIR")):
        return Path(runtime) / "kvferry"
    if variable := os.environ.get(f"XDG_{kind.upper()}_HOME"):
        return Path(variable) / "kvferry"
    home = Path.home()
    if sys.platform == "darwin":
        library = home / "Library"
        return library / ("Caches" if kind == "cache" else "Application Support") / "kvferry"
    places = {"config": ".config", "cache": ".cache"}
    return home / places.get(kind, ".local/state") / "kvferry"


def config_file() -> Path | None:
    """The TOML file in force, or None."""
    if named := os.environ.get("KVFERRY_CONFIG"):
        return Path(named)
    for place in (Path("kvferry.toml"), user_dir("config") / "kvferry.toml"):
        if place.is_file():
            return place
    return None
