"""One script a claim; ``make bench`` runs them all and writes ``benchmarks/results``."""
