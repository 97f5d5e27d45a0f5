"""The tokenizer of the embedded model: of the same kind as Phi-3's, with a small vocabulary.

Byte-pair encoding with byte fallback, no pre-tokenizer, Phi-3's control tokens, flags and chat template.
It knows nothing of models.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# Phi-3's order and flags: content, rstrip. Their ids follow the vocabulary's.
CONTROL_TOKENS = [
    ("<|endoftext|>", False),
    ("<|assistant|>", True),
    ("<|placeholder1|>", True),
    ("<|placeholder2|>", True),
    ("<|placeholder3|>", True),
    ("<|placeholder4|>", True),
    ("<|system|>", False),
    ("<|end|>", False),
    ("<|placeholder5|>", True),
    ("<|placeholder6|>", True),
    ("<|user|>", False),
]
FIRST_PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer of `size` pieces (the control tokens come on top), trained on plain texts.

    Args:
        texts: messages without control tokens.
        size: number of pieces, with <unk>, <s>, </s> and the 256 bytes.

    Returns:
        The tokenizer; its first 259 ids are Phi-3's.
    """
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    draft = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    draft.normalizer = normalizer
    # Words keep their leading space; digits, newlines and signs stand alone. No merge then crosses these borders,
    # so the finished tokenizer, which has no pre-tokenizer, gives the same ids.
    draft.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\p{L}+|\n|."), "isolated")
    ascii_signs = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=FIRST_PIECES, initial_alphabet=["▁", "\n", *ascii_signs], show_progress=False
    )
    draft.train_from_iterator(texts, trainer)
    model = json.loads(draft.to_str())["model"]
    pieces = model["vocab"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken("<unk>", normalized=False), AddedToken("<s>", normalized=False)])
    tokenizer.add_tokens([AddedToken("</s>", rstrip=True, normalized=False, special=False)])
    tokenizer.add_special_tokens(
        [AddedToken(content, rstrip=rstrip, normalized=False, special=True) for content, rstrip in CONTROL_TOKENS]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as Phi-3's repository has them.

    The class is PreTrainedTokenizerFast: transformers 5 rebuilds a LlamaTokenizer with another normalizer, and its
    ids then differ from those of tokenizer.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
        for entry in json.loads(tokenizer.to_str())["added_tokens"]
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", "utf-8")


def render(messages: list[dict[str, str]]) -> str:
    """The chat as the chat template writes it, without a generation prompt and without its final eos token."""
    return "".join(f"<|{message['role']}|>\n{message['content']}<|end|>\n" for message in messages)
