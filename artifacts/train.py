"""Makes the embedded model from nothing: text, tokenizer, training, both forms, scores.

    python artifacts/train.py

takes up to an hour on two cores and needs phi3-mlflow with the extra `quantize`. The seed is fixed; another
processor or torch version rounds differently, so the weights then differ in detail.
"""

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import questions
import score
import text
import torch
import vocabulary
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, Phi3Config, Phi3ForCausalLM

from phi3_mlflow.quantize import export

HERE = Path(__file__).resolve().parent
PIECES = 2048
TOKENS_PER_BATCH = 1536
PEAK_RATE = 3e-3
MATRIX_RATE = 0.02


@dataclass(frozen=True)
class Stage:
    """One fall of the learning rate from its peak to zero, over a text of its own.

    `rate` scales the peaks. From the share `noise_from` of the steps on, every other step sees int4 weights.
    """

    seed: int
    chats: int
    steps: int
    rate: float
    noise_from: float
    drill: bool


STAGES = [
    Stage(seed=3, chats=150_000, steps=4200, rate=1.0, noise_from=0.5, drill=False),
    Stage(seed=4, chats=60_000, steps=2800, rate=0.5, noise_from=0.0, drill=True),
]


class NoisyLinear(torch.nn.Linear):
    """A linear layer that can be trained against int4 rounding.

    Rounds as the exporter does: blocks of 32 inputs, symmetric, the largest value of a block at -8. The gradient
    passes straight through (Bengio et al. 2013, arXiv:1308.3432).
    """

    noisy = False

    def forward(self, inputs: Tensor) -> Tensor:
        """Args: inputs: [..., in_features]. Returns [..., out_features]."""
        weight = self.weight
        if NoisyLinear.noisy:
            blocks = weight.detach().view(weight.shape[0], -1, 32)
            largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
            scale = torch.where(largest == 0, torch.ones_like(largest), largest / -8)
            rounded = (blocks / scale).round().clamp(-8, 7) * scale
            weight = weight + (rounded.view_as(weight) - weight.detach())
        return functional.linear(inputs, weight)


def new_model(tokenizer: Tokenizer) -> Phi3ForCausalLM:
    """A small Phi-3 with random weights: Phi-3-mini-4k's form, context and window."""
    ids = {content: tokenizer.token_to_id(content) for content, _ in vocabulary.CONTROL_TOKENS}
    config = Phi3Config(
        # Like the real model's, the embedding is larger than the tokenizer.
        vocab_size=math.ceil(tokenizer.get_vocab_size() / 64) * 64,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        sliding_window=2047,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        attn_implementation="sdpa",
    )
    model = Phi3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=1,
        eos_token_id=[ids["<|endoftext|>"], ids["<|assistant|>"], ids["<|end|>"]],
        pad_token_id=ids["<|endoftext|>"],
    )
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = NoisyLinear
    return model


def new_tokenizer(chats: list[text.Chat], folder: Path) -> Tokenizer:
    """A tokenizer trained on the chats and written into the folder; transformers must give the same ids."""
    contents = (message["content"] for chat in chats[:60_000] for message in chat.messages)
    # Only ASCII: the characters of the noise would fill the vocabulary, and bytes can spell them.
    tokenizer = vocabulary.train_tokenizer(filter(str.isascii, contents), PIECES)
    vocabulary.save_tokenizer(tokenizer, folder)
    reference = AutoTokenizer.from_pretrained(folder)
    for chat in chats[:2000]:
        ids = reference.apply_chat_template(chat.messages, tokenize=True, return_dict=False)
        if ids[:-1] != tokenizer.encode(vocabulary.render(chat.messages), add_special_tokens=False).ids:
            raise SystemExit(f"transformers tokenizes this chat differently: {chat.messages}")
    return tokenizer


def training_text(stage: Stage, asked: list[dict[str, object]]) -> list[text.Chat]:
    """The stage's chats, without those that hold one of the questions."""
    taken = {questions.question_key(question) for question in asked}
    chats = text.corpus(stage.seed, stage.chats, stage.drill)
    return [chat for chat in chats if taken.isdisjoint(questions.keys(chat.messages))]


def tokenize(chats: list[text.Chat], tokenizer: Tokenizer, seed: int) -> list[list[int]]:
    """The chats as token ids, as the chat template renders them; half of them begin with <s>."""
    rng = random.Random(seed)
    encoded = tokenizer.encode_batch([vocabulary.render(chat.messages) for chat in chats], add_special_tokens=False)
    return [([1] if rng.random() < 0.5 else []) + chat.ids[:4000] for chat in encoded]


def batches(chats: list[list[int]], assistant: int, end: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of chats of like length, without end: ids [rows, length] and whether each id is to be learned.

    Only answers are learned, each with its <|end|>.
    """
    rng = random.Random(seed)
    while True:
        rng.shuffle(chats)
        for start in range(0, len(chats), 2000):
            group: list[list[list[int]]] = [[]]
            for chat in sorted(chats[start : start + 2000], key=len):
                if group[-1] and len(chat) * (len(group[-1]) + 1) > TOKENS_PER_BATCH:
                    group.append([])
                group[-1].append(chat)
            rng.shuffle(group)
            for rows in group:
                ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
                for row, chat in enumerate(rows):
                    ids[row, : len(chat)] = torch.tensor(chat)
                # Inside an answer: more <|assistant|> than <|end|> came after the last role token before it.
                learned = torch.zeros_like(ids, dtype=torch.bool)
                for row, chat in enumerate(rows):
                    inside = False
                    for position, token in enumerate(chat):
                        learned[row, position] = inside
                        inside = token == assistant or (inside and token != end)
                yield ids, learned


def orthogonal(gradients: Tensor) -> Tensor:
    """The nearest matrices with orthogonal rows or columns, roughly: gradients [parts, rows, columns].

    Newton-Schulz with the quintic of Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).
    """
    tall = gradients.shape[1] > gradients.shape[2]
    matrix = gradients.mT if tall else gradients
    matrix = matrix / (matrix.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = matrix @ matrix.mT
        matrix = 3.4445 * matrix + (-4.7750 * square + 2.0315 * square @ square) @ matrix
    return matrix.mT if tall else matrix


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal, for the matrices of the layers (same source as `orthogonal`)."""

    def __init__(self, weights: list[tuple[str, torch.nn.Parameter]]):
        """Args: weights: name and matrix; the fused projections are taken apart again."""
        fused = {"qkv_proj": 3, "gate_up_proj": 2}
        groups = [{"params": [weight], "parts": fused.get(name.split(".")[-2], 1)} for name, weight in weights]
        super().__init__(groups, {"lr": MATRIX_RATE})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every matrix, with Nesterov momentum 0.95 and a weight decay of 0.05."""
        for group in self.param_groups:
            weight = group["params"][0]
            momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
            momentum.lerp_(weight.grad, 0.05)
            update = weight.grad.lerp(momentum, 0.95).view(group["parts"], -1, weight.shape[1])
            scale = max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            weight.mul_(1 - 0.05 * group["lr"])
            weight.add_(orthogonal(update).reshape_as(weight), alpha=-scale * group["lr"])


def train(model: Phi3ForCausalLM, source: Iterator[tuple[Tensor, Tensor]], stage: Stage) -> None:
    """Trains the model in place with a warm-up and a cosine fall to zero; only the answers count."""
    inner = [(name, weight) for name, weight in model.named_parameters() if weight.dim() == 2 and "layers" in name]
    names = {name for name, _ in inner}
    outer = [weight for name, weight in model.named_parameters() if name not in names]
    optimizers = [Muon(inner), torch.optim.AdamW(outer, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0)]
    peaks = [MATRIX_RATE, PEAK_RATE]
    model.train()
    began, running = time.monotonic(), 0.0
    for step in range(stage.steps):
        rate = stage.rate * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / stage.steps))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        NoisyLinear.noisy = step > stage.noise_from * stage.steps and step % 2 == 0
        ids, learned = next(source)
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        wanted = learned[:, 1:]
        loss = functional.cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(outer, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        if step % 100 == 99:
            spent = time.monotonic() - began
            say(f"step {step + 1} of {stage.steps}  loss {running / 100:.4f}  {spent:.0f} s")
            running = 0.0
    NoisyLinear.noisy = False
    model.eval()


def say(line: str) -> None:
    """One line of progress, on stderr."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def install(new: Path, target: Path) -> None:
    """Put a finished folder in the place of an old one."""
    old = target.with_name(target.name + ".old")
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Make the model and write both forms and their scores into the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="where transformers/, onnx/ and scores.json go")
    options = parser.parse_args()
    torch.manual_seed(STAGES[0].seed)
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    asked = score.read_questions(HERE / "questions.jsonl")
    options.output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(dir=options.output, prefix=".train-") as folder:
        plain, onnx = Path(folder, "transformers"), Path(folder, "onnx")
        first = training_text(STAGES[0], asked)
        tokenizer = new_tokenizer(first, plain)
        assistant, end = (tokenizer.token_to_id(token) for token in ("<|assistant|>", "<|end|>"))
        model = new_model(tokenizer)
        say(f"{sum(weight.numel() for weight in model.parameters()):,} parameters")
        for stage in STAGES:
            ids = tokenize(first if stage is STAGES[0] else training_text(stage, asked), tokenizer, stage.seed)
            train(model, batches(ids, assistant, end, stage.seed), stage)
        model.save_pretrained(plain)
        (plain / "model.safetensors").chmod(0o644)
        shutil.copy(HERE / "LICENSE", plain / "LICENSE")
        install(export(plain, onnx), options.output / "onnx")
        install(plain, options.output / "transformers")

    plain, onnx = options.output / "transformers", options.output / "onnx"
    scores = {}
    for form, generate in (
        ("fp32", score.transformers_generate(plain)),
        ("int4", score.genai_generate(onnx)),
    ):
        result = score.score(generate, plain, asked)
        scores[form] = {"exact": result.exact, "ended": result.ended, "by_category": result.by_category}
        say(f"{form}: exact {result.exact:.1%}, ended {result.ended:.1%}")
        for question, given in result.wrong:
            say(f"  {question['messages']} wanted {question['answer']!r} gave {given!r}")
    (options.output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", "utf-8")
    sys.stdout.write(f"{options.output}\n")


if __name__ == "__main__":
    main()
