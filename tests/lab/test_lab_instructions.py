"""Conversations with an early instruction: rules, examples, and a cache that is carried."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Words
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.lab.chat_frame import ChatFrame, chat_frame
from kvferry.codec.lab.forward import prefill
from kvferry.codec.lab.instructions.converse import converse, say, turn_tokens
from kvferry.codec.lab.instructions.examples import Example, Turn, load_examples
from kvferry.codec.lab.instructions.memory import Whole
from kvferry.codec.lab.instructions.rules import FORMATS, KINDS, Rule, make_rule
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.tokenizer import Message
from kvferry.errors import ConfigError

FRAME = ChatFrame([1, 2], [3], [4, 5])


@pytest.mark.parametrize(
    ("rule", "kept", "broken"),
    [
        ({"contains": "peanut"}, "You must not eat PEANUTS.", "You may eat nuts."),
        ({"contains": "red"}, "The red one.", "It is covered."),
        ({"contains": "42"}, "Bus 42.", "Bus 420."),
        ({"excludes": "Felix"}, "Luna", "Luna and Felix"),
        ({"any_of": ["three", "3"]}, "3 apples", "13 apples"),
        ({"starts_with": "Yes, Captain"}, '"Yes, captain", it is.', "Well, yes, Captain"),
        ({"ends_with": "OVER"}, "It is Rome. Over!", "Over and out"),
        ({"max_words": 2}, "Madrid it", "It is Madrid"),
        ({"min_words": 2}, "Two words", "One"),
        ({"format": "uppercase"}, "PARIS, 1!", "PARIS Is"),
        ({"format": "lowercase"}, "paris", "Paris"),
        ({"format": "number"}, "-1,250.5", "12 apples"),
        ({"format": "json"}, '{"answer": "Rome"}', "Rome"),
        ({"format": "list"}, "Here:\n- apple\n- pear", "- apple"),
        ({"language": "fr"}, "La capitale est dans le nord.", "The capital is Berlin."),
        ({"language": "de"}, "Die Hauptstadt ist Berlin.", "Madrid"),
    ],
)
def test_rules(rule: dict[str, object], kept: str, broken: str) -> None:
    made = make_rule("test", rule)
    assert made.kept(kept)
    assert made.kept(f"  {kept}\n")
    assert not made.kept(broken)
    assert make_rule("test", made.to_json()) == made


def test_an_empty_answer_keeps_no_rule_but_those_of_absence() -> None:
    values = {"any_of": ("a",), "max_words": 3, "min_words": 1, "language": "en"}
    for kind in KINDS:
        for value in FORMATS if kind == "format" else [values.get(kind, "a")]:
            assert Rule(kind, value).kept("") is (kind == "excludes")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"contains": ""},
        {"contains": "a", "excludes": "b"},
        {"sounds_like": "a"},
        {"max_words": 0},
        {"max_words": "3"},
        {"any_of": "three"},
        {"any_of": [3]},
        {"format": "xml"},
        {"language": "tlh"},
        "contains",
    ],
)
def test_a_rule_that_cannot_be_is_refused(given: object) -> None:
    with pytest.raises(ConfigError, match="somewhere"):
        make_rule("somewhere", given)


def test_the_examples_that_come_along() -> None:
    examples = load_examples()
    assert len(examples) >= 30
    assert {example.kind for example in examples} == {
        "reminder",
        "conflict",
        "contradiction",
        "instruction",
        "format",
    }
    assert sum(example.kind in ("conflict", "contradiction") for example in examples) >= 30
    for example in examples:
        # What is asked for stands in the first turn alone, or later turns would tell it.
        later = " ".join(f"{t.user} {t.assistant}" for t in example.untold().turns)
        wanted = [r for r in example.rules if r.kind not in ("excludes", "max_words", "format")]
        assert not any(rule.kept(later) for rule in wanted if rule.kind != "language"), example.name
        assert not example.right(""), example.name
        if example.kind == "contradiction":
            # Who knows the later turns alone breaks a rule: what they say is excluded.
            assert any(r.kind == "excludes" and not r.kept(later) for r in example.rules)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": 2}, "version"),
        ({"examples": []}, "examples"),
        ({"examples": ["no"]}, "examples"),
        ({"fillers": []}, "fillers"),
        ({"fillers": {"a": {"user": "x"}}}, "fillers.a"),
    ],
)
def test_a_file_that_cannot_be_read_as_examples(
    change: dict[str, object], named: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(valid() | change))
    with pytest.raises(ConfigError, match=named):
        load_examples(path)


@pytest.mark.parametrize("key", ["id", "kind", "turns", "test", "rules"])
def test_an_example_that_lacks_something_is_named(key: str, tmp_path: Path) -> None:
    value = valid()
    del value["examples"][0][key]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=key):
        load_examples(path)


def test_one_example_twice_and_a_filler_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    value = valid()
    path.write_text(json.dumps(value | {"examples": value["examples"] * 2}))
    with pytest.raises(ConfigError, match="one"):
        load_examples(path)
    path.write_text(json.dumps(value | {"fillers": {}}))
    with pytest.raises(ConfigError, match="tea"):
        load_examples(path)
    path.write_bytes(b"\xff{")
    with pytest.raises(ConfigError, match="JSON"):
        load_examples(path)
    with pytest.raises(ConfigError, match="file to read"):
        load_examples(tmp_path / "none.json")


def valid() -> dict[str, Any]:
    return {
        "version": 1,
        "fillers": {"tea": {"user": "Tea?", "assistant": "Yes."}},
        "examples": [
            {
                "id": "one",
                "kind": "reminder",
                "turns": [{"user": "I am Ann.", "assistant": "Hi."}, {"filler": "tea"}],
                "test": "Who?",
                "rules": [{"contains": "Ann"}],
            }
        ],
    }


class Chat(Words):
    """Words with a template that marks who speaks."""

    def apply_chat_template(
        self, messages: list[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        text = "".join(f"<{m['role']}>{m['content']}." for m in messages)
        return [7, *self.encode(text + ("<assistant>" if add_generation_prompt else ""))]


def test_the_frame_of_a_template_gives_its_conversations_again() -> None:
    tokenizer = Chat()
    said = [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    frame = chat_frame(tokenizer, "Be kind")
    made = [*frame.opening, *tokenizer.encode("A"), *frame.asked, *tokenizer.encode("B")]
    made += [*frame.answered, *tokenizer.encode("C"), *frame.asked]
    assert made == tokenizer.apply_chat_template(said)


class Base(Words):
    """A tokenizer whose model has no chat template, and that puts a token in front."""

    def encode(self, text: str) -> list[int]:
        return [9, *super().encode(text)]

    def apply_chat_template(
        self, messages: list[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        raise ValueError("no template")


def test_a_model_without_template_gets_line_breaks() -> None:
    frame = chat_frame(Base())
    assert list(frame.opening) == [9]
    assert list(frame.asked) == Words().encode("\n")
    assert list(frame.answered) == Words().encode("\n\n")


EXAMPLE = Example(
    "one",
    "reminder",
    (Turn("I am Ann.", "Hi."), Turn("Tea?", "Yes."), Turn("Rain?", "No.")),
    "Who?",
    (Rule("min_words", 1),),
)


def test_a_conversation_is_read_as_one_text_and_its_memory_asked_after_each_turn(
    tiny: LoadedModel,
) -> None:
    asked = []

    class Watching(Whole):
        def after_turn(self, cache: list[Any], tokens: int) -> list[Any]:
            asked.append((tokens, cache[0].offset))
            return cache

    turns = turn_tokens(tiny, FRAME, EXAMPLE)
    flat = [token for turn in turns for token in turn]
    answered = converse(tiny, FRAME, EXAMPLE, Watching(), limit=6)
    cache = make_prompt_cache(tiny.model)
    prefill(tiny.model, flat[:-1], cache)
    whole = say(tiny, cache, flat[-1:], 6)
    assert answered.answer == tiny.tokenizer.decode(whole)
    ends = [len(turns[0]), len(turns[0] + turns[1]), len(turns[0] + turns[1] + turns[2])]
    assert asked == [(end, end) for end in ends]
    assert answered.tokens == ends[-1]
    assert answered.share == 1.0


def test_what_a_memory_gives_back_is_what_the_model_goes_on_from(tiny: LoadedModel) -> None:
    class Forgetful(Whole):
        def after_turn(self, cache: list[Any], tokens: int) -> list[Any]:
            return list(make_prompt_cache(tiny.model))

    turns = turn_tokens(tiny, FRAME, EXAMPLE)
    found = converse(tiny, FRAME, EXAMPLE, Forgetful(), limit=6).answer
    alone = say(tiny, make_prompt_cache(tiny.model), turns[-1], 6)
    assert found == tiny.tokenizer.decode(alone)


def test_untold_leaves_out_the_first_turn_only(tiny: LoadedModel) -> None:
    untold = EXAMPLE.untold()
    assert untold.turns == EXAMPLE.turns[1:]
    assert (untold.test, untold.rules) == (EXAMPLE.test, EXAMPLE.rules)
