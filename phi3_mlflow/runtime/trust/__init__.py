"""Whether a folder of weights is only that: it is checked before any library that could run something of it sees it.

What a model folder beside its weights holds (MLmodel, requirements, code) is code, and nothing is checked of that.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import WeightsError, shorten
from . import files, genai_config, onnx_graph, rules, tensors, tokenizer_config, tokenizer_json
from .models import MODELS

__all__ = [
    "MODELS",
    "TRANSFORMERS_PARTS",
    "check",
    "check_flat_transformers",
    "check_tokenizer",
    "check_transformers",
    "onnx_files",
    "read_onnx",
    "read_transformers",
    "tensors",
    "transformers_files",
]

# The folders of a logged transformers model that hold weights.
TRANSFORMERS_PARTS = ("model", "components")

_MiB = files.MiB
# The files beside the weights that are read, with the size at which that ends.
_JSON = {
    "config.json": _MiB,
    "generation_config.json": _MiB,
    "quantization.json": _MiB,
}
_TEMPLATE = ("chat_template.jinja", _MiB)
# Transformers' names for ways to compute attention. Any other name is a repository on the hub with code to download.
_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
# What transformers makes of config.json, as large as this says, before it looks at the weights.
_SIZES: Mapping[str, Any] = {
    "model_type": rules.text(100),
    "architectures": rules.List(rules.text(100), 10),
    **dict.fromkeys(("dtype", "torch_dtype"), rules.one_of("float32", "float16", "bfloat16")),
    "vocab_size": rules.integer(1, 2**20),
    "num_hidden_layers": rules.integer(1, 1024),
    "num_labels": rules.integer(0, 1024),
    "max_position_embeddings": rules.integer(1, 2**24),
    **dict.fromkeys(("hidden_size", "intermediate_size"), rules.integer(1, 2**18)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), rules.integer(1, 2**12)),
}
# What transformers reads; it unpickles .bin, .pt and .pth, and imports .py.
_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt", ".md", ""})


def check(folder: Path, names: Collection[str] | None = None) -> None:
    """Checks a logged ONNX folder, for every decoder that may load it. Reads no weight file but for its first bytes.

    Args:
        folder: the files.
        names: those that were logged, where the folder is one of the hub's cache, which may hold others.

    Raises:
        WeightsError: genai_config.json has a key or a value that is not on the allow-list or does not fit the graph,
            the graph is refused, a file that is read makes no sense or was not logged, or a file, whether it is used or
            not, is a native library, a pickle or a link that leaves the folder (but for the cache's own links).
    """
    if names is not None:
        return _check_named(folder, read_onnx(folder), names)
    onnx_files(folder)
    return files.check_all(folder)


def onnx_files(folder: Path) -> list[Path]:
    """The files that an ONNX model in a folder cannot do without, each of them checked, and what is read beside them.

    Raises:
        WeightsError: as for `check`, about these files.
    """
    config = genai_config.read(folder)
    path = folder / config["model"]["decoder"]["filename"]
    graph = onnx_graph.check(path)
    genai_config.check_fits(folder, config, graph)
    files.needed(folder / "tokenizer.json")
    _check_texts(folder, genai_config.rows(config, graph))
    return [folder / genai_config.NAME, path, *graph.files, folder / "tokenizer.json"]


def read_onnx(folder: Path) -> list[Path]:
    """Every file of an ONNX folder that something reads: `onnx_files`, and what there is of what may be beside them."""
    return sorted({*onnx_files(folder), *_beside(folder, folder)})


def read_transformers(folder: Path, tokenizer: Path | None = None) -> list[Path]:
    """Every file that something reads of a model that transformers wrote; see `transformers_files` for the errors.

    Args:
        folder: holds config.json and the safetensors.
        tokenizer: holds the tokenizer, and nothing else that is taken of it; None where that is beside them.
    """
    tokenizer = tokenizer or folder
    return sorted({*transformers_files(folder, tokenizer), *_beside(folder, tokenizer)})


def check_flat_transformers(folder: Path, names: Collection[str] | None = None) -> None:
    """Checks a folder of weights as the hub has it, with the tokenizer beside them. Arguments are those of `check`.

    Raises:
        WeightsError: as for `check_transformers`.
    """
    if names is not None:
        return _check_named(folder, read_transformers(folder), names)
    transformers_files(folder, folder)
    return files.check_all(folder)


def _check_named(folder: Path, read: Collection[Path], names: Collection[str]) -> None:
    for path in read:
        if path.name not in names:
            raise WeightsError(
                f"{path} is read with the weights, and the model's manifest does not list it: log the model again"
            )
    for name in names:
        files.needed(folder / name)


def _beside(folder: Path, tokenizer: Path) -> list[Path]:
    """What there is of the files that are read where they are there."""
    names = (tokenizer_json.NAME, *tokenizer_config.FILES, _TEMPLATE[0], "tokenizer.model")
    paths = (*(folder / name for name in _JSON), *(tokenizer / name for name in names))
    return [files.needed(path) for path in paths if path.exists()]


def check_transformers(folder: Path) -> None:
    """Checks the weights of a logged transformers model.

    Args:
        folder: the model's, in which `model` and `components/tokenizer` hold what transformers loads.

    Raises:
        WeightsError: as for `transformers_files`, and where a file, used or not, is something that transformers could
            import or unpickle, a native library, or a link that leaves its folder.
    """
    transformers_files(folder / "model", folder / "components" / "tokenizer")
    for part in (folder / name for name in TRANSFORMERS_PARTS):
        files.check_all(part)
        for path in sorted(part.rglob("*")):
            if path.is_file() and path.suffix not in _SUFFIXES:
                raise WeightsError(f"{path} is nothing that a model of safetensors needs: do not use this copy")


def transformers_files(folder: Path, tokenizer: Path) -> list[Path]:
    """The files that a transformers model in a folder cannot do without, each of them checked.

    `auto_map`, which names Python code, may be there (Microsoft's own files have it): transformers is always told not
    to follow it (`trust_remote_code=False`).

    Args:
        folder: holds config.json and the safetensors.
        tokenizer: holds tokenizer.json and tokenizer_config.json.

    Raises:
        WeightsError: a file is missing or makes no sense, the configuration is not that of a known model or names code
            on the hub, or the headers of the safetensors are not true of them.
    """
    config = _json(folder / "config.json")
    _check_config(folder / "config.json", config)
    if (folder / "adapter_config.json").exists():
        raise WeightsError(
            f"{folder / 'adapter_config.json'} names another model, which transformers would load in place of this "
            "one: merge the adapter with PEFT's merge_and_unload and save the result"
        )
    weights, _ = tensors.read(folder)
    _check_enough(folder / "config.json", config, weights)
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.exists():
            _check_ids(path, _json(path), config["vocab_size"])
    for place in dict.fromkeys((folder, tokenizer)):
        _check_texts(place, config.get("vocab_size"))
    needed = [tokenizer / "tokenizer.json", tokenizer / "tokenizer_config.json"]
    return [folder / "config.json", *weights, *map(files.needed, needed)]


def check_tokenizer(folder: Path, rows: int | None = None) -> None:
    """Checks the files of a tokenizer, where there is one.

    Args:
        folder: may hold them.
        rows: how many tokens the model has; None where that is not known.

    Raises:
        WeightsError: one has a key or a value that is not on the allow-list, they contradict each other, or the
            tokenizer has ids that the model does not have.
    """
    path = folder / tokenizer_json.NAME
    if not path.exists():
        return
    added, size = tokenizer_json.check(folder)
    tokenizer_config.check(folder, added)
    # Some engines read beyond their memory for such an id.
    if rows is not None and size > rows:
        raise WeightsError(
            f"{path} has ids up to {size - 1}, and the model has {rows} tokens: copy or download both again, or call "
            "resize_token_embeddings before the model is saved"
        )


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    for key, rule in _SIZES.items():
        if config.get(key) is not None:
            rules.check(path, config[key], rule, "", key)
    if config.get("quantization_config") is not None:
        raise WeightsError(f"{path} has quantization_config, which no model here needs: give the weights as they were")
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if model_type not in MODELS:
        known = ", ".join(MODELS)
        if "auto_map" in config:
            raise WeightsError(
                f"{path} needs Python code of its own (`auto_map`), which is never run here: give a model of "
                f"a model_type that transformers has itself and that is known here ({known})"
            )
        raise WeightsError(f"{path} has model_type {shorten(model_type)}: it must be one of {known}")
    if architectures and MODELS[model_type] not in architectures:
        raise WeightsError(f"{path} has architectures {shorten(architectures)}: not {MODELS[model_type]}")
    if "transformers_weights" in config:
        raise WeightsError(
            f"{path} has transformers_weights, which names other weights, pickled ones too: remove the key"
        )
    for key in ("attn_implementation", "experts_implementation"):
        for name in (key, f"_{key}", f"_{key}_internal"):
            if config.get(name) is not None and config[name] not in _IMPLEMENTATIONS:
                raise WeightsError(
                    f"{path} has {name} {shorten(config[name])}, which may name code on the hub: it must be one of "
                    f"{', '.join(_IMPLEMENTATIONS)}, or not be there"
                )


def _check_enough(path: Path, config: Mapping[str, Any], weights: Collection[Path]) -> None:
    """Compares the sizes with the weights: transformers makes at random, in memory, what these lack."""
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    rules.require(path, config, needed)
    vocabulary, hidden, inner, layers, heads = (config[key] for key in needed)
    head = config.get("head_dim") or hidden // heads
    # At the least: one matrix of the two or three in a layer's MLP, of the four in its attention, and the embeddings,
    # with a byte for each number.
    attention = head * max(heads, config.get("num_key_value_heads") or 0)
    least = hidden * (vocabulary + layers * (inner + attention))
    size = sum(file.stat().st_size for file in weights)
    if least > size:
        raise WeightsError(
            f"{path} has the sizes of a model of more than {least} bytes, and its weights have {size}: copy or "
            "download both again"
        )


def _check_ids(path: Path, config: Mapping[str, Any], rows: int) -> None:
    token = rules.integer(-1, rows - 1)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        rules.check(path, config.get(key), rules.Either((rules.NULL, token, rules.List(token, 64))), "", key)


def _check_texts(folder: Path, rows: int | None) -> None:
    """Checks the configurations and templates that are there; `rows` as for `check_tokenizer`.

    What a template does is checked where it is rendered.
    """
    for name in _JSON:
        if (folder / name).exists():
            _json(folder / name)
    check_tokenizer(folder, rows)
    name, limit = _TEMPLATE
    if (folder / name).exists():
        files.text(folder / name, limit)


def _json(path: Path) -> dict[str, Any]:
    return files.plain(path, files.json_object(path, _JSON[path.name]))
