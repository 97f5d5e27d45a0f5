"""Logits -> one token, by a request's options. Knows nothing of models, text or stopping."""

from collections.abc import Sequence

import numpy as np

from .options import Options

# How many candidates top_p looks at first. It takes four times as many while they do not hold enough probability.
_FIRST_CANDIDATES = 64


class Sampler:
    """Chooses the tokens of one answer.

    In order: logit_bias, repetition, frequency and presence penalty, then the largest where the temperature is 0;
    else temperature, top_k, top_p, min_p and a draw. This is the order of vLLM and of transformers.

    Args:
        options: the request's options.
        prompt: the prompt's ids; the repetition penalty looks at them too.
        choice: which of the request's n choices this is. With a seed, each choice draws from a stream of its own.
    """

    def __init__(self, options: Options, prompt: Sequence[int], choice: int = 0):
        self._options = options
        self._prompt = list(prompt) if options.repetition_penalty != 1 and options.repeat_last_n else []
        self._answer: list[int] = []
        self._counts: dict[int, int] = {}
        seed = None if options.seed is None else [options.seed % 2**64, choice]
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        """The next token.

        Args:
            logits: (vocabulary,) float32; -inf marks a token that must not come. Not changed.
        """
        options = self._options
        logits = self._penalise(self._bias(logits))
        token = int(np.argmax(logits)) if options.temperature == 0 else self._draw(logits)
        self._answer.append(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _bias(self, logits: np.ndarray) -> np.ndarray:
        if self._options.logit_bias:
            logits = logits.copy()
            for token, bias in self._options.logit_bias.items():
                logits[token] += bias
        return logits

    def _penalise(self, logits: np.ndarray) -> np.ndarray:
        options = self._options
        if options.repetition_penalty != 1 and (recent := self._recent()):
            # Keskar et al. 2019, CTRL (arXiv:1909.05858), as in transformers: both signs move away from the token.
            logits = logits.copy()
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

    def _recent(self) -> list[int]:
        last = self._options.repeat_last_n
        sequence = self._prompt + self._answer
        return sorted(set(sequence if last < 0 else sequence[len(sequence) - min(last, len(sequence)) :]))

    def _draw(self, logits: np.ndarray) -> int:
        options = self._options
        # The largest is subtracted first: next to the smallest temperatures everything else becomes -inf.
        with np.errstate(over="ignore"):
            weights = np.exp((logits.astype(np.float64) - logits.max()) / options.temperature)
        candidates = _most_likely(weights, options.top_k, options.top_p)
        weights = weights[candidates]
        weights = np.where(weights >= options.min_p * weights.max(), weights, 0)
        cumulative = np.cumsum(weights)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(candidates[min(drawn, len(candidates) - 1)])


def _most_likely(weights: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Ids of the candidates that top_k and then top_p leave, the most likely first where either of them is set.

    top_p is nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751): the fewest tokens that together hold at least
    that share of what top_k left.
    """
    size = len(weights)
    limit = min(top_k, size) if top_k else size
    if limit == size and top_p >= 1:
        return np.arange(size)
    total = weights.sum() if limit == size else None
    taken = limit if total is None else min(_FIRST_CANDIDATES, limit)
    while True:
        largest = np.argpartition(weights, size - taken)[size - taken :] if taken < size else np.arange(size)
        largest.sort()
        ranked = largest[np.argsort(-weights[largest], kind="stable")]
        cumulative = np.cumsum(weights[ranked])
        enough = top_p * (cumulative[-1] if total is None else total)
        if taken == limit or cumulative[-1] >= enough:
            return ranked[: int(np.searchsorted(cumulative, enough)) + 1] if top_p < 1 else ranked
        taken = min(taken * 4, limit)
