"""What config.json may say of a transformers model. Run: pytest tests/test_trust_config.py."""

import json
import re
import shutil
from pathlib import Path

import pytest

from phi3_mlflow.runtime import trust
from phi3_mlflow.runtime.errors import WeightsError, shorten

ARTIFACTS = Path(__file__).resolve().parent.parent / "artifacts"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return shutil.copytree(ARTIFACTS / "transformers", tmp_path / "weights")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("key", "least", "most"),
    [
        ("vocab_size", 1, 2**20),
        ("num_hidden_layers", 1, 1024),
        ("num_labels", 0, 1024),
        ("max_position_embeddings", 1, 2**24),
        ("hidden_size", 1, 2**18),
        ("intermediate_size", 1, 2**18),
        ("num_attention_heads", 1, 2**12),
        ("num_key_value_heads", 1, 2**12),
        ("head_dim", 1, 2**12),
    ],
)
def test_a_size_that_no_model_has_is_refused_with_what_it_may_be(weights, key, least, most):
    path = weights / "config.json"
    for value in (least - 1, most + 1, 2**70, -(2**70), float(least), str(least), True, [], {}):
        change(path, **{key: value})
        words = re.escape(f"{path} has {key} {shorten(value)}: it must be an integer from {least} to {most}")
        with pytest.raises(WeightsError, match=words):
            trust.transformers_files(weights, weights)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 2**20),
        ("hidden_size", 20_000),
        ("intermediate_size", 20_000),
        ("num_hidden_layers", 1024),
        ("head_dim", 4096),
        ("num_key_value_heads", 4096),
    ],
)
def test_a_size_that_its_weights_do_not_have_is_refused(weights, key, value):
    """Transformers would make the rest at random, in memory."""
    size = (weights / "model.safetensors").stat().st_size
    change(weights / "config.json", **{key: value})
    with pytest.raises(WeightsError, match=rf"the sizes of a model of more than \d+ bytes, .* have {size}:"):
        trust.transformers_files(weights, weights)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_attention_heads"])
def test_a_size_that_is_left_open_is_missed(weights, key):
    change(weights / "config.json", **{key: None})
    with pytest.raises(WeightsError, match=rf"config\.json has no {key}: "):
        trust.transformers_files(weights, weights)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", ["phi3"], "1 to 100 printable ASCII characters"),
        ("model_type", "p" * 101, "1 to 100 printable ASCII characters"),
        ("architectures", "Phi3ForCausalLM", "a list of at most 10"),
        ("architectures", ["Phi3ForCausalLM"] * 11, "a list of at most 10"),
        ("architectures", [["Phi3ForCausalLM"]], "1 to 100 printable ASCII characters"),
        ("dtype", "load", "'float32' or 'float16' or 'bfloat16'"),
        ("torch_dtype", {"": "float32"}, "'float32' or 'float16' or 'bfloat16'"),
    ],
)
def test_a_name_of_a_model_that_is_none_is_refused(weights, key, value, words):
    change(weights / "config.json", **{key: value})
    with pytest.raises(WeightsError, match=rf"config\.json has {key}.*: it must be {words}"):
        trust.transformers_files(weights, weights)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [2112, -2, "1", 1.0, True, {"a": 1}, [[1]], ["1"], [0] * 65])
def test_a_token_that_the_model_does_not_have_is_refused(weights, name, key, value):
    change(weights / name, **{key: value})
    with pytest.raises(
        WeightsError, match=rf"{re.escape(name)} has {key}.*: it must be .*(from -1 to 2111|at most 64)"
    ):
        trust.transformers_files(weights, weights)
    for fine in (None, -1, 2111, [0, 2111]):
        change(weights / name, **{key: fine})
        trust.transformers_files(weights, weights)
