"""One rank of real exo, from its shard to its answers: run by the Python that exo runs on.

    python exo_ranks.py CONFIG_JSON

With exo's own sharding, builder and batch engine; stood in for are the tokenizer's way
from text to tokens, and the vision tower. Prints a JSON object; see `Rank.serve`.
"""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from kvferry.node.hooks import HookOptions
from kvferry.node.hooks.exo import child
from kvferry.node.hooks.exo.checks import engine_problem, supervisor_problem
from kvferry.node.hooks.exo.media import vision_problem

EXO = "exo.worker.engines.mlx"
IMAGE_TOKEN = 95
CARD = "kvferry/test"


class Rank:
    """What exo's runner does between its start and the first task."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.faults = config, set(config.get("faults", []))
        import_module(f"{EXO}.patches").apply_mlx_patches()
        self.cache, self.builder, self.utils, self.vision = (
            import_module(name) for name in (child.CACHE, child.BUILDER, child.UTILS, child.VISION)
        )
        supervisor = import_module("exo.worker.runner.supervisor")
        problems = [
            engine_problem(self.cache, self.builder, self.utils),
            supervisor_problem(supervisor),
            vision_problem(self.vision),
        ]
        assert not any(problems), problems
        folder = Path(config["folder"])
        self.utils.build_model_path = lambda model_id: folder
        self._quiet_machine()
        logger = import_module("exo.worker.runner.bootstrap").logger
        if "plain" not in self.faults:
            options = HookOptions(
                socket=Path(config["socket"]),
                cache_dir=Path(config["cache_dir"]),
                keep_last=2,
                gather_tokens=0,
                always_restore=True,
            )
            child.install(self.cache, self.builder, self.utils, options, logger, self.vision)
        world = config["world"]
        self.group = mx.distributed.init(backend="ring", strict=True) if world > 1 else None
        made = self.builder.MlxBuilder(model_id=CARD, event_sender=None, cancel_receiver=None)
        made.group = self.group
        for _ in made.load(SimpleNamespace(bound_shard=self._shard(), instance="test")):
            pass
        made.vision_processor = Eyes(self.vision, CARD) if config.get("vision") else None
        self.engine = made.build()
        self.prefixes = self.engine.kv_prefix_cache
        self.ferry = getattr(self.prefixes, "ferry", None)

    def _shard(self) -> Any:
        cards = import_module("exo.shared.models.model_cards")
        shards = import_module("exo.shared.types.worker.shards")
        memory = import_module("exo.shared.types.memory")
        config, count = self.config, self.config["layer_count"]
        card = cards.ModelCard(
            model_id=cards.ModelId(CARD),
            storage_size=memory.Memory.from_bytes(1 << 20),
            n_layers=count,
            hidden_size=64,
            supports_tensor=True,
            tasks=["TextGeneration"],
            backends=["MlxCpu"],
        )
        kind = shards.TensorShardMetadata if config["tensor"] else shards.PipelineShardMetadata
        start, end = config["layers"]
        return kind(
            model_card=card,
            device_rank=config["rank"],
            world_size=config["world"],
            start_layer=start,
            end_layer=end,
            n_layers=count,
        )

    def _quiet_machine(self) -> None:
        """Memory pressure is what the test says, not what this machine has."""
        self.pressure = 0.1
        self.cache.get_memory_used_percentage = lambda: self.pressure

    def serve(self) -> dict[str, Any]:
        """Answers to the requests of the configuration, in order."""
        self._encode = import_module(f"{EXO}.generator.batch_generate")
        self._encode.encode_prompt = lambda tokenizer, prompt: mx.array(json.loads(prompt))
        if self.ferry is not None:
            assert self.ferry.ready()
        answers = [self._answer(request) for request in self.config["requests"]]
        counters = dict(self.ferry.counters) if self.ferry is not None else None
        if self.ferry is not None:
            self.ferry.close()
        return {"answers": answers, "counters": counters}

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        generator = self.engine._gen
        self.pressure = request.get("pressure", [0.1] * 8)[self.config["rank"]]
        undo = self._break(request.get("faults", {}).get(str(self.config["rank"]), ""))
        types = import_module("exo.shared.types.text_generation")
        params = types.TextGenerationTaskParams(
            model=CARD,
            input=[types.InputMessage(role="user", content=types.InputMessageContent("x"))],
            max_output_tokens=request.get("generate", 4),
            temperature=0.0,
            images=[types.Base64Image(image) for image in request.get("images", [])],
            chat_template_messages=[{"role": "user", "content": json.dumps(request["prompt"])}],
        )
        seen: list[Any] = []
        uid = -1
        batch, following = generator._mlx_gen, generator._mlx_gen.next

        def watched() -> Any:
            progress, responses = following()
            mine = [r for r in responses if r.uid == uid]
            seen.extend((r.token, np.array(r.logprobs.astype(mx.float32))) for r in mine)
            return progress, responses

        batch.next = watched
        if request.get("forget"):
            self.prefixes.clear()
        generator.kv_prefix_cache = None if request.get("uncached") else self.prefixes
        if "beside" in request:  # another conversation, in the middle of its answer
            generator.submit(params, json.dumps(request["beside"]))
            generator.step()
            generator.step()
        uid = generator.submit(params, json.dumps(request["prompt"]))
        hit = generator._active_tasks[uid].prefix_hit_length
        while generator.has_work:
            generator.step()
        del batch.next
        undo()
        # One step more than was asked for is under way, and needs all ranks.
        mx.synchronize(import_module("mlx_lm.generate").generation_stream)
        self.utils.mx_barrier(self.group)
        if self.ferry is not None and request.get("flush", True):
            assert self.ferry.flush()
        return {
            "hit": hit,
            "tokens": [int(token) for token, _ in seen],
            "logits": seen[0][1].reshape(-1).tolist(),
            "entries": len(self.prefixes.prompts),
        }

    def _break(self, what: str) -> Callable[[], None]:
        """Something of ours, or of exo's, fails on this rank while a request is served."""
        from kvferry.codec.mlx import refill
        from kvferry.node.hooks import loader, prefix_cache

        base = type(self.prefixes).__mro__[1]
        places = {
            "lookup": (loader.Loader, "load"),
            "commit": (refill, "restore"),
            "offer": (prefix_cache.PrefixCache, "offer"),
            "get": (base, "get_kv_cache"),
            "add": (base, "add_kv_cache"),
        }
        if what not in places:
            return lambda: None
        where, name = places[what]
        before = getattr(where, name)

        def failing(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"{what} fails, as the test wants it")

        setattr(where, name, failing)
        return lambda: setattr(where, name, before)


class Eyes:
    """A vision tower of noise: the same for the same image, and something else for another."""

    def __init__(self, vision: Any, card: str) -> None:
        self._vision = vision
        self.vision_config = SimpleNamespace(
            model_type="test", image_token_id=IMAGE_TOKEN, weights_repo=card
        )

    def process(
        self, images: Any, chat_template_messages: Any, tokenizer: Any, model: Any, task_params: Any
    ) -> Any:
        prompt = mx.array(json.loads(chat_template_messages[0]["content"]))
        places = int(mx.sum(prompt == IMAGE_TOKEN).item()) // len(images)
        width = self._vision.get_inner_model(model).embed_tokens(prompt[:1]).shape[-1]
        features = []
        for image in images:
            seed = sum(np.asarray(self._vision.decode_base64_image(image)).ravel().tolist())
            noise = np.random.default_rng(seed).normal(size=(places, width))
            features.append(mx.array(noise.astype(np.float32)))
        embeddings = self._vision.create_vision_embeddings(
            model, prompt, mx.concatenate(features), IMAGE_TOKEN
        )
        mx.eval(embeddings)
        regions = self._vision._find_media_regions(prompt, images, IMAGE_TOKEN)
        return self._vision.VisionResult("", prompt, embeddings, regions, IMAGE_TOKEN)


def save_deepseek_v4(folder: Path) -> None:
    """Small and random, of a class that only exo's fork of mlx-lm has."""
    from mlx.utils import tree_flatten

    config = {
        "model_type": "deepseek_v4",
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "q_lora_rank": 32,
        "o_lora_rank": 16,
        "o_groups": 2,
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        "sliding_window": 32,
        "compress_ratios": [0, 0, 4, 128],
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_hash_layers": 1,
        "hc_mult": 2,
        "num_nextn_predict_layers": 0,
    }
    v4: Any = import_module("mlx_lm.models.deepseek_v4")
    mx.random.seed(1)
    model = v4.Model(v4.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "save_v4" in given:
        save_deepseek_v4(Path(given["save_v4"]))
    else:
        print(json.dumps(Rank(given).serve()))
