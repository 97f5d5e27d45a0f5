"""quantization.json: how the weights of a folder were rounded, and what that was measured to cost.

It reads and writes; how it is measured is in check.py. Imports nothing that needs torch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phi3_mlflow.layout import markdown
from phi3_mlflow.runtime.errors import WeightsError
from phi3_mlflow.runtime.trust import files

NAME = "quantization.json"
_MOST_WORDS = 300  # characters
# The names of what a logged model's page shows of it in words.
PARAMS = ("quantization_method", "quantization_adapter", "quantization_check")


@dataclass(frozen=True)
class Passage:
    """Part of a text, read by both models.

    Attributes:
        name: `short` or `long`.
        tokens: its length.
        perplexity: of the rounded model: e to the mean negative log-probability of each next token.
        reference_perplexity: of transformers, in float32.
        same_token: the share of positions where both find the same token the most likely.
        divergence: the mean Kullback-Leibler divergence of the rounded model's next token, in nats.
        logit_error: the root mean square of the differences of logits, as a share of the logits' own spread.
    """

    name: str
    tokens: int
    perplexity: float
    reference_perplexity: float
    same_token: float
    divergence: float
    logit_error: float

    @property
    def rise(self) -> float:
        """How much higher the perplexity is, in percent; negative where it is lower."""
        return 100 * (self.perplexity / self.reference_perplexity - 1)


@dataclass(frozen=True)
class Checked:
    """The result of a check.

    Attributes:
        text: the name of the text's file.
        reference: what the model was compared with.
        passages: each with its numbers, at least one.
        max_perplexity_rise: the bound that the user set, in percent; None for none.
    """

    text: str
    reference: str
    passages: Sequence[Passage]
    max_perplexity_rise: float | None = None

    @property
    def rise(self) -> float:
        """The highest rise of the perplexity in a passage, in percent."""
        return max(passage.rise for passage in self.passages)

    @property
    def passed(self) -> bool:
        """Whether the bound is kept."""
        return self.max_perplexity_rise is None or self.rise <= self.max_perplexity_rise


@dataclass(frozen=True)
class Evidence:
    """What quantization.json holds.

    Attributes:
        choices: see `Choices.to_dict`.
        source: where the weights come from, in words.
        adapter: the name of the folder of the adapter that was merged; None for none.
        check: the comparison with transformers; None where it was left out.
    """

    choices: Mapping[str, Any]
    source: str
    adapter: str | None = None
    check: Checked | None = None

    def to_dict(self) -> dict[str, Any]:
        """As quantization.json has it; the rises and the verdict are there for readers."""
        found = asdict(self)
        if self.check is not None:
            for passage, entry in zip(self.check.passages, found["check"]["passages"], strict=True):
                entry["perplexity_rise"] = passage.rise
            found["check"]["passed"] = self.check.passed
        return found


def write(folder: Path, evidence: Evidence) -> None:
    """Writes quantization.json into a folder."""
    text = json.dumps(evidence.to_dict(), indent=1, allow_nan=False) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")


def read(folder: Path) -> Evidence | None:
    """Reads quantization.json; None where there is none.

    Raises:
        WeightsError: it does not say what it should.
    """
    path = folder / NAME
    if not path.exists():
        return None
    found = files.plain(path, files.json_object(path))
    try:
        checked = found["check"]
        check = None if checked is None else Checked(
            _words(checked["text"]),
            _words(checked["reference"]),
            [_passage(entry) for entry in checked["passages"]],
            None if checked["max_perplexity_rise"] is None else float(checked["max_perplexity_rise"]),
        )  # fmt: skip
        if check is not None and not check.passages:
            raise ValueError("no passages")
        adapter = None if found["adapter"] is None else _words(found["adapter"])
        choices = {name: _words(value) if isinstance(value, str) else value for name, value in found["choices"].items()}
        return Evidence(choices, _words(found["source"]), adapter, check)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is not what `phi3-mlflow quantize` writes: remove it, or quantize again") from error


def _passage(entry: Mapping[str, Any]) -> Passage:
    numbers = {name: float(entry[name]) for name in _NUMBERS}
    if not all(map(math.isfinite, numbers.values())) or numbers["reference_perplexity"] <= 0:
        raise ValueError("numbers that are none")
    if entry["name"] not in ("short", "long"):
        raise ValueError("another passage")
    return Passage(str(entry["name"]), int(entry["tokens"]), **numbers)


def _words(value: object) -> str:
    """A line that pages and cards may show."""
    if not isinstance(value, str) or not value.isprintable() or len(value) > _MOST_WORDS:
        raise ValueError("no words")
    return value


_NUMBERS = ("perplexity", "reference_perplexity", "same_token", "divergence", "logit_error")


def params(evidence: Evidence) -> dict[str, str]:
    """What the page of a logged model shows of it in words."""
    texts = (str(evidence.choices.get("method", "")), evidence.adapter, line(evidence))
    return {name: text for name, text in zip(PARAMS, texts, strict=True) if text}


def metrics(evidence: Evidence) -> dict[str, float]:
    """The numbers by the names that MLflow shows."""
    found = {}
    for passage in evidence.check.passages if evidence.check else ():
        for name in _NUMBERS:
            found[f"quantization_{passage.name}_{name}"] = getattr(passage, name)
        found[f"quantization_{passage.name}_perplexity_rise"] = passage.rise
    return found


def line(evidence: Evidence) -> str:
    """The check in a line; empty where there was none."""
    if evidence.check is None:
        return ""
    parts = [
        f"{each.rise:+.2f} % perplexity and {each.same_token:.1%} the same next token over {each.tokens:,} tokens"
        for each in evidence.check.passages
    ]
    return f"against {evidence.check.reference} on {evidence.check.text}: {'; '.join(parts)}"


def table(evidence: Evidence) -> str:
    """The check for a terminal."""
    check = evidence.check
    if check is None:
        return "not checked"
    rows = [
        [
            each.name, f"{each.tokens:,}", f"{each.perplexity:.4g}", f"{each.reference_perplexity:.4g}",
            f"{each.rise:+.2f} %", f"{each.same_token:.1%}", f"{each.divergence:.3g}", f"{each.logit_error:.2%}",
        ]
        for each in check.passages
    ]  # fmt: skip
    header = ["passage", "tokens", "perplexity", "reference", "rise", "same token", "divergence", "logit error"]
    parts = [f"{check.text}, against {check.reference}:", "", markdown(header, rows)]
    if lower := [each for each in check.passages if round(each.rise, 2) < 0]:
        names = "; ".join(f"{each.name}, {each.tokens:,} tokens" for each in lower)
        parts += [
            "",
            f"A perplexity below the reference's ({names}) is noise: so short a text cannot show an improvement",
        ]
    if not check.passed:
        parts += [
            "",
            f"The perplexity rises by {check.rise:.2f} %, and at most {check.max_perplexity_rise:g} % is allowed",
        ]
    return "\n".join(parts)
