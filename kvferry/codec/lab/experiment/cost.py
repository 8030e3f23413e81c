"""Cost: time of both directions, memory, and their share of generation."""

import resource
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kvferry.codec.lab.coding import Coded
from kvferry.codec.lab.evaluate import coder_of
from kvferry.codec.lab.experiment.bench import Bench
from kvferry.codec.lab.experiment.kind import each_codec
from kvferry.codec.lab.experiment.onoff import whole
from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.spec import Run
from kvferry.codec.lab.experiment.table import Table
from kvferry.codec.lab.forward import Done
from kvferry.codec.lab.greedy import greedy


@dataclass(frozen=True, slots=True)
class Cost:
    """Each codec over a whole context, ``rounds`` times, beside generation.

    Generation is timed between rounds, so that other work on the machine slows both alike.
    """

    name: ClassVar[str] = "cost"
    title: ClassVar[str] = "Cost"

    def runs(self, table: Table) -> Sequence[Run]:
        """One per text, length and codec."""
        settings: dict[str, object] = {
            "rounds": table.whole("rounds", 3, high=100),
            "generated": table.whole("generated", 16, high=1024),
        }
        return each_codec(self.name, table, settings)

    def work(self, run: Run) -> float:
        """Rounds of coding and of single tokens, each of which takes ten times as long."""
        return whole(run, "rounds") * (10.0 * whole(run, "generated") + run.context / 4)

    def measure(self, run: Run, bench: Bench, done: Done) -> Mapping[str, object]:
        """Medians over rounds; memory is of a round of its own, which tracing slows."""
        prepared = bench.prepared(run, done)
        found = bench.coded(run.codec, prepared.snapshot, (0, run.context))  # also warms it
        coder = coder_of(bench.model_id, bench.shape, bench.setup(run, found.options))
        rounds: list[Coded] = []
        generating: list[float] = []
        count, first = whole(run, "generated"), prepared.reference[0].fed[0]
        for _ in range(whole(run, "rounds")):
            rounds.append(coder.run(prepared.snapshot, (0, run.context)))
            cache = bench.exact(prepared.snapshot)
            started = time.perf_counter()
            greedy(bench.model, cache, first, count, done)
            generating.append((time.perf_counter() - started) / count)
        peak = _peak(lambda: coder.run(prepared.snapshot, (0, run.context)))
        encoding = statistics.median(coded.encode_seconds for coded in rounds)
        decoding = statistics.median(coded.decode_seconds for coded in rounds)
        token = statistics.median(generating)
        page = prepared.snapshot.page(bench_layers(bench), (0, run.context))
        held = sum(stream.data.nbytes for stream in page.streams.values())
        return {
            "options": dict(found.options),
            "compression_ratio": found.ratio,
            "encode_seconds": encoding,
            "decode_seconds": decoding,
            "encode_us_per_token": 1e6 * encoding / run.context,
            "decode_us_per_token": 1e6 * decoding / run.context,
            "generation_ms_per_token": 1e3 * token,
            # A token that is generated is encoded once, sooner or later.
            "encode_share_of_generation": encoding / run.context / token,
            "cache_bytes": held,
            "raw_bytes_fp16": 2 * found.coded.values,
            "blob_bytes": found.coded.blob_bytes,
            "restored_bytes": sum(
                stream.data.nbytes for page in found.coded.pages for stream in page.streams.values()
            ),
            "coding_peak_bytes": peak,
            "process_peak_bytes": _process_peak(),
        }

    def section(self, results: Sequence[Result], folder: Path) -> Sequence[str]:
        """See `kvferry.codec.lab.experiment.cost_report`."""
        from kvferry.codec.lab.experiment.cost_report import cost_section

        return cost_section(results)


def bench_layers(bench: Bench) -> tuple[int, int]:
    """All layers that hold rows of tokens."""
    return 0, bench.shape.layers


def _peak(work: Callable[[], object]) -> int:
    """Bytes that Python and numpy held at most beyond what they held before."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        work()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return max(0, most - before)


def _process_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
