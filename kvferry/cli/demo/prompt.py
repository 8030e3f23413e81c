"""The demo's prompt: Python's own documentation and a question about it."""

from kvferry.errors import ModelError

QUESTION = (
    "\n\nUsing the documentation above, explain in a few sentences what a Python class "
    "definition does and when its body is executed."
)
FIRST_TOPIC = "class"


def build_prompt(model: str, length: int) -> tuple[list[int], int]:
    """Token ids of about ``length`` tokens, and how many layers the model has.

    The text is ``pydoc_data.topics`` from the topic on classes onwards; a calibration
    from the same source is told apart by leaving these topics out of it.
    """
    from pydoc_data.topics import topics

    from kvferry.codec.mlx.load import load_tokenizer

    tokenizer, layers = load_tokenizer(model)
    names = sorted(topics)
    start = names.index(FIRST_TOPIC) if FIRST_TOPIC in names else 0
    text = "\n\n".join(topics[name] for name in names[start:] + names[:start])

    def chat(body: str) -> list[int]:
        message = {"role": "user", "content": body + QUESTION}
        return list(tokenizer.apply_chat_template([message]))

    overhead = len(chat(""))
    words = tokenizer.encode(text[: 12 * length])
    if len(words) < length - overhead:
        raise ModelError(f"the documentation gives only {len(words)} tokens, {length} wanted")
    return chat(tokenizer.decode(words[: length - overhead])), layers
