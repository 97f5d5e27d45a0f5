"""What rounding costs: the finished folder and transformers read the same text, and their logits are compared.

Nothing is sampled: both predict each next token of the text from the text before it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi3_mlflow.runtime import loading, pretrained
from phi3_mlflow.runtime.decoders.base import Part
from phi3_mlflow.runtime.decoders.longrope import switch_in
from phi3_mlflow.runtime.errors import Phi3Error, WeightsError
from phi3_mlflow.runtime.tokens import Tokens

from .evidence import Checked, Passage
from .sources import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Prose of this toolkit's documentation, 3,651 of Phi-3's tokens.
TEXT = Path(__file__).with_name("text.txt")
# Tokens of the passages. The longer one goes beyond Phi-3-mini's sliding window of 2,047.
SHORT, LONG = 256, 2304
_LEAST = 16  # tokens of a text that says anything

Passages = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Check:
    """What the finished folder is read with.

    Attributes:
        text: a file of UTF-8 text; its end is the short passage, its beginning the long one.
        max_perplexity_rise: in percent of transformers' perplexity, for each passage; None for no bound.
    """

    text: Path = TEXT
    max_perplexity_rise: float | None = None

    def __post_init__(self) -> None:
        bound = self.max_perplexity_rise
        if bound is not None and not (math.isfinite(bound) and bound >= 0):
            raise Phi3Error(f"`max_perplexity_rise` is {bound}; it must be 0 or more, in percent")

    def texts(self, tokenizer: Path, config: Mapping[str, Any]) -> Passages:
        """The token ids of the passages by their names.

        The long one is left out where the text, the context, or what LongRope computes with its first table is
        shorter.

        Args:
            tokenizer: folder with the tokenizer.
            config: of the model, as transformers has it.

        Raises:
            Phi3Error: the file cannot be read, or is too short.
            WeightsError: the tokenizer cannot be read.
        """
        try:
            text = self.text.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Phi3Error(f"{self.text} cannot be read as text: {error}") from error
        ids = Tokens.from_folder(tokenizer, template=False).encode_text(text)
        context = min(int(config["max_position_embeddings"]), switch_in(config) or len(ids))
        if min(len(ids), context) < _LEAST:
            raise Phi3Error(f"{self.text} has {len(ids)} tokens for this model: at least {_LEAST} are needed")
        found = {"short": ids[-min(SHORT, context) :]}
        if min(len(ids), context) >= LONG:
            found["long"] = ids[:LONG]
        return found

    def run(self, source: Path, folder: Path, report: Callable[[str], None] | None = None) -> Checked:
        """Reads the passages with both models, one after the other.

        Args:
            source: the model in transformers' form.
            folder: the finished folder.
            report: called with a line for each step.

        Raises:
            WeightsError: one of them cannot be loaded, or its logits are no numbers.
        """
        passages = self.texts(source, read_json(source / "config.json"))
        found = compare(source, folder, passages, report)
        reference = f"transformers {version('transformers')} in float32"
        return Checked(self.text.name, reference, found, self.max_perplexity_rise)


def compare(
    source: Path, folder: Path, passages: Passages, report: Callable[[str], None] | None = None
) -> list[Passage]:
    """The numbers of each passage.

    Args:
        source: the model in transformers' form.
        folder: in onnxruntime-genai's.
        passages: token ids, at least two of each, by names.
        report: called with a line for each step.

    Raises:
        WeightsError: one of them cannot be loaded, or its logits are no numbers.
    """
    say = report or (lambda line: None)
    expected = {}
    with _reference(source) as logits_of:
        for name, ids in passages.items():
            say(f"Reading {len(ids)} tokens with transformers")
            expected[name] = logits_of(ids)
    settings = {"context_length": max(map(len, passages.values()))}
    decoder = loading.onnx_decoder(folder, settings)
    found = []
    try:
        for name, ids in passages.items():
            say(f"Reading {len(ids)} tokens with {decoder.engine}")
            decoder.rewind(0, 0)
            sums = _Sums()
            for at in range(0, len(ids), decoder.chunk):
                part = ids[at : at + decoder.chunk]
                logits = decoder.step({0: Part(part, len(part))})[0]
                sums.add(logits, expected[name][at : at + len(part)], ids[at + 1 : at + 1 + len(part)])
            found.append(sums.passage(name, len(ids)))
    finally:
        decoder.close()
    return found


class _Sums:
    """Adds up what the numbers of a passage are the means of."""

    def __init__(self) -> None:
        self._rows = self._same = self._predicted = 0
        self._loss = self._expected_loss = self._divergence = self._squares = self._spread = 0.0

    def add(self, logits: np.ndarray, expected: np.ndarray, following: Sequence[int]) -> None:
        """Takes logits of (positions, vocabulary) of both, and the tokens that follow; the last one may have none."""
        width = min(logits.shape[1], expected.shape[1])
        found, wanted = (each[:, :width].astype(np.float64) for each in (logits, expected))
        self._rows += len(found)
        self._same += int((found.argmax(1) == wanted.argmax(1)).sum())
        # What is added to all logits of a position changes nothing.
        difference = found - wanted
        self._squares += float(difference.var(1).sum())
        self._spread += float(wanted.var(1).sum())
        found, wanted = _log_softmax(found), _log_softmax(wanted)
        self._divergence += float((np.exp(wanted) * (wanted - found)).sum())
        rows = np.arange(len(following))
        self._loss -= float(found[rows, following].sum())
        self._expected_loss -= float(wanted[rows, following].sum())
        self._predicted += len(following)

    def passage(self, name: str, tokens: int) -> Passage:
        """The means.

        Raises:
            WeightsError: they are no numbers.
        """
        numbers = {
            "perplexity": math.exp(min(self._loss / self._predicted, 700)),
            "reference_perplexity": math.exp(min(self._expected_loss / self._predicted, 700)),
            "same_token": self._same / self._rows,
            "divergence": self._divergence / self._rows,
            "logit_error": math.sqrt(self._squares / self._spread) if self._spread else math.nan,
        }
        if not all(map(math.isfinite, numbers.values())):
            raise WeightsError("the logits are no numbers (NaN, infinite or all the same): the weights are damaged")
        return Passage(name, tokens, **numbers)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@contextmanager
def _reference(source: Path) -> Iterator[Callable[[Sequence[int]], np.ndarray]]:
    """A function that gives transformers' logits of all positions, in float32."""
    import torch

    from phi3_mlflow.bars import no_bars

    with no_bars():
        model = pretrained.load(source)
    _widen(model.eval())

    def logits_of(ids: Sequence[int]) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
        return found

    yield logits_of


def _widen(model: "PreTrainedModel") -> None:
    """Lets each module compute in float32 with weights that are widened for the time of its call alone.

    All of them at once would take twice the memory that the files have; these are mapped.
    """
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.is_floating_point()]
        if not own:
            continue

        def before(_: Any, __: Any, own: list[Any] = own) -> None:
            for parameter in own:
                parameter.narrow_data = parameter.data
                parameter.data = parameter.data.float()

        def after(_: Any, __: Any, ___: Any, own: list[Any] = own) -> None:
            for parameter in own:
                parameter.data = parameter.__dict__.pop("narrow_data")

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
