"""One runner of real exo, as far as its prefix cache goes: run by the Python that exo runs on.

    python exo_real.py MODEL_FOLDER SOCKET CACHE_DIR TOKENS...

Prints a JSON object: what is wrong with exo for us, how many tokens were cached, and the
next token's logits.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from kvferry.node.hooks import HookOptions
from kvferry.node.hooks.exo import child
from kvferry.node.hooks.exo.checks import engine_problem, supervisor_problem


def main() -> None:
    folder, socket, cache_dir = (Path(a) for a in sys.argv[1:4])
    prompt = [int(a) for a in sys.argv[4:]]
    import_module("exo.worker.engines.mlx.patches").apply_mlx_patches()
    cache, builder, utils = (import_module(n) for n in (child.CACHE, child.BUILDER, child.UTILS))
    supervisor = import_module("exo.worker.runner.supervisor")
    problem = engine_problem(cache, builder, utils) or supervisor_problem(supervisor)
    if problem:
        print(json.dumps({"problem": problem}))
        return
    options = HookOptions(socket=socket, cache_dir=cache_dir, keep_last=2, gather_tokens=0)
    bootstrap = import_module("exo.worker.runner.bootstrap")
    here = SimpleNamespace(build_model_path=lambda model_id: folder)
    child.install(cache, builder, here, options, bootstrap.logger)
    print(json.dumps({"problem": "", **serve(folder, cache, builder, prompt)}))


def serve(folder: Path, cache: Any, builder: Any, prompt: list[int]) -> dict[str, Any]:
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.utils import load

    generate = import_module("exo.worker.engines.mlx.generator.generate")
    model, tokenizer = load(str(folder))
    made = builder.MlxBuilder(
        model_id=str(folder),
        event_sender=None,
        cancel_receiver=None,
        inference_model=model,
        tokenizer=tokenizer,
    )
    made.kvferry_shard = SimpleNamespace(
        model_card=SimpleNamespace(model_id=str(folder)),
        start_layer=0,
        end_layer=len(model.layers),
        device_rank=0,
        world_size=1,
    )
    engine = made.build()
    prefixes = engine.kv_prefix_cache
    assert isinstance(prefixes, cache.KVPrefixCache)
    assert prefixes.ferry is not None
    assert prefixes.ferry.ready()
    # From here on as `ExoBatchGenerator.submit` does it.
    tokens = mx.array(prompt)
    held, remaining, index, exact = prefixes.get_kv_cache(model, tokens)
    assert not exact
    assert index is None
    _, _, snapshots = generate.prefill(
        model, tokenizer, make_sampler(temp=0.0), remaining[:-1], held, None, None, None
    )
    prefixes.add_kv_cache(tokens, list(held), snapshots)
    logits = np.array(model(tokens[None, -2:], cache=held)[0, -1].astype(mx.float32))
    assert prefixes.ferry.flush()
    assert prefixes.get_kv_cache(model, tokens)[2] is not None or snapshots
    counters = dict(prefixes.ferry.counters)
    prefixes.ferry.close()
    return {
        "hit": len(prompt) - len(remaining),
        "logits": logits.tolist(),
        "counters": counters,
        "length": cache.cache_length(held),
    }


if __name__ == "__main__":
    main()
