"""What ``kvferry policy explain`` shows of the optimizer's decisions."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvferry.proto.v1 import coordinator_pb2 as pb

MAX_ROWS = 400


def as_json(decision: pb.Decision) -> dict[str, Any]:
    """One decision, in plain values."""
    return {
        "model": decision.model_id.hex(),
        "budget_nats": decision.budget_nats,
        "kl_nats": decision.kl_nats,
        "tokens": decision.tokens,
        "seconds": decision.seconds,
        "slowest": decision.slowest,
        "tier": decision.tier,
        "prefill_s": decision.prefill_s,
        "pays_from_tokens": decision.pays_from_tokens or None,
        "never_pays": decision.never_pays,
        "not_stored": decision.not_stored,
        "why": decision.why,
        "nodes": [
            {
                "node": node.node_id,
                "bytes_per_s": node.bytes_per_s,
                "measured": node.measured,
                "latency_s": node.latency_s,
                "decode_s": node.decode_s,
                "bytes": node.bytes,
                "seconds": node.seconds,
                "best_source": node.best_source,
                "best_bytes_per_s": node.best_bytes_per_s,
            }
            for node in decision.nodes
        ],
        "parts": [
            {
                "node": part.node_id,
                "layers": [part.layer_start, part.layer_end],
                "heads": [part.head_start, part.head_end],
                "codec": part.codec,
                "options": dict(part.options),
                "bytes": part.bytes,
                "kl_nats": part.kl_nats,
                "why": part.why,
                "finer": _next(part, "finer"),
                "coarser": _next(part, "coarser"),
            }
            for part in decision.parts
        ],
    }


def _next(part: pb.PartChoice, name: str) -> dict[str, Any] | None:
    if not part.HasField(name):  # type: ignore[arg-type]
        return None
    choice: pb.NextChoice = getattr(part, name)
    return {
        "choice": choice.name,
        "bytes": choice.bytes,
        "kl_nats": choice.kl_nats,
        "seconds": choice.seconds,
    }


def print_decisions(decisions: Sequence[pb.Decision], node: str = "") -> None:
    """Tables: the nodes, then their parts; of one node only where it is named."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for decision in decisions:
        parts = [part for part in decision.parts if node in ("", part.node_id)]
        if not parts:
            continue
        spent = decision.kl_nats / decision.budget_nats if decision.budget_nats else 0.0
        console.print()
        console.print(
            f"model {decision.model_id.hex()[:12]}: {decision.tokens:,} tokens in "
            f"{decision.seconds:.3g} s, the slowest is {decision.slowest}; "
            f"{decision.kl_nats:.4f} of {decision.budget_nats:g} nats ({spent:.0%})"
            + (f"; tier {decision.tier}" if decision.tier else "")
            + ("; not stored" if decision.not_stored else ""),
            highlight=False,
        )
        console.print(decision.why, highlight=False)
        nodes = Table(
            "node",
            "link",
            "latency",
            "decode",
            "bytes",
            "time",
            "quicker from",
            box=None,
            pad_edge=False,
        )
        for row in decision.nodes:
            if node in ("", row.node_id):
                link = f"{_size(row.bytes_per_s)}/s" + ("" if row.measured else " (guessed)")
                nodes.add_row(
                    row.node_id,
                    link,
                    f"{1e3 * row.latency_s:.1f} ms",
                    f"{1e3 * row.decode_s:.0f} ms",
                    _size(row.bytes),
                    f"{row.seconds:.3g} s",
                    _nearer(row),
                )
        console.print(nodes)
        table = Table("node", "layers", "heads", "coded as", "bytes", "of the budget", "finer",
                      "coarser", "why", box=None, pad_edge=False)  # fmt: skip
        for part in parts[:MAX_ROWS]:
            table.add_row(
                part.node_id,
                f"{part.layer_start}-{part.layer_end}",
                f"{part.head_start}-{part.head_end}",
                _choice(part.codec, part.options),
                _size(part.bytes),
                f"{part.kl_nats / decision.budget_nats:.0%}" if decision.budget_nats else "-",
                _change(part, "finer"),
                _change(part, "coarser"),
                part.why,
            )
        console.print(table)
        if len(parts) > MAX_ROWS:
            console.print(f"and {len(parts) - MAX_ROWS:,} parts more: see --json, or --node")


def _nearer(row: "pb.NodeShare") -> str:
    """Another place that may have its part, by which it is judged whether restores pay."""
    if row.best_source in ("", "store"):
        return "-"
    return f"{row.best_source}, {_size(row.best_bytes_per_s)}/s"


def _choice(codec: str, options: Mapping[str, str]) -> str:
    return f"{codec} {' '.join(f'{k}={v}' for k, v in sorted(options.items()))}".rstrip()


def _change(part: pb.PartChoice, name: str) -> str:
    if not part.HasField(name):  # type: ignore[arg-type]
        return "-"
    choice: pb.NextChoice = getattr(part, name)
    sign = "+" if choice.bytes > 0 else "-"
    return (
        f"{sign}{_size(abs(choice.bytes))} {1e3 * choice.seconds:+.3g} ms "
        f"{1e3 * choice.kl_nats:+.3g} mnats"
    )


def _size(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
