"""Random text and conversations that try a tokenizer's limits."""

from phi3_mlflow.runtime.layouts import ROLES

CONTROL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
BITS = [
    *("hello", "world", "the capital of spain", "don't", "It's", "A", "x", "0", "1234", "3.14", "<|", "|>", "end", "<"),
    *(" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u2581", "\u2581\u2581", "\u00a0", "\u3000", "\u2028", "\x1c"),
    *("\u00e9", "e\u0301", "\u4e2d\u6587", "\u0639\u0631\u0628\u064a", "\u0939\u093f", "\U0001f999", "\ufeff"),
    *("\U0001f469\u200d\U0001f469\u200d\U0001f467", "\u00bd", "\x00", "\x01", "\x7f", "\ufffd", "\ufffe", "\ue000"),
    *(".", ",", "!", "?", "\\", '"', "{}", "[/INST]", "<0x0A>", "s>", "</", "\ue0001\ue001"),
]


def text_of(rng, most=9, control=CONTROL):
    """Text without control tokens."""
    while True:
        bits = rng.choices(BITS, k=rng.randint(1, most))
        other = chr(rng.choice([rng.randrange(32, 0x250), rng.randrange(0x1F300, 0x1FAFF)]))
        text = "".join(bits).replace("x", other)
        if not any(token in text for token in control):
            return text


def conversation(rng, control=CONTROL):
    """Messages, most of them in turn."""
    roles = ["user", *(["assistant", "user"] * rng.randint(0, 2))]
    if rng.random() < 0.4:
        roles.insert(0, "system")
    if rng.random() < 0.1:
        roles = rng.choices(ROLES, k=rng.randint(1, 4))
    return [{"role": role, "content": text_of(rng, control=control)} for role in roles]
