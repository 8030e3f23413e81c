"""How alike two generations are, by the libraries that papers use (extra ``lab``)."""

from kvferry.errors import ConfigError


def check_lab() -> None:
    """Raises: ConfigError: the libraries are not installed."""
    try:
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as exc:
        allowed = "installed: pip install 'kvferry[lab]'"
        raise ConfigError(exc.name or "sacrebleu", "missing", allowed) from exc


def bleu(found: str, wanted: str) -> float:
    """BLEU-4 of one text against another, 0 to 100, smoothed (sacrebleu's ``exp``).

    Raises: ConfigError, as `check_lab`.
    """
    check_lab()
    import sacrebleu

    # Short texts: without the effective order one missing 4-gram makes all of it nothing.
    return float(sacrebleu.sentence_bleu(found, [wanted], use_effective_order=True).score)


def rouge_l(found: str, wanted: str) -> float:
    """F-measure of the longest common subsequence of words, 0 to 1.

    Raises: ConfigError, as `check_lab`.
    """
    check_lab()
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(wanted, found)["rougeL"].fmeasure)
