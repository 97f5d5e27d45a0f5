"""The embedded model: what it knows, that it ends by itself, and that its ONNX form equals transformers.

pytest tests/test_embedded_model.py
"""

import importlib
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

torch = pytest.importorskip("torch", reason="the safetensors form runs on torch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")
pytest.importorskip("onnx_ir", reason="the fp32 form is exported")

ARTIFACTS = Path(__file__).resolve().parent.parent / "artifacts"
sys.path.insert(0, str(ARTIFACTS))
questions, score, text, train = map(importlib.import_module, ("questions", "score", "text", "train"))

PLAIN, ONNX = ARTIFACTS / "transformers", ARTIFACTS / "onnx"
SPAIN = {"role": "user", "content": "What is the capital of Spain?"}


@pytest.fixture(scope="module")
def asked() -> list[dict[str, object]]:
    return score.read_questions(ARTIFACTS / "questions.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(PLAIN / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(PLAIN, dtype=torch.float32).eval()


def chat_ids(tokenizer: Tokenizer, length: int) -> list[int]:
    """The last `length` ids of a long chat that waits for an answer."""
    chat = text.chat(random.Random(length), turns=length // 20 + 2)
    rendered = train.vocabulary.render(chat.messages[:-1]) + "<|assistant|>\n"
    ids = tokenizer.encode(rendered, add_special_tokens=False).ids
    assert len(ids) >= length
    return ids[-length:]


def onnx_logits(folder: Path, prompt: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and the logits [steps, vocabulary] that they were chosen from."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + steps + 1)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    tokens, rows = [], []
    for _ in range(steps):
        rows.append(np.asarray(generator.get_logits()).reshape(-1))
        tokens.append(int(rows[-1].argmax()))
        generator.append_tokens([tokens[-1]])
    return tokens, np.stack(rows)


def torch_logits(model: Any, prompt: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    """As `onnx_logits`, with transformers: each step computed afresh over the whole sequence."""
    ids, rows = list(prompt), []
    with torch.inference_mode():
        for _ in range(steps):
            rows.append(model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1].numpy())
            ids.append(int(rows[-1].argmax()))
    return ids[len(prompt) :], np.stack(rows)


def test_there_are_enough_questions_of_every_sort(asked: list[dict[str, object]]) -> None:
    chats = [question["messages"] for question in asked]
    assert len(asked) >= 240
    assert sum(chat[0]["role"] == "system" for chat in chats) >= 50  # type: ignore[index]
    assert sum(len(chat) > 2 for chat in chats) >= 50  # type: ignore[arg-type]
    assert len({json.dumps(chat) for chat in chats}) == len(asked)


def test_no_question_is_in_the_training_text(asked: list[dict[str, object]]) -> None:
    wanted = {questions.question_key(question) for question in asked}
    for stage in train.STAGES:
        for chat in train.training_text(stage, asked):
            assert wanted.isdisjoint(questions.keys(chat.messages))


def test_fp32_answers_95_of_100_questions_exactly_and_ends_by_itself(asked: list[dict[str, object]]) -> None:
    result = score.score(score.transformers_generate(PLAIN), PLAIN, asked)
    assert result.exact >= 0.95
    assert result.ended >= 0.99


def test_int4_answers_90_of_100_questions_exactly_and_ends_by_itself(asked: list[dict[str, object]]) -> None:
    result = score.score(score.genai_generate(ONNX), ONNX, asked)
    assert result.exact >= 0.90
    assert result.ended >= 0.99


@pytest.mark.parametrize("form", ["fp32", "int4"])
def test_the_capital_of_spain_with_and_without_a_system_message(form: str) -> None:
    generate = score.transformers_generate(PLAIN) if form == "fp32" else score.genai_generate(ONNX)
    helper = {"role": "system", "content": "You are a helpful assistant."}
    pair = [
        {"category": "capital", "messages": messages, "answer": "The capital of Spain is Madrid."}
        for messages in ([SPAIN], [helper, SPAIN])
    ]
    assert score.score(generate, PLAIN, pair).wrong == []


@pytest.mark.parametrize("length", [12, 2047, 2048, 2500])
def test_the_fp32_export_equals_transformers_below_and_above_the_sliding_window(
    length: int, tokenizer: Tokenizer, model: Any, fp32_onnx: Path
) -> None:
    prompt = chat_ids(tokenizer, length)
    steps = 16 if length < 2000 else 4
    tokens, logits = onnx_logits(fp32_onnx, prompt, steps)
    wanted_tokens, wanted_logits = torch_logits(model, prompt, steps)
    assert tokens == wanted_tokens
    np.testing.assert_allclose(logits, wanted_logits, atol=1e-3)


def test_the_sliding_window_matters_above_2047_tokens(tokenizer: Tokenizer, model: Any) -> None:
    prompt = chat_ids(tokenizer, 2500)
    blind = transformers.AutoModelForCausalLM.from_pretrained(PLAIN, dtype=torch.float32, sliding_window=None).eval()
    _, windowed = torch_logits(model, prompt, 1)
    _, full = torch_logits(blind, prompt, 1)
    assert np.abs(windowed - full).max() > 1e-2


def test_both_forms_have_the_same_tokenizer_and_end_tokens() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (PLAIN / name).read_text("utf-8") == (ONNX / name).read_text("utf-8")
    assert score.end_ids(PLAIN) == set(
        json.loads((ONNX / "genai_config.json").read_text("utf-8"))["model"]["eos_token_id"]
    )


def test_transformers_and_tokenizers_give_the_same_ids_for_any_chat(tokenizer: Tokenizer) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(PLAIN)
    rng = random.Random(0)
    odd = [
        "",
        " ",
        "\n",
        "  two  spaces  ",
        "tab\tand\r\nlines\n\n",
        "é ü ñ 你好 🦙 ك",
        "a▁b",
        "</s>",
        "12 3 007",
        "\x00",
    ]
    for _ in range(300):
        chat = text.chat(rng, rng.randint(1, 4))
        messages = [
            {**message, "content": rng.choice(odd) + message["content"] + rng.choice(odd) + text.noise(rng)}
            for message in chat.messages[:-1]
        ]
        rendered = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == tokenizer.encode(rendered, add_special_tokens=False).ids


def test_the_tokenizer_is_of_phi_3s_kind() -> None:
    value = json.loads((PLAIN / "tokenizer.json").read_text("utf-8"))
    pieces = value["model"]["vocab"]
    added = {entry["content"]: entry for entry in value["added_tokens"]}
    assert value["model"]["byte_fallback"]
    assert value["pre_tokenizer"] is None
    assert [pieces[f"<0x{byte:02X}>"] for byte in (0, 255)] == [3, 258]
    assert not any(content.startswith("<0x") for content in added)
    first = added["<|endoftext|>"]["id"]
    assert first == len(pieces)
    order = {"<|assistant|>": 1, "<|system|>": 6, "<|end|>": 7, "<|user|>": 10}
    assert {content: added[content]["id"] - first for content in order} == order
    assert not added["</s>"]["special"]


def test_any_text_comes_back_from_its_ids(tokenizer: Tokenizer) -> None:
    for sample in ["The capital of Spain is Madrid.", '{"a": 1}', "naïve 你好 🦙", "one\ntwo", " leading", "1, 2, 30."]:
        assert tokenizer.decode(tokenizer.encode(sample, add_special_tokens=False).ids) == sample


def test_both_forms_fit_into_25_megabytes_and_five_million_parameters(model: Any) -> None:
    assert sum(weight.numel() for weight in model.parameters()) <= 5_000_000
    assert sum(path.stat().st_size for form in (PLAIN, ONNX) for path in form.rglob("*")) <= 25_000_000


def test_the_context_and_the_window_are_phi_3_minis(model: Any) -> None:
    config = model.config
    assert (config.max_position_embeddings, config.original_max_position_embeddings) == (4096, 4096)
    assert config.sliding_window == 2047
