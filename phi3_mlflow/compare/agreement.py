"""How alike two models answer, token by token: where answers part, and how likely one's tokens are to the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phi3_mlflow.runtime.chat import Request
from phi3_mlflow.runtime.errors import Phi3Error
from phi3_mlflow.runtime.tokens import Tokens

from .answers import Answer, failed, prepare
from .models import Subject
from .questions import Question

_LEAST = 1e-15  # of a probability's distance from 1, which is as near as a double gets


@dataclass(frozen=True)
class Agreement:
    """A candidate's answer beside the reference's, to one question.

    Attributes:
        first_difference: the token of the reference's answer at which the candidate's parts from it, from 0; None
            where they are the same to the end.
        tokens: of the reference's answer, the end token included.
        drift: by how much the log odds of the reference's tokens differ between the models, on average; in nats, at
            least 0. None where their tokenizers differ.
        nats_by_reference, nats_by_candidate: the mean log probability of the reference's tokens, by either.
        nats_of_candidate: the mean log probability of the candidate's tokens, by the reference.
    """

    first_difference: int | None
    tokens: int
    drift: float | None
    nats_by_reference: float
    nats_by_candidate: float
    nats_of_candidate: float


def agree(
    reference: Subject,
    candidate: Subject,
    question: Question,
    answers: tuple[Answer, Answer],
) -> Agreement:
    """Compares two answers. Both models read both; nothing is sampled, so that it repeats.

    Raises:
        Phi3Error: a model failed; names the model and the question.
    """
    own, other = answers
    room = min(reference.service.context_length, candidate.service.context_length) - 1
    ids, by_reference = _read(reference, question, own, room)
    other_ids, by_candidate = _read(candidate, question, own, room)
    if (own.text, own.ended) == (other.text, other.ended):
        difference, of_candidate = None, by_reference
    else:
        theirs, of_candidate = _read(reference, question, other, room)
        same = [a == b for a, b in zip(ids, theirs, strict=False)]
        difference = same.index(False) if False in same else len(same)
    alike = ids == other_ids
    return Agreement(
        difference,
        len(ids),
        float(np.mean(np.abs(_log_odds(by_reference) - _log_odds(by_candidate)))) if alike else None,
        float(np.mean(by_reference)),
        float(np.mean(by_candidate)),
        float(np.mean(of_candidate)),
    )


def _read(subject: Subject, question: Question, answer: Answer, room: int) -> tuple[list[int], np.ndarray]:
    """An answer's tokens, and the log probability of each by a model that is given the question.

    Args:
        subject: the model.
        question: what was asked.
        answer: whose tokens are read, as the model's own tokenizer writes them.
        room: the most tokens that may be read, the question included.
    """
    try:
        service = subject.service
        prompt = prepare(subject, question).ids.tolist()  # without the turns that were dropped
        ids = _written(service.tokens, question, answer)[: max(0, room - len(prompt))]
        if not ids:
            raise Phi3Error(f"the prompt takes {len(prompt)} tokens, and the context has no room to read an answer")
        asked: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 0}
        options = service.defaults.with_values({**asked, "n": 1, "max_time": 0, "stop": []})
        request = Request([*prompt, *ids], options, "prompt", echo=True)
        likely = service.run(service.prepare(request)).wait().prompt_logprobs
    except Exception as error:
        raise failed(subject, question, error) from error
    if likely is None:
        raise Phi3Error(f"{subject.label} gives no log probabilities")
    return ids, np.array([each.logprob for each in likely[len(prompt) :]], float)


def _written(tokens: Tokens, question: Question, answer: Answer) -> list[int]:
    """An answer's tokens behind its prompt, with the end token where the model came to it.

    The template writes them, up to its next control token, which is the end. Where it has none, the text is taken as it
    is, and the tokenizer's own end.
    """
    messages: Sequence[Mapping[str, str]] = question.messages
    control = tokens.control
    start = len(tokens.encode_chat(messages))
    whole = tokens.encode_chat([*messages, {"role": "assistant", "content": answer.text}])
    ends = set(control.values())
    stop = next((place for place in range(start, len(whole)) if whole[place] in ends), None)
    if stop is not None:
        ids, end = whole[start:stop], whole[stop : stop + 1]
    else:
        ids = tokens.encode_text(answer.text, bos=False)
        end = [control[name] for key, name in tokens.named.items() if key == "eos_token" and name in control]
    # What was cut off has no end token to be likely.
    return ids + end if answer.ended or not ids else ids


def _log_odds(logprobs: np.ndarray) -> np.ndarray:
    """The logarithm of the odds of each token against all others together.

    Unlike probabilities, they change as much for a token that is almost certain as for any other when the logits do.
    """
    rest = np.maximum(-np.expm1(logprobs), _LEAST)
    return logprobs - np.log(rest)
