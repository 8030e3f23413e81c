"""The demo's one table."""

from typing import Any

from rich.console import Console
from rich.table import Table

MIB = 1 << 20


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """What happened, in words and numbers that need no explanation."""
    console = console or Console()
    table = Table(
        title=f"{result['model']}: {result['prompt_tokens']:,} tokens of prompt, "
        f"{result['ranks']} machines (layers {result['first_split']})",
        title_justify="left",
    )
    table.add_column("")
    for name in ("without kvferry", "default codec", "exact codec"):
        table.add_column(name, justify="right")
    for row in _rows(result):
        table.add_row(*row)
    console.print(table)
    for line in _lines(result):
        console.print(line)


def _rows(r: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (
            "time to first token",
            f"{r['cold_ttft_seconds']:.2f} s",
            f"{r['restored_ttft_seconds']:.2f} s",
            f"{r['exact_ttft_seconds']:.2f} s",
        ),
        ("faster", "", f"{r['ttft_speedup']:.1f}x", f"{r['exact_ttft_speedup']:.1f}x"),
        (
            "tokens restored",
            "0",
            f"{r['restored_tokens']:,}",
            f"{r['exact_restored_tokens']:,}",
        ),
        (
            "bytes of cache",
            f"{r['raw_bytes_fp16'] / MIB:.1f} MiB",
            f"{r['shipped_bytes'] / MIB:.1f} MiB",
            f"{r['exact_shipped_bytes'] / MIB:.1f} MiB",
        ),
        (
            "smaller",
            "(fp16)",
            f"{r['compression_ratio']:.1f}x",
            f"{r['exact_compression_ratio']:.1f}x",
        ),
        (
            f"same choice, {r['compared_tokens']} tokens",
            "",
            f"{r['same_tokens']:.1%}",
            f"{r['exact_same_tokens']:.1%}",
        ),
        ("mean KL", "", f"{r['kl_mean']:.4f} nats", "(free run)"),
    ]


def _lines(r: dict[str, Any]) -> list[str]:
    lines = [
        f"Layers split {s['layers']}: {s['restored_tokens']:,} tokens restored from the same "
        f"blobs, first token after {s['ttft_seconds']:.2f} s, "
        f"{s['same_tokens']:.1%} of choices equal."
        for s in r["reshards"]
    ]
    verdict = "the answers stay right" if r["store_down_ok"] else "[red]the answers changed[/red]"
    lines.append(
        f"Store stopped: {r['store_down_restored_tokens']:,} tokens restored from the machines' "
        f"own disks; new machines prefill instead; {verdict}."
    )
    return lines
