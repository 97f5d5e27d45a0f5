"""Logits -> one token, by a request's options. Knows nothing of models, text or stopping."""

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import default_rng  # loaded by numpy when it is first asked for, which takes a while

from .options import Options


@dataclass(frozen=True)
class Logprob:
    """How likely the model found a token, and the likeliest tokens for its place: ids and natural logarithms."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest first


def logprob(logits: np.ndarray, token: int, top: int) -> Logprob:
    """The log probability of a token by the model itself, before any option changes the logits.

    Args:
        logits: (vocabulary,) float32, as the model gave them.
        token: the id that was sampled.
        top: how many of the likeliest tokens to name; of equally likely ones the lowest ids.

    Raises:
        ArithmeticError: the model gave a logit that is not a number.
    """
    largest = logits.max()
    if np.isnan(largest):
        raise ArithmeticError("the model gave a logit that is not a number")
    shifted = logits.astype(np.float64) - largest
    logprobs = shifted - np.log(np.exp(shifted).sum())
    likeliest = _most_likely(logprobs, top, 1.0) if top else np.empty(0, int)
    likeliest = likeliest[np.argsort(-logprobs[likeliest], kind="stable")]
    return Logprob(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in likeliest))


class Sampler:
    """Chooses the tokens of one answer.

    In order: logit_bias, repetition, frequency and presence penalty, then the largest where the temperature is 0;
    else temperature, top_k, top_p, min_p and a draw. This is the order of transformers and of llama.cpp's filters.

    Args:
        options: the request's options.
        prompt: the prompt's ids; the repetition penalty looks at them too.
        choice: which of the request's n choices this is. With a seed, each choice draws from a stream of its own.
    """

    def __init__(self, options: Options, prompt: Sequence[int], choice: int = 0):
        self._options = options
        self._biased = np.fromiter(options.logit_bias, int)
        self._biases = np.fromiter(options.logit_bias.values(), np.float32)
        last = options.repeat_last_n
        self._recent = deque(dict.fromkeys(prompt)) if last < 0 else deque(prompt, min(last, sys.maxsize))
        self._counts: dict[int, int] = {}
        seed = None if options.seed is None else [options.seed % 2**64, choice]
        self._random = default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        """The next token.

        Args:
            logits: (vocabulary,) float32; -inf marks a token that must not come. Not changed.

        Raises:
            ArithmeticError: the model gave a logit that is not a number.
        """
        options = self._options
        logits = self._penalise(self._bias(logits))
        token = int(np.argmax(logits))  # the first NaN, where there is one
        if np.isnan(logits[token]):
            raise ArithmeticError("the model gave a logit that is not a number")
        if options.temperature:
            token = self._draw(logits)
        self._recent.append(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _bias(self, logits: np.ndarray) -> np.ndarray:
        if self._options.logit_bias:
            logits = logits.copy()
            logits[self._biased] += self._biases
        return logits

    def _penalise(self, logits: np.ndarray) -> np.ndarray:
        options = self._options
        if options.repetition_penalty != 1 and self._recent:
            # Keskar et al. 2019, CTRL (arXiv:1909.05858), as in transformers: both signs move away from the token.
            logits = logits.copy()
            recent = np.fromiter(self._recent, int)  # a token may be in it twice: it is penalised once
            scores = logits[recent]
            penalty = options.repetition_penalty
            logits[recent] = np.where(scores < 0, scores * penalty, scores / penalty)
        if self._counts and (options.frequency_penalty or options.presence_penalty):
            # OpenAI's definition: over the tokens sampled so far, the prompt not counted.
            logits = logits.copy()
            tokens = np.fromiter(self._counts, int)
            counts = np.fromiter(self._counts.values(), np.float32)
            logits[tokens] -= counts * options.frequency_penalty + options.presence_penalty
        return logits

    def _draw(self, logits: np.ndarray) -> int:
        options = self._options
        # The largest is subtracted first: next to the smallest temperatures everything else becomes -inf.
        with np.errstate(over="ignore"):
            weights = np.exp((logits.astype(np.float64) - logits.max()) / options.temperature)
        candidates = _most_likely(weights, options.top_k, options.top_p)
        weights = weights[candidates]
        weights[weights < options.min_p * weights.max()] = 0
        cumulative = np.cumsum(weights)
        return int(candidates[np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")])


def _most_likely(weights: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Ids of the candidates that top_k and then top_p leave; of equally likely ones the lowest.

    top_p is nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751): the fewest tokens that together hold at least
    that share of what top_k left.
    """
    count = min(top_k, len(weights)) if top_k else len(weights)
    if count == len(weights) and top_p >= 1:
        return np.arange(count)
    largest = np.sort(weights)[::-1][:count]
    if top_p < 1:
        cumulative = np.cumsum(largest)
        count = int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1
    least = largest[count - 1]
    candidates = np.flatnonzero(weights >= least)
    surplus = len(candidates) - count
    if surplus:
        tied = np.flatnonzero(weights[candidates] == least)
        candidates = np.delete(candidates, tied[-surplus:])
    return candidates
