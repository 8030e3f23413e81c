"""One of two ranks of the contract fake, over MLX's own ring.

    python exo_fake_rank.py MODEL_FOLDER RANK PLAIN_RANK

Every rank holds the whole model: what is looked at is how ranks agree, and a store that has
nothing is enough for that. Prints a JSON object.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import exo_contract as exo
import mlx.core as mx
from model_zoo import tokens_of

from kvferry.codec.mlx.load import load_model
from kvferry.node.hooks.exo.handshake import asking
from kvferry.node.hooks.exo.prefix import Link, with_ferry
from kvferry.node.hooks.group import MlxGroup

LENGTH = 300


class Nothing:
    """A store without a single page, behind collectives as the real one's."""

    def __init__(self, model: Any, group: MlxGroup) -> None:
        self.model, self.group, self.triggers = model, group, 0

    def restore(self, tokens: Sequence[int], **_: Any) -> tuple[list[Any], list[int]]:
        self.group.all_min([0])
        return exo.make_kv_cache(self.model), list(tokens)

    def offer(self, *_: Any, **__: Any) -> bool:
        return True

    def trigger(self) -> None:
        self.triggers += 1


def main() -> None:
    folder, rank, plain = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    ring = mx.distributed.init(backend="ring", strict=True)
    loaded = load_model(str(folder))
    builder = exo.MlxBuilder(loaded.model, loaded.tokenizer, ring)
    bound = exo.shard(folder, len(loaded.model.layers))
    if rank == plain:
        list(builder.load(bound))
        print(json.dumps({}))
        return
    with asking(exo, ring) as handshake:
        list(builder.load(bound))
    if not handshake.everyone:
        print(json.dumps({"everyone": False}))
        return
    group = MlxGroup(ring)
    store = Nothing(loaded.model, group)
    link = Link(store, lambda: exo.make_kv_cache(loaded.model), group.all_min)
    made = with_ferry(exo.KVPrefixCache, lambda: link, exo._MEMORY_THRESHOLD)(ring)
    engine = exo.Engine(loaded.model, made)
    base: Any = exo.KVPrefixCache

    def ask(seed: int, broken: str = "", used: float = 0.5) -> list[Any]:
        """(tokens that were cached, next token, entries held)."""
        before, made.used = getattr(base, broken, None), used
        if rank == 1 and broken:
            setattr(base, broken, _failing)
        logits, hit = engine.submit(tokens_of(LENGTH, seed))
        if broken:
            setattr(base, broken, before)
        return [hit, int(mx.argmax(logits).item()), len(made.prompts)]

    answers = {
        "first": ask(1),
        "again": ask(1),
        "not found on one": ask(1, "get_kv_cache"),
        "not kept on one": ask(2, "add_kv_cache"),
        "asked again": ask(2),
        "and again": ask(2),
        "another": ask(3),
        "memory short on one": ask(4, used=0.99 if rank else 0.1),
    }
    print(json.dumps({"everyone": True, "answers": answers, "triggers": store.triggers}))


def _failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("fails, as the test wants it")


if __name__ == "__main__":
    main()
