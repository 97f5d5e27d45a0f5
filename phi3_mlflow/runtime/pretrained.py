"""A folder in transformers' form -> its model, when each tensor that the model has is in the files.

Transformers fills what is missing, or is there under another name, with random numbers. It is called for folders that
`trust` has checked.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import WeightsError
from .trust import tensors

if TYPE_CHECKING:
    import transformers

# Types of numbers that a model of these kinds computes with.
_FLOATS = ("F64", "F32", "F16", "BF16")
# What older files have for every layer, and each model computes for itself.
_COMPUTED = ".rotary_emb.inv_freq"
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load(folder: Path) -> "transformers.PreTrainedModel":
    """The model of a folder that `check` was called on, in the type that its weights have.

    Raises:
        WeightsError: transformers refuses the files.
    """
    from transformers import AutoModelForCausalLM

    try:
        model: transformers.PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", **_LOCAL)
    except Exception as error:  # transformers raises many kinds
        raise _refused(folder, error) from error
    return model


def check(folder: Path) -> None:
    """Compares the headers of the files with the model that config.json describes; no number is read.

    Raises:
        WeightsError: a tensor is missing, has another shape, or belongs to no such model.
    """
    files, found = tensors.read(folder)
    wanted, tied = _described(folder)
    odd = next((name for name in found if name not in wanted and not name.endswith(_COMPUTED)), None)
    for name, shape in wanted.items():
        tensor = found.get(name)
        if tensor is None and tied.get(name) not in found:
            instead = f"; it has {odd}, which that model has not" if odd else ""
            raise WeightsError(
                f"{files[0]} has no tensor {name}, which the model of config.json needs{instead}: save that model "
                "with save_pretrained"
            )
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in _FLOATS):
            raise WeightsError(
                f"{tensor.path} has the tensor {name} as {tensor.dtype} in the shape {list(tensor.shape)}, and the "
                f"model of config.json needs a floating-point type in the shape {list(shape)}: give the "
                "config.json of these weights, as they were before any quantization"
            )
    if odd is not None:
        raise WeightsError(
            f"{found[odd].path} has the tensor {odd}, which the model of config.json has not: merge an adapter first, "
            "or give the config.json of these weights"
        )


def check_numbers(model: "transformers.PreTrainedModel", owner: str) -> None:
    """Refuses a model that could answer nothing. Reads every number once, so it is for the time of logging.

    Args:
        model: with its weights.
        owner: where they come from, for an error.

    Raises:
        WeightsError: a tensor has a number that is none, or infinite.
    """
    import torch

    for name, parameter in model.named_parameters():
        # Such a number shows in the sum, which is quick; the sum of good ones may be infinite all the same.
        if not parameter.detach().sum(dtype=torch.float32).isfinite() and not parameter.isfinite().all():
            raise WeightsError(
                f"{owner} has NaN or infinite numbers in the tensor {name}: the copy is damaged, or training failed"
            )


def _described(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes of the tensors that transformers' model has, by their names; and which one each tied one is."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), **_LOCAL)
        with torch.device("meta"):
            # Another type would for that time be torch's default in every thread.
            model = AutoModelForCausalLM.from_config(config, dtype="float32", trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise _refused(folder, error) from error
    tied = dict(model.all_tied_weights_keys)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, tied | {source: name for name, source in tied.items()}


def _refused(folder: Path, error: Exception) -> WeightsError:
    return WeightsError(f"transformers cannot load {folder}: {' '.join(str(error).split())[:300]}")
