"""Whether a candidate may take a registered alias over: the bounds, the verdicts, and the move, which comes last."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import mlflow

from phi3_mlflow.builders import destination
from phi3_mlflow.layout import counted
from phi3_mlflow.runtime.errors import InvalidRequest, Phi3Error

from .models import Name
from .uncertainty import CONFIDENCE, least_questions, not_worse, ratio, upper

_ALIKE = 0.8  # difflib's ratio of two aliases, one of which may be the other misspelled: champio and champion


@dataclass(frozen=True)
class Bounds:
    """How much worse than the reference a candidate may be. Each bound must be kept with 95 % confidence.

    Attributes:
        margin: share of the questions, between 0 and 1: by how much fewer the candidate may answer rightly.
        drift: nats, above 0: how far the log odds of the reference's tokens may move on average. Infinite for a
            candidate that is meant to be another model.
        slowdown: how many times the reference's time the answers may take together, such as 1.2; None not to look.
    """

    margin: float = 0.05
    drift: float = 0.01
    slowdown: float | None = None

    def check(self, questions: int) -> None:
        """Refuses bounds that mean nothing, and a margin that so few questions can never show to be kept.

        Raises:
            InvalidRequest: names the bound.
        """
        if not 0 < self.margin < 1:
            raise InvalidRequest("--margin", f"is {self.margin:g}; it must be above 0 and below 1")
        if not self.drift > 0:
            raise InvalidRequest("--drift", f"is {self.drift:g}; it must be above 0, and may be inf")
        if self.slowdown is not None and not self.slowdown > 0:
            raise InvalidRequest("--slowdown", f"is {self.slowdown:g}; it must be above 0")
        if questions < (least := least_questions(self.margin)):
            problem = (
                f"is {self.margin:g}, which {counted(questions, 'question')} with expectations cannot show to be kept"
            )
            raise InvalidRequest(
                "--margin", f"{problem}: even for equal models it takes {least}; ask more, or raise it"
            )


@dataclass(frozen=True)
class Verdict:
    """Whether one bound is kept.

    Attributes:
        bound: `margin`, `drift` or `slowdown`.
        kept: whether it is, with 95 % confidence.
        detail: the numbers, in one line.
    """

    bound: str
    kept: bool
    detail: str


@dataclass(frozen=True)
class Gate:
    """An alias, and what it meant when the comparison began.

    Attributes:
        model: the registered model's name.
        alias: of that model.
        version: what the alias is to mean.
        before: the version that it means; None where there is no such alias yet.
    """

    model: str
    alias: str
    version: str
    before: str | None


def open_gate(names: Sequence[Name], alias: str) -> Gate:
    """Checks what can be checked before anything is measured.

    Args:
        names: the reference and the candidate.
        alias: the one to be moved.

    Raises:
        InvalidRequest: there are not two models, the candidate is no registered version or is the reference itself, or
            the alias is new and looks like one that there is.
        BuildError: MLflow does not allow such an alias.
    """
    if len(names) != 2:
        raise InvalidRequest("--gate", f"takes two models, the reference and the candidate, and {len(names)} are given")
    if names[1].registered is None:
        problem = f"moves an alias of a registered model, and {names[1].given} is none; give models:/NAME/VERSION"
        raise InvalidRequest("--gate", problem)
    model, version = names[1].registered
    if names[0].registered == names[1].registered:
        problem = f"would compare version {version} of {model} with itself; the second model is the one that is to get"
        raise InvalidRequest("--gate", f"{problem} the alias, and the first the one that it has to be as good as")
    destination.check_names("candidate", model, alias)
    aliases = _aliases(model)
    if alias not in aliases and (meant := get_close_matches(alias, aliases, 1, _ALIKE)):
        raise InvalidRequest(
            "--gate",
            f"is {alias}, and {model} has no such alias but {meant[0]}; give that one, or where {alias} is meant, make "
            f'it first: mlflow.MlflowClient().set_registered_model_alias("{model}", "{alias}", VERSION)',
        )
    return Gate(model, alias, version, aliases.get(alias))


def judge(
    bounds: Bounds,
    right: Sequence[tuple[bool, bool]],
    drifts: Sequence[float | None],
    times: Sequence[tuple[float, float]],
    seed: int = 0,
) -> list[Verdict]:
    """Tests a candidate against the bounds. It passes where all are kept; nothing is drawn anew, so that it repeats.

    Args:
        bounds: what is allowed.
        right: for each question with expectations, whether the reference and the candidate answered rightly.
        drifts: of each question.
        times: of each question, the candidate's and the reference's.
        seed: of the bootstrap.
    """
    lost = sum(reference and not candidate for reference, candidate in right)
    won = sum(candidate and not reference for reference, candidate in right)
    p = not_worse(lost, won, len(right), bounds.margin)
    verdicts = [
        Verdict(
            "margin",
            p <= 1 - CONFIDENCE,
            f"lost {lost} and won {won} of {counted(len(right), 'question')}; worse by {bounds.margin:g}: p = {p:.3g}",
        )
    ]
    if not math.isinf(bounds.drift):
        known = [drift for drift in drifts if drift is not None]
        if len(known) < len(drifts):
            verdicts.append(Verdict("drift", False, "the tokenizers differ, so that tokens cannot be compared"))
        else:
            most = upper(known, seed)
            mean = sum(known) / len(known)
            detail = f"{mean:.3g} nats a token, at most {most:.3g}; allowed below {bounds.drift:g}"
            verdicts.append(Verdict("drift", most < bounds.drift, detail))
    if bounds.slowdown is not None:
        most = upper(times, seed, ratio)
        detail = f"{ratio(times):.3g} times the reference's time, at most {most:.3g}; allowed {bounds.slowdown:g}"
        verdicts.append(Verdict("slowdown", most <= bounds.slowdown, detail))
    return verdicts


def move(gate: Gate) -> None:
    """Moves the alias.

    Raises:
        Phi3Error: somebody else moved it meanwhile, so that the comparison says nothing of what it means now.
    """
    if (now := _aliases(gate.model).get(gate.alias)) not in (gate.before, gate.version):
        raise Phi3Error(
            f"the alias {gate.alias} of {gate.model} was moved from version {gate.before} to {now} meanwhile, and "
            "stays there: compare again"
        )
    mlflow.MlflowClient().set_registered_model_alias(gate.model, gate.alias, gate.version)


def as_dict(gate: Gate, verdicts: Sequence[Verdict], bounds: Bounds) -> dict[str, Any]:
    """What a result says of a gate."""
    return {
        "model": gate.model,
        "alias": gate.alias,
        "version": gate.version,
        "before": gate.before,
        "passed": all(verdict.kept for verdict in verdicts),
        "bounds": asdict(bounds),
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }


def _aliases(model: str) -> dict[str, str]:
    """The aliases of a registered model, and the versions that they mean."""
    aliases: Mapping[str, Any] = mlflow.MlflowClient().get_registered_model(model).aliases
    return {alias: str(version) for alias, version in aliases.items()}
