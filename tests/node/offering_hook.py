"""A hook process for tests: a small model, and offers on command.

``python offering_hook.py SOCKET FOLDER`` with a model in FOLDER. Reads lines
``EVENT SEED`` ("prefill 3", "restore 3", "policy") and answers each with a line of JSON.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from kvferry.codec.mlx.load import load_model
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache

TOKENS = 600


def prompt(seed: int) -> list[int]:
    """Another conversation for each seed."""
    chooser = random.Random(seed)
    return [chooser.randrange(1, 27) for _ in range(TOKENS)]


def answer(prefix: PrefixCache, model: Any, caches: dict[int, Any], what: str, seed: int) -> Any:
    if what == "policy":
        return prefix.policy.name
    if what == "restore":
        return TOKENS - len(prefix.restore(prompt(seed))[1])
    if what == "flush":
        return prefix.flush()
    if seed not in caches:
        caches[seed], _ = prefix.restore(prompt(seed))
        mx.eval(model(mx.array([prompt(seed)]), cache=caches[seed]))
    return prefix.offer(prompt(seed), caches[seed], what)


def main() -> None:
    socket, folder = Path(sys.argv[1]), Path(sys.argv[2])
    loaded = load_model(str(folder))
    options = HookOptions(
        socket=socket, cache_dir=folder / "cache", gather_tokens=0, always_restore=True
    )
    caches: dict[int, Any] = {}
    with PrefixCache(loaded, options) as prefix:
        print(json.dumps(prefix.ready()), flush=True)
        for line in sys.stdin:
            what, _, seed = line.strip().partition(" ")
            found = answer(prefix, loaded.model, caches, what, int(seed or 0))
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
