"""Scores a form of the embedded model on the held-out questions: exact answers, and answers that end by themselves.

Greedy, at most 128 tokens. It knows both forms, and nothing of how they were made.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MAX_TOKENS = 128
Ids = list[int]
Generate = Callable[[list[Ids]], list[Ids]]


@dataclass(frozen=True)
class Score:
    """Shares of 1 over a question set; `by_category` holds (exact, asked), `wrong` (question, wanted, given)."""

    exact: float
    ended: float
    by_category: dict[str, tuple[int, int]]
    wrong: list[tuple[dict[str, object], str]]


def read_questions(path: Path) -> list[dict[str, object]]:
    """The questions of a JSON-lines file: messages, answer and category."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def end_ids(folder: Path) -> set[int]:
    """The end tokens that generation_config.json names."""
    return set(json.loads((folder / "generation_config.json").read_text("utf-8"))["eos_token_id"])


def transformers_generate(folder: Path, batch: int = 210) -> Generate:
    """Greedy decoding of the safetensors form with transformers, in fp32, padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ends = end_ids(folder)

    def generate(prompts: list[Ids]) -> list[Ids]:
        answers: dict[int, Ids] = {}
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), batch):
            indices = order[start : start + batch]
            width = max(len(prompts[index]) for index in indices)
            ids = torch.zeros(len(indices), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(indices):
                ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
                mask[row, width - len(prompts[index]) :] = 1
            with torch.inference_mode():
                output = model.generate(ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=False)
            for row, index in enumerate(indices):
                answers[index] = _cut(output[row, width:].tolist(), ends)
        return [answers[index] for index in range(len(prompts))]

    return generate


def genai_generate(folder: Path) -> Generate:
    """Greedy decoding of the ONNX form with onnxruntime-genai, one prompt at a time."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    ends = end_ids(folder)

    def one(prompt: Ids) -> Ids:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=min(len(prompt) + MAX_TOKENS + 1, 4096))
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        answer: Ids = []
        while len(answer) < MAX_TOKENS:
            token = int(generator.get_logits().reshape(-1).argmax())
            answer.append(token)
            if token in ends:
                break
            generator.append_tokens([token])
        return answer

    return lambda prompts: [one(prompt) for prompt in prompts]


def score(generate: Generate, folder: Path, questions: list[dict[str, object]]) -> Score:
    """Ask every question and compare the decoded answers with the right ones, character for character.

    Args:
        generate: prompts to answers, both as token ids, the end token included.
        folder: either form's folder, for its tokenizer and end tokens.
        questions: as `read_questions` gives them.
    """
    import transformers
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [
        tokenizer.encode(
            template.apply_chat_template(question["messages"], tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        ).ids
        for question in questions
    ]
    ends = end_ids(folder)
    answers = generate(prompts)
    by_category: dict[str, tuple[int, int]] = {}
    wrong = []
    for question, answer in zip(questions, answers, strict=True):
        text = tokenizer.decode([token for token in answer if token not in ends], skip_special_tokens=False)
        exact, asked = by_category.get(str(question["category"]), (0, 0))
        right = text == question["answer"] and answer[-1] in ends
        by_category[str(question["category"])] = (exact + right, asked + 1)
        if not right:
            wrong.append((question, text))
    return Score(
        exact=1 - len(wrong) / len(questions),
        ended=sum(answer[-1] in ends for answer in answers) / len(questions),
        by_category=by_category,
        wrong=wrong,
    )


def _cut(ids: Ids, ends: set[int]) -> Ids:
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids
