"""Parts of `kvferry serve` without a server: what it leans on, and which requests are whose."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import server

from kvferry.codec.mlx.load import load_tokenizer
from kvferry.codec.mlx.tokenizer import GgufTokenizer
from kvferry.node.hooks.server.checks import cache_problem, loading_problem
from kvferry.node.hooks.server.tokenizer import wrap_gguf
from kvferry.node.hooks.server.turns import RestoredPages, Turns


def test_the_installed_mlx_lm_is_as_we_know_it() -> None:
    assert cache_problem(server) == ""
    assert loading_problem(server) == ""


def _renamed(self: Any, model: Any, toks: Any) -> None: ...


def _more(self: Any, model: Any, tokens: Any, namespace: str) -> None: ...


def _positional_run(host: str, port: int, model_provider: Any) -> None: ...


@pytest.mark.parametrize(
    ("where", "name", "value", "said"),
    [
        ("LRUPromptCache", "fetch_nearest_cache", _renamed, "does not take tokens"),
        ("LRUPromptCache", "fetch_nearest_cache", _more, "without namespace"),
        ("LRUPromptCache", "insert_cache", None, "insert_cache is not there"),
        ("ResponseGenerator", "_next_request", None, "_next_request is not there"),
        ("", "LRUPromptCache", None, "LRUPromptCache"),
        ("", "run", _positional_run, "run does not use LRUPromptCache, ResponseGenerator"),
    ],
)
def test_a_changed_mlx_lm_is_named(
    where: str,
    name: str,
    value: Callable[..., Any] | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(getattr(server, where) if where else server, name, value)
    assert said in cache_problem(server)
    assert loading_problem(server) == ""


def test_another_way_of_loading_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "load", lambda path, lazy=False: None)
    assert "path_or_hf_repo" in loading_problem(server)


# -- turns ----------------------------------------------------------------------


def test_a_prefix_of_the_prompt_is_prefill_and_more_is_the_end_of_the_turn() -> None:
    turns = Turns()
    turns.begin([1, 2, 3, 4], 2)
    assert turns.find([1, 2])[0] == "prefill"
    event, turn = turns.find([1, 2, 3])
    assert event == "prefill"
    assert turn is not None
    assert turn.cached == 2
    assert turns.find([1, 9, 9]) == ("turn_end", None)
    event, turn = turns.find([1, 2, 3, 4, 5, 6])
    assert event == "turn_end"
    assert turn is not None
    # That turn is over.
    assert turns.find([1, 2, 3]) == ("turn_end", None)


def test_only_a_request_without_company_tells_a_speed() -> None:
    turns = Turns()
    turns.begin([1, 2, 3], 0)
    turns.begin([4, 5, 6], 0)
    for tokens in ([1, 2], [4, 5]):
        turn = turns.find(tokens)[1]
        assert turn is not None
        assert not turn.alone
    turns.clear()
    turns.begin([7, 8, 9], 0)
    turn = turns.find([7, 8])[1]
    assert turn is not None
    assert turn.alone


@given(restored=st.integers(0, 4), shared=st.integers(0, 1200), length=st.integers(0, 1200))
def test_pages_count_as_restored_only_where_every_token_is_the_same(
    restored: int, shared: int, length: int
) -> None:
    pages = RestoredPages()
    tokens = list(range(1200))
    pages.add(tokens, restored)
    other = [t if i < shared else t + 5000 for i, t in enumerate(tokens[:length])]
    assert pages.count(other) == min(restored, min(shared, length) // 256)


# -- the tokenizer --------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers() -> tuple[GgufTokenizer, Any]:
    ours, _ = load_tokenizer("smollm2")
    assert isinstance(ours, GgufTokenizer)
    return ours, wrap_gguf(ours)


@pytest.mark.model
@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_the_server_reads_text_as_the_model_does(
    tokenizers: tuple[GgufTokenizer, Any], text: str
) -> None:
    ours, wrapped = tokenizers
    assert list(wrapped.encode(text)) == ours.encode(text)
    messages = [{"role": "user", "content": text}]
    theirs = wrapped.apply_chat_template(messages, add_generation_prompt=True)
    assert list(theirs) == ours.apply_chat_template(messages)


@pytest.mark.model
@pytest.mark.parametrize("text", ["Ein schöner Tag", "12.5 % of 日本", "a  b\n\n\tc 🙂 d"])
def test_streamed_text_is_the_text(tokenizers: tuple[GgufTokenizer, Any], text: str) -> None:
    ours, wrapped = tokenizers
    stream = wrapped.detokenizer
    for token in ours.encode(text):
        stream.add_token(token)
    stream.finalize()
    assert stream.text == text
