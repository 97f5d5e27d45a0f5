"""Tokenizers of other models' kinds, small and trained here: the same pre-tokenizers, control tokens and templates."""

import json
import random
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# The regular expressions of https://github.com/openai/tiktoken (o200k_base) and of Llama 3 and Qwen 2.
_O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip
_LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA.replace(r"\p{N}{1,3}", r"\p{N}")

PHI4 = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
    "message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + "
    "message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI2 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Instruct: ' + message['content'] + '\nOutput:' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
)
LLAMA = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = r"""
{%- if messages[0].role == 'system' %}{%- set own = messages[0].content %}
{%- else %}{%- set own = 'You are a helpful assistant.' %}{%- endif %}
{{- '<|im_start|>system\n' + own }}
{%- if tools %}
    {{- '\n\n# Tools\n\nYou may call functions, which are given between <tools></tools>:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools>\n\nReturn a call as an object between <tool_call></tool_call>:\n<tool_call>\n' }}
    {{- '{"name": <name>, "arguments": <object>}\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- elif message.tool_calls %}
        {{- '<|im_start|>assistant' + ('\n' + message.content if message.content else '') }}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


@dataclass(frozen=True)
class Kind:
    """What a model's tokenizer is made of.

    Attributes:
        model_type: of the model's config.json, by which transformers chooses how it loads the tokenizer.
        control: added tokens by their names, and whether they are special.
        text: added tokens that are text.
        rstrip: control tokens that swallow white space behind them.
    """

    model_type: str
    tokenizer_class: str
    control: dict[str, bool]
    template: str | None
    bos: str | None
    eos: str
    regex: str | None = None
    text: tuple[str, ...] = ()
    rstrip: tuple[str, ...] = ()
    normalizer: Any = None
    begins: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, trained."""
        return _trained(self.model_type)

    def write(self, folder: Path, **changes: Any) -> None:
        """Writes tokenizer.json and tokenizer_config.json, with other values where given."""
        self.tokenizer().save(str(folder / "tokenizer.json"))
        config = {
            "bos_token": self.bos, "eos_token": self.eos, "pad_token": self.eos, "chat_template": self.template,
            "clean_up_tokenization_spaces": False, "tokenizer_class": self.tokenizer_class, **self.config, **changes,
        }  # fmt: skip
        kept = {key: value for key, value in config.items() if value is not None or key == "bos_token"}
        (folder / "tokenizer_config.json").write_text(json.dumps(kept), "utf-8")


KINDS = {
    "Phi-4-mini": Kind(
        "phi3", "GPT2Tokenizer",
        dict.fromkeys(["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"], True)
        | dict.fromkeys(
            ["<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"], False
        ),
        PHI4, "<|endoftext|>", "<|endoftext|>", _O200K,
        rstrip=("<|assistant|>", "<|end|>", "<|user|>", "<|system|>"), config={"add_bos_token": False},
    ),
    "Phi-2": Kind(
        "phi", "CodeGenTokenizer", {"<|endoftext|>": True}, None, "<|endoftext|>", "<|endoftext|>",
        text=(*(" " * count for count in range(31, 1, -1)), *("\t" * count for count in range(9, 1, -1))),
    ),
    "Llama 3": Kind(
        "llama", "PreTrainedTokenizerFast",
        dict.fromkeys(
            ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], True
        ),
        LLAMA, "<|begin_of_text|>", "<|eot_id|>", _LLAMA, begins=True,
    ),
    "Qwen 2": Kind(
        "qwen2", "Qwen2Tokenizer",
        dict.fromkeys(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], True)
        | dict.fromkeys(["<tool_call>", "</tool_call>", "<think>", "</think>"], False),
        QWEN, None, "<|im_end|>", _QWEN, normalizer=normalizers.NFC, config={"add_bos_token": False},
    ),
}  # fmt: skip

_TEXT = (
    "hello world the capital of Spain is Madrid don't it's and an answer Instruct Output system user assistant one two "
    "\u4e2d\u6587 \u00e9t\u00e9 \U0001f999 def return print numbers 1234 10 3.14 {} [] () <| |> < > / // , . ! ?\n\n\t "
    '[{"name": "weather", "description": "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, '
    '"required": ["city"], "additionalProperties": false}}] {"arguments": {"integer" Rome Paris Oslo add'
)


@cache
def _trained(model_type: str) -> Tokenizer:
    kind = next(kind for kind in KINDS.values() if kind.model_type == model_type)
    tokenizer = Tokenizer(models.BPE())
    if kind.normalizer:
        tokenizer.normalizer = kind.normalizer()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.regex is None)
    split = [pre_tokenizers.Split(Regex(kind.regex), "isolated")] if kind.regex else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    lines = [" ".join(rng.choices(_TEXT.split(" "), k=12)) for _ in range(300)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet))
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in kind.text])
    for name, special in kind.control.items():
        token = AddedToken(name, special=special, normalized=False, rstrip=name in kind.rstrip)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if kind.begins:
        bos = (kind.bos, tokenizer.token_to_id(kind.bos))
        template = processors.TemplateProcessing(single=f"{kind.bos} $A", special_tokens=[bos])
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template])
    return tokenizer


@dataclass(frozen=True)
class Small:
    """A random model of a family, small, with a context of 4096.

    Attributes:
        config: the class of transformers' configuration, without `Config`.
        kind: of its tokenizer; None for the embedded model's, which is Phi-3's kind.
        changes: to the configuration.
        template: what the user gives in place of the weights' chat template.
    """

    config: str
    kind: str | None
    changes: dict[str, Any] = field(default_factory=dict)
    template: str | None = None

    def write(self, folder: Path) -> Path:
        """Writes it as transformers does."""
        import torch
        import transformers

        folder.mkdir(parents=True)
        if self.kind:
            tokenizer, eos = KINDS[self.kind].tokenizer(), [KINDS[self.kind].eos]
            KINDS[self.kind].write(folder)
        else:
            tokenizer, eos = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json")), ["<|endoftext|>"]
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(EMBEDDED / name, folder / name)
        eos += [name for name in ("<|end|>",) if tokenizer.token_to_id(name) is not None]
        ids = [tokenizer.token_to_id(name) for name in eos]
        own = {"vocab_size": tokenizer.get_vocab_size() + 8, "bos_token_id": ids[0], "pad_token_id": ids[0]}
        config = getattr(transformers, f"{self.config}Config")(**{**SIZES, **own, "eos_token_id": ids, **self.changes})
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder


EMBEDDED = Path(__file__).resolve().parent.parent / "artifacts" / "transformers"
SIZES = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 4096, "initializer_range": 0.15,
}  # fmt: skip
# Where LongRope turns to its second table.
SWITCH = 64


def _longrope(numbers: int) -> dict[str, Any]:
    """The configuration of Microsoft's 128k models, for so many numbers of a head that are turned."""
    factors = {
        "short_factor": [1 + 0.05 * place for place in range(numbers // 2)],
        "long_factor": [1.5 + 0.5 * place for place in range(numbers // 2)],
    }
    return {
        "original_max_position_embeddings": SWITCH, "sliding_window": 262144,
        "rope_scaling": {"type": "longrope", **factors},
    }  # fmt: skip


SMALL = {
    "Phi-3-mini-128k": Small("Phi3", None, {**_longrope(32), "num_key_value_heads": 4}),
    "Phi-3-medium": Small("Phi3", None, {"num_key_value_heads": 1, "sliding_window": 47}),
    "Phi-4-mini": Small(
        "Phi3", "Phi-4-mini",
        {
            **_longrope(48), "num_attention_heads": 2, "num_key_value_heads": 1,
            "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
        },
    ),
    "Phi-2": Small("Phi", "Phi-2", {"partial_rotary_factor": 0.5}, PHI2),
    "Llama 3": Small("Llama", "Llama 3", {"num_key_value_heads": 2}),
    "Qwen 2": Small("Qwen2", "Qwen 2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "Qwen 3": Small("Qwen3", "Qwen 2", {"num_key_value_heads": 2, "head_dim": 32}),
}  # fmt: skip
