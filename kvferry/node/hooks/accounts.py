"""What everybody is told of a restore that is over: counters, own rates, the node daemon."""

from collections import Counter
from dataclasses import dataclass

from kvferry.node.client import NodeClient
from kvferry.node.hooks.loaded import Loaded
from kvferry.node.hooks.rates import Rate
from kvferry.node.hooks.report import RestoreReport
from kvferry.node.hooks.worth import Worth
from kvferry.proto.v1 import coordinator_pb2 as pb


@dataclass(frozen=True, slots=True, eq=False)
class Accounts:
    """Keeps account of the restores of one `PrefixCache`.

    Attributes:
        worth: learns from every load, and tries a blob of those that were left out.
        prefill: tokens per second of the model, for the daemon.
        counters: get "restores" or "miss_REASON".
    """

    client: NodeClient
    worth: Worth
    prefill: Rate
    counters: Counter[str]

    def note(
        self,
        model_id: bytes | None,
        prompt_tokens: int,
        restored: int,
        pages: int,
        loaded: Loaded,
        seconds: float,
    ) -> RestoreReport:
        """One more restore is over.

        Args:
            prompt_tokens: tokens asked for.
            restored: tokens that all ranks agreed on; 0 for a miss.
            pages: whole pages among them.
            loaded: what this rank had in hand.
            seconds: the whole call.
        """
        outcome = "hit" if restored else loaded.reason or "not_stored"
        self.counters["restores" if restored else f"miss_{outcome}"] += 1
        self.worth.learn(loaded)
        if loaded.skipped:
            self.worth.probe(self.client, loaded.skipped)
        self.client.report(
            restore=pb.RestoreReport(
                model_id=model_id or b"",
                tokens=restored,
                bytes=loaded.bytes,
                seconds=seconds,
                outcome="restored" if restored else outcome,
            ),
            misses=Counter(loaded.problems or ([] if restored else [outcome])),
            prefill_tokens_per_s=self.prefill.per_s or 0.0,
            decode_tokens_per_s=self.worth.cost.decode or 0.0,
            decode_values_per_s=self.worth.decode_values_per_s,
            near_bytes_per_s=self.worth.cost.near or 0.0,
        )
        return RestoreReport(
            prompt_tokens=prompt_tokens,
            restored_tokens=restored,
            loaded_tokens=loaded.tokens,
            restored_pages=pages,
            reason=loaded.reason,
            bytes=loaded.bytes,
            seconds=seconds,
            steps=loaded.seconds,
        )
