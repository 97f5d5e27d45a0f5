"""A tiny tokenizer of Phi-3's kind and a decoder without a model, for tests that need neither weights nor torch."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from phi3_mlflow.runtime.decoders.base import Decoder, Growth, Part
from phi3_mlflow.runtime.decoders.blocks import Blocks
from phi3_mlflow.runtime.tokens import Tokens

WORDS = ["hello", "world", "the", "capital", "of", "spain", "is", "madrid", "user", "end", "yes", "no", "one", "two"]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()[]{}<>|/_-+=*#é"
CONTROL = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def _merges() -> list[tuple[str, str]]:
    merges = []
    for word in WORDS:
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
        merges.append(("\u2581", word))
    return list(dict.fromkeys(merges))


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
NAMES = list(
    dict.fromkeys(["<unk>", "<s>", "</s>", *BYTES, "\u2581", *LETTERS, *(left + right for left, right in _merges())])
)
IDS = {name: index for index, name in enumerate([*NAMES, *CONTROL])}
EOS = frozenset(IDS[name] for name in ("<|endoftext|>", "<|assistant|>", "<|end|>"))
VOCAB_SIZE = len(IDS)
PADDING = 10  # as in Phi-3, the model gives more logits than the tokenizer has tokens
LOGITS = VOCAB_SIZE + PADDING


def tokenizer_json(
    *, rstrip: Sequence[str] = ("</s>", "<|assistant|>"), lstrip: Sequence[str] = (), metaspace: bool = False,
    post_processor: bool = True,
) -> str:  # fmt: skip
    """The tokenizer, with the layout of Phi-3's: BPE with byte fallback, `</s>` an added token that is not special.

    Args:
        rstrip: added tokens that swallow the whitespace behind them.
        lstrip: added tokens that swallow the whitespace before them.
        metaspace: put the space before the first word by a pre-tokenizer, as transformers' LlamaTokenizer does.
        post_processor: whether BOS is put before plain text.
    """
    added = [
        {"id": IDS[name], "content": name, "special": name != "</s>", "single_word": False, "normalized": False}
        | {"lstrip": name in lstrip, "rstrip": name in rstrip}
        for name in ("<unk>", "<s>", "</s>", *CONTROL)
    ]
    replace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, spaces]}
    pre_tokenizer = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None if metaspace else normalizer,
            "pre_tokenizer": pre_tokenizer if metaspace else None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [IDS["<s>"]], "tokens": ["<s>"]}},
            }
            if post_processor
            else None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    replace,
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "<unk>",
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": {name: IDS[name] for name in NAMES},
                "merges": [f"{left} {right}" for left, right in _merges()],
            },
        }
    )


def config(**values: object) -> dict:
    """tokenizer_config.json, with other values where given; None leaves a key out."""
    own = {
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {key: value for key, value in (own | values).items() if value is not None}


def tokens(**values: object) -> Tokens:
    """The tiny tokenizer; the arguments are those of `tokenizer_json` and of `config`."""
    ours = {key: values.pop(key) for key in ("rstrip", "lstrip", "metaspace", "post_processor") if key in values}
    return Tokens(tokenizer_json(**ours), config(**values))  # type: ignore[arg-type]


TOKENS = tokens()


def spell(text: str) -> list[int]:
    """The ids of an answer's text, as the model would write it."""
    return TOKENS._first.encode(text, add_special_tokens=False).ids


def peak(token: int, size: int = LOGITS) -> np.ndarray:
    """Logits by which a greedy sampler chooses the token; all padding is more likely still."""
    logits = np.full(size, -10, np.float32)
    logits[VOCAB_SIZE:] = 99
    logits[token] = 10
    return logits


def hashed(state: object, size: int = LOGITS) -> np.ndarray:
    """Logits that any difference in the state changes entirely."""
    digest = hashlib.blake2b(repr(state).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).standard_normal(size, np.float32)


class FakeDecoder(Decoder):
    """A decoder whose logits come from a script, or from a hash of all that its sequence was computed with.

    The hash covers for every token which others it was prefilled together with, so that logits differ as soon as a
    sequence was not computed as in a fresh run; a decoder that mixes prompts does not depend on it.

    Args:
        script: the prompt's ids in, the ids of its answer out; None for hashed logits.
        slots: see Decoder.
        chunk: see Decoder.
        context_length: see Decoder.
        capacity: see Decoder; None for room in every slot.
        block: tokens of a block, which several sequences may share.
        mixed: see Decoder.
        cost: see Decoder.
        switch: see Decoder.
        on_call: called in each call with its name, slot (None for decode) and ids; may raise or wait. A step counts as
            a "prefill" of each slot whose prompt it goes on with, and as one "decode" of all others together.
    """

    engine = "fake"

    def __init__(
        self,
        script: Callable[[list[int]], Sequence[int]] | None = None,
        *,
        slots: int = 1,
        chunk: int = 4,
        context_length: int = 64,
        capacity: int | None = None,
        block: int = 1,
        mixed: bool = False,
        cost: float = 0.1,
        switch: int = 0,
        on_call: Callable[[str, int | None, list[int]], None] = lambda name, slot, ids: None,
    ):
        self.slots, self.chunk, self.context_length, self.eos = slots, chunk, context_length, EOS
        self.capacity = capacity or slots * (-(-context_length // block) * block)
        self._blocks = Blocks(self.capacity // block, slots, block)
        self.mixed, self.cost, self.switch = mixed, cost, switch
        self.calls: list[tuple[str, int | None, list[int]]] = []
        self.closed = False
        self._script = script
        self._on_call = on_call
        self._sequences: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in range(slots)]
        self._prompts = [0] * slots  # where the prompt ends
        self._answers = [False] * slots  # whether it has, and an answer is being decoded
        self._certain = [0] * slots  # how many of its tokens were not only proposed
        self.steps = 0
        self._failed = False

    def step(self, parts: Mapping[int, Part]) -> Mapping[int, np.ndarray]:
        assert parts
        prompts = {slot: part for slot, part in parts.items() if not self._answers[slot]}
        answers = {slot: part for slot, part in parts.items() if slot not in prompts}
        assert self.mixed or len(parts) == 1 or not prompts
        assert self.mixed or sum(len(part.ids) for part in prompts.values()) <= self.chunk
        assert len(answers) == 1 or self.mixed or all(len(part.ids) == 1 for part in answers.values())
        assert all(len(part.ids) == part.logits <= max(1, self.chunk) for part in answers.values())
        self.steps += 1
        places = {}
        for slot, part in parts.items():
            assert 0 <= part.logits <= len(part.ids)
            assert part.ids
            self._append(slot, list(part.ids), slot in prompts)
            end = self._certain[slot] = len(self._sequences[slot])
            if slot in prompts:
                self._prompts[slot] = end
            else:
                self._certain[slot] = end - len(part.ids) + 1
            places[slot] = range(len(self._sequences[slot]) - part.logits + 1, len(self._sequences[slot]) + 1)
        try:
            for slot, part in prompts.items():
                self._note("prefill", slot, part.ids)
            if answers:
                self._note("decode", None, [part.ids[0] for part in answers.values()])
        except BaseException:
            self._failed = True
            raise
        for slot, part in prompts.items():
            self._answers[slot] = part.logits > 0
        return {
            slot: np.stack([self._logits(slot, place) for place in places[slot]])
            for slot, part in parts.items()
            if part.logits
        }

    def rewind(self, slot: int, length: int) -> None:
        self._note("rewind", slot, [length])
        held = len(self._sequences[slot])
        assert 0 <= length <= held
        del self._sequences[slot][length:]
        self._blocks.truncate(slot, length)
        # An answer goes on only where what was proposed, or what a failed step may have left, is taken back.
        goes_on = self._certain[slot] <= length < held or (self._failed and length >= self._prompts[slot])
        self._answers[slot] = self._answers[slot] and goes_on

    def copy(self, source: int, target: int, length: int) -> None:
        self._note("copy", target, [source, length])
        assert source != target
        assert 0 <= length <= len(self._sequences[source])
        self._sequences[target] = self._sequences[source][:length]
        self._blocks.share(source, target, length)
        self._answers[target] = False

    def room(self, growths: Iterable[Growth]) -> int:
        return self._blocks.size * self._blocks.taken(growths)

    def close(self) -> None:
        assert not self.closed
        self.closed = True

    def count(self, name: str) -> int:
        """How many calls of this name there were."""
        return sum(call[0] == name for call in self.calls)

    def prefilled(self) -> list[int]:
        """The slots of the prefills, in order."""
        return [slot for name, slot, _ in self.calls if name == "prefill" and slot is not None]

    def _note(self, name: str, slot: int | None, ids: Sequence[int]) -> None:
        assert not self.closed
        self.calls.append((name, slot, list(ids)))
        self._on_call(name, slot, list(ids))

    def _append(self, slot: int, ids: list[int], prefilled: bool) -> None:
        alone = self.mixed or not prefilled
        self._sequences[slot] += [(token, (token,) if alone else tuple(ids)) for token in ids]
        assert len(self._sequences[slot]) <= self.context_length
        self._blocks.grow({slot: len(self._sequences[slot])})

    def _logits(self, slot: int, length: int) -> np.ndarray:
        sequence = [token for token, _ in self._sequences[slot][:length]]
        if self._script is None:
            return hashed(self._sequences[slot][:length])
        start = self._prompts[slot]
        answer = [*self._script(sequence[:start]), IDS["<|end|>"]]
        return peak(answer[min(len(sequence) - start, len(answer) - 1)])
