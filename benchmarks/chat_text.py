"""Where ``texts/chat.txt`` comes from: everyday questions, answered by SmolLM2 itself.

Conversations of three turns in the model's own chat template, sampled at temperature 0.8
from the 40 likeliest tokens, seed 7. Run it to make other such text; takes minutes.
"""

import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.mlx.load import load_model

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTIONS = (
    "Can you help me plan a week of simple vegetarian dinners for two people?",
    "My bicycle chain keeps slipping under load. What should I check first?",
    "Explain why the sky is blue to a ten year old.",
    "I have a job interview on Friday. How should I prepare?",
    "What is the difference between a virus and a bacterium?",
    "Write a short thank-you note to my neighbour who watered my plants.",
    "How do I remove a red wine stain from a white shirt?",
    "Tell me a short story about a lighthouse keeper and a lost dog.",
    "What are some good ways to save money on heating in winter?",
    "Could you explain how a mortgage works?",
    "I feel tired every afternoon. Any ideas why?",
    "Which planets have rings?",
    "Suggest a weekend trip for a family with small children.",
    "How do I teach my dog to come when called?",
    "What makes bread rise?",
    "Give me three tips for better photographs.",
    "How should I start learning the guitar?",
    "What is compound interest?",
)
ANSWER_TOKENS, TURNS, TEMPERATURE, LIKELIEST, END = 220, 3, 0.8, 40, 2


def answer(model: Any, tokens: list[int], cache: list[Any]) -> Iterator[int]:
    """Sampled tokens that follow ``tokens`` until the turn ends."""
    given = mx.array([tokens])
    for _ in range(ANSWER_TOKENS):
        scores = model(given, cache=cache)[0, -1] / TEMPERATURE
        scores = mx.where(scores < mx.sort(scores)[-LIKELIEST], -1e9, scores)
        token = int(mx.random.categorical(scores))
        if token == END:
            return
        yield token
        given = mx.array([[token]])


def main() -> None:
    """Print the text."""
    loaded = load_model("smollm2")
    mx.random.seed(7)
    for first in range(0, len(QUESTIONS), TURNS):
        cache = make_prompt_cache(loaded.model)
        text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        for question in QUESTIONS[first : first + TURNS]:
            text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            found = loaded.tokenizer.decode(
                list(answer(loaded.model, loaded.tokenizer.encode(text), cache))
            )
            sys.stdout.write(text + found)
            text = "<|im_end|>\n"
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
