"""Instruction memory: is something that was said early still known some turns later?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from blake3 import blake3

from kvferry.codec.centroid import CentroidCodec
from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.spec import CodecSpec, Run
from kvferry.codec.lab.experiment.table import Table
from kvferry.codec.lab.forward import Done
from kvferry.codec.lab.instructions.examples import Example, load_examples
from kvferry.errors import ConfigError

if TYPE_CHECKING:
    from kvferry.codec.lab.experiment.bench import Bench
    from kvferry.codec.mlx.adapters import CacheSnapshot

ANSWER_TOKENS = 20
# Of a conversation before its test, about.
_TOKENS = 190


@dataclass(frozen=True, slots=True)
class Instructions:
    """Every codec, the model's own cache (``raw``), and that of a model never told.

    Keys of its table: ``codecs`` and ``ratios`` (tokens for each entry that is held after
    every turn, the same for all codecs that drop tokens; fp16 bytes over bytes for the
    others), ``kinds`` (of examples; all by default), ``examples`` (how many of each kind
    at most; 0: all), ``answer_tokens``, ``untold`` (false: without the last condition).
    """

    name: ClassVar[str] = "instructions"
    title: ClassVar[str] = "Instruction memory"

    def runs(self, table: Table) -> Sequence[Run]:
        """One per condition."""
        known = tuple(dict.fromkeys(example.kind for example in load_examples()))
        kinds = table.texts("kinds", known)
        for kind in kinds:
            if kind not in known:
                raise ConfigError(f"{table.where}: kinds", kind, f"one of {', '.join(known)}")
        shared = {
            "kinds": list(kinds),
            "examples": table.whole("examples", 0, low=0, high=10_000),
            "answer_tokens": table.whole("answer_tokens", ANSWER_TOKENS, high=1024),
        }
        said = repr(_chosen(shared)).encode()
        shared["said"] = blake3(said).hexdigest()[:16]
        conditions = [(CodecSpec(name="raw"), True)]
        if table.flag("untold", True):
            conditions.append((CodecSpec(name="raw", label="untold"), False))
        for codec in table.codecs():
            if codec.name == CentroidCodec.name:
                allowed = "codecs that go on from what they left: entries are not merged again"
                raise ConfigError(f"{table.where}: codecs", codec.name, allowed)
            if codec.name != "raw":
                conditions.append((codec, True))
        return [
            Run(kind=self.name, codec=codec, settings={**shared, "told": told})
            for codec, told in conditions
        ]

    def work(self, run: Run) -> float:
        """Tokens read, and tokens said, which take several times as long."""
        said = 4 * int(str(run.settings["answer_tokens"]))
        return len(_chosen(run.settings)) * float(_TOKENS + said // 2)

    def measure(self, run: Run, bench: "Bench", done: Done) -> Mapping[str, object]:
        """Every example with its answer, and shares of all."""
        from kvferry.codec.lab.chat_frame import chat_frame
        from kvferry.codec.lab.instructions.conditions import memory_for
        from kvferry.codec.lab.instructions.converse import converse
        from kvferry.codec.lab.intervals import wilson

        frame = chat_frame(bench.loaded.tokenizer)
        limit = int(str(run.settings["answer_tokens"]))
        told = bool(run.settings["told"])
        begun: dict[tuple[int, ...], CacheSnapshot] = bench.kept(self.name, dict)

        def begin(tokens: Sequence[int]) -> list[Any]:
            key = tuple(tokens)
            if key not in begun:
                begun[key] = bench.capture(tokens, done)
            return bench.exact(begun[key])

        answers = [
            converse(
                bench.loaded,
                frame,
                example if told else example.untold(),
                memory_for(run.codec, bench, example.name),
                limit=limit,
                done=done,
                begin=begin,
            )
            for example in _chosen(run.settings)
        ]
        right = sum(answer.right for answer in answers)
        low, high = wilson(right, len(answers))
        return {
            "accuracy": right / len(answers),
            "low": low,
            "high": high,
            "share": sum(answer.share for answer in answers) / len(answers),
            "examples": [answer.to_json() for answer in answers],
        }

    def section(self, results: Sequence[Result], folder: Path) -> Sequence[str]:
        """Uncompressed first, then Table 1 and Figure 1."""
        from kvferry.codec.lab.instructions.report import section

        return section(results, folder)


def _chosen(settings: Mapping[str, object]) -> list[Example]:
    kinds, count = settings["kinds"], int(str(settings["examples"]))
    assert isinstance(kinds, list)  # noqa: S101
    examples = load_examples()
    found = []
    for kind in kinds:
        own = [example for example in examples if example.kind == kind]
        found += own[: count or len(own)]
    return found
