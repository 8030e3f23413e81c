"""Cost in the report."""

from collections.abc import Sequence

from kvferry.codec.lab.experiment.fidelity_report import percent
from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.series import by_machine, measured, series_of, shown, table


def cost_section(results: Sequence[Result]) -> list[str]:
    """A table for each machine: time, memory, share of generation."""
    machines = by_machine(measured(results))
    if not machines:
        return ["No cost was measured."]
    lines: list[str] = []
    for name, own in machines.items():
        lines += [f"On {name or 'a machine that is not known'}:", "", *_table(own)]
    return [
        *lines,
        "Share of generation: encoding a token, over generating one in the same run with the "
        "context in the cache. Peak memory is what one round of coding and decoding held "
        "beyond the cache.",
        "",
    ]


def _table(results: Sequence[Result]) -> list[str]:
    head = (
        "codec", "tokens", "ratio", "encode (µs a token)", "decode (µs a token)",
        "share of generation", "cache (MB)", "blobs (MB)", "restored (MB)", "coding takes (MB)",
    )  # fmt: skip
    rows = [
        (
            series.shown,
            ", ".join(f"{n:,}" for n in sorted({r.run.context for r in series.results})),
            shown(series.middle("compression_ratio"), ".1f", "x"),
            shown(series.middle("encode_us_per_token"), ".0f"),
            shown(series.middle("decode_us_per_token"), ".0f"),
            percent(series.middle("encode_share_of_generation")),
            _megabytes(series.mean("cache_bytes")),
            _megabytes(series.mean("blob_bytes")),
            _megabytes(series.mean("restored_bytes")),
            _megabytes(series.mean("coding_peak_bytes")),
        )
        for series in series_of(results)
    ]
    loads = [float(str(r.about["load"])) for r in results if r.about.get("load") is not None]
    busy = [f"Load average {min(loads):.1f} to {max(loads):.1f}.", ""] if loads else []
    return [*table(head, rows), "", *busy]


def _megabytes(value: float | None) -> str:
    return shown(None if value is None else value / 1e6, ".3g")
