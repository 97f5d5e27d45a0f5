"""Run with: python -m pytest tests/test_sampling.py"""

import math
from collections import Counter

import numpy as np
import pytest

from phi3_mlflow.runtime.options import Options
from phi3_mlflow.runtime.sampling import Sampler, logprob

RNG = np.random.default_rng(7)
LOGITS = RNG.normal(0, 2, 300).astype(np.float32)


def reference(logits, options, prompt=(), answer=()):
    """The probability of each token, straight from the definitions, one token at a time."""
    scores = [float(x) for x in logits]
    for token, bias in options.logit_bias.items():
        scores[token] += bias
    sequence = [*prompt, *answer]
    last = options.repeat_last_n
    recent = sequence if last == -1 else sequence[max(0, len(sequence) - last) :]
    for token in set(recent):
        negative = scores[token] < 0
        scores[token] = scores[token] * options.repetition_penalty if negative else (
            scores[token] / options.repetition_penalty
        )  # fmt: skip
    for token, count in Counter(answer).items():
        scores[token] -= options.frequency_penalty * count + options.presence_penalty
    ranked = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if options.temperature == 0:
        return {ranked[0]: 1.0}
    weights = {token: math.exp((scores[token] - scores[ranked[0]]) / options.temperature) for token in ranked}
    if options.top_k:
        ranked = ranked[: options.top_k]
    total, held, nucleus = sum(weights[token] for token in ranked), 0.0, []
    for token in ranked:
        if held >= options.top_p * total:
            break
        nucleus.append(token)
        held += weights[token]
    kept = {token: weights[token] for token in nucleus if weights[token] >= options.min_p * weights[ranked[0]]}
    total = sum(kept.values())
    return {token: weight / total for token, weight in kept.items() if weight > 0}


class Dial:
    """Stands in for the random generator: draws the shares that a test asks for."""

    def __init__(self, share):
        self.share = share

    def random(self):
        return self.share


STEPS = 250


def only(token, size):
    """Logits that force a token."""
    forced = np.full(size, -np.inf, np.float32)
    forced[token] = 0
    return forced


def ranges(logits, options, prompt=(), answer=(), steps=STEPS):
    """The share of the unit interval by which the sampler draws each token, measured in equal steps."""
    drawn = Counter()
    for step in range(steps):
        sampler = Sampler(options, prompt)
        sampler._random = Dial((step + 0.5) / steps)
        for token in answer:
            assert sampler(only(token, len(logits))) == token
        drawn[sampler(logits)] += 1 / steps
    return drawn


CASES = {
    "temperature alone": {"temperature": 1.0},
    "a low temperature": {"temperature": 0.3},
    "a high temperature": {"temperature": 2.0},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_k of one": {"temperature": 1.0, "top_k": 1},
    "top_k beyond the vocabulary": {"temperature": 1.0, "top_k": 10**9},
    "top_p": {"temperature": 1.0, "top_p": 0.5},
    "a tiny top_p": {"temperature": 1.0, "top_p": 1e-12},
    "top_p of a flat distribution": {"temperature": 2.0, "top_p": 0.97},
    "top_p of nearly all": {"temperature": 2.0, "top_p": 0.9999999},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "min_p of one": {"temperature": 1.0, "min_p": 1.0},
    "top_k before top_p": {"temperature": 1.5, "top_k": 10, "top_p": 0.6},
    "top_p before min_p": {"temperature": 1.5, "top_p": 0.8, "min_p": 0.3},
    "all filters": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "logit_bias": {"temperature": 1.0, "top_k": 8, "logit_bias": {3: 9.0, 4: -100.0}},
    "repetition_penalty": {"temperature": 1.0, "top_k": 8, "repetition_penalty": 1.5},
    "repetition_penalty below one": {"temperature": 1.0, "top_k": 8, "repetition_penalty": 0.6},
    "repetition_penalty of all": {"temperature": 1.0, "top_k": 8, "repetition_penalty": 1.5, "repeat_last_n": -1},
    "repetition_penalty of the last": {"temperature": 1.0, "top_k": 8, "repetition_penalty": 1.5, "repeat_last_n": 3},
    "repetition_penalty of none": {"temperature": 1.0, "top_k": 8, "repetition_penalty": 1.5, "repeat_last_n": 0},
    "frequency_penalty": {"temperature": 1.0, "top_k": 8, "frequency_penalty": 1.1},
    "presence_penalty": {"temperature": 1.0, "top_k": 8, "presence_penalty": -1.1},
    "everything": {
        "temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "logit_bias": {3: 3.5}, "repeat_last_n": 5,
        "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3,
    },
}  # fmt: skip
BEST = [int(token) for token in np.argsort(-LOGITS)[:6]]


@pytest.mark.parametrize("case", CASES)
def test_each_filter_gives_the_distribution_of_its_definition(case):
    options = Options(**CASES[case])
    prompt, answer = [BEST[3], BEST[4], BEST[5], 17], [BEST[0], BEST[1], BEST[0]]
    expected = reference(LOGITS, options, prompt, answer)
    drawn = ranges(LOGITS, options, prompt, answer)
    assert set(drawn) <= set(expected)
    for token in set(expected) | set(drawn):
        assert drawn[token] == pytest.approx(expected.get(token, 0), abs=1.01 / STEPS)


@pytest.mark.parametrize("seed", range(60))
def test_random_combinations_draw_only_what_the_definitions_leave(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, rng.choice([0.1, 1, 5]), 400).astype(np.float32)
    options = Options(
        temperature=float(rng.choice([0, 0.2, 1, 2])),
        top_k=int(rng.choice([0, 1, 3, 50, 400])),
        top_p=float(rng.choice([0.01, 0.3, 0.9, 1])),
        min_p=float(rng.choice([0, 0.05, 0.9])),
        repetition_penalty=float(rng.choice([1, 1.2])),
        repeat_last_n=int(rng.choice([-1, 2, 64])),
        frequency_penalty=float(rng.choice([0, -0.5, 0.5])),
        presence_penalty=float(rng.choice([0, 1])),
        logit_bias={int(token): float(bias) for token, bias in zip(rng.integers(0, 400, 5), range(-2, 3), strict=True)},
        seed=seed,
    )
    prompt = [int(token) for token in rng.integers(0, 400, 20)]
    sampler, answer = Sampler(options, prompt), []
    for _ in range(20):
        expected = reference(logits, options, prompt, answer)
        answer.append(sampler(logits))
        # A token whose share is within rounding of a filter's edge may be on either side of it.
        assert answer[-1] in expected or min(abs(logits[answer[-1]] - logits[token]) for token in expected) < 1e-5


def test_top_p_and_top_k_are_exact_where_all_tokens_are_equally_likely():
    flat = np.zeros(1000, np.float32)
    for top_p, top_k, count in [(0.05, 0, 50), (0.0649, 0, 65), (0.2, 0, 200), (0.5, 100, 50), (1.0, 7, 7)]:
        options = Options(temperature=1.0, top_p=top_p, top_k=top_k)
        # The lowest ids of equally likely tokens are the ones that stay.
        assert set(ranges(flat, options, steps=1000)) == set(range(count))


def test_a_sampler_with_a_seed_repeats_and_other_seeds_and_choices_differ():
    def draw(seed, choice=0):
        sampler = Sampler(Options(temperature=1.0, seed=seed), [], choice)
        return tuple(sampler(LOGITS) for _ in range(40))

    streams = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (-1, 0), (2**63 - 1, 0), (-(2**63), 0), (None, 0), (None, 0)]
    assert len({draw(*stream) for stream in streams}) == len(streams)
    assert all(draw(*stream) == draw(*stream) for stream in streams if stream[0] is not None)


def test_draws_follow_the_distribution():
    options = Options(temperature=0.9, top_k=12, seed=5)
    expected = reference(LOGITS, options)
    sampler = Sampler(options, [])
    draws = 20_000
    drawn = Counter(sampler(LOGITS) for _ in range(draws))
    statistic = sum((drawn[t] - draws * p) ** 2 / (draws * p) for t, p in expected.items())
    assert set(drawn) == set(expected)
    assert statistic < 31.3  # chi-square with 11 degrees of freedom: 0.1 % are above it


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 5e-324},
        {"temperature": 2.0, "top_k": 50},
        {"temperature": 2.0, "top_p": 0.999999},
        {"temperature": 2.0, "top_k": 50, "top_p": 0.999, "min_p": 1e-9},
        {"temperature": 2.0, "logit_bias": {0: 100.0}, "repetition_penalty": 0.1, "presence_penalty": -2.0},
    ],
)
def test_what_a_mask_forbids_is_never_drawn(options):
    masked = np.full(300, -np.inf, np.float32)
    masked[[7, 8, 200]] = [1.0, 1.5, -3.0]
    for share in (0.0, 1e-12, 0.5, 1 - 2**-53):
        sampler = Sampler(Options(**options), [0, 1, 2])
        sampler._random = Dial(share)
        assert {sampler(masked) for _ in range(5)} <= {7, 8, 200}


def test_a_mask_that_leaves_one_token_draws_it():
    masked = np.full(300, -np.inf, np.float32)
    masked[9] = -50.0
    assert Sampler(Options(temperature=2.0, top_p=0.5), [])(masked) == 9


def test_greedy_takes_the_largest_whatever_the_filters_say():
    best = int(LOGITS.argmax())
    greedy = Sampler(Options(top_p=0.01, top_k=3, min_p=0.9, seed=1), [])
    assert [greedy(LOGITS) for _ in range(3)] == [best] * 3
    ties = np.zeros(10, np.float32)
    assert Sampler(Options(), [])(ties) == 0


def test_the_smallest_temperatures_are_greedy():
    best = int(LOGITS.argmax())
    for temperature in (5e-324, 1e-300, 1e-6):
        assert Sampler(Options(temperature=temperature, seed=3), [])(LOGITS * 1000) == best


def test_penalties_follow_their_formulas():
    logits = np.array([2.0, -2.0, 1.0, 0.0], np.float32)
    sampler = Sampler(Options(repetition_penalty=2.0, repeat_last_n=-1), [0, 1])
    assert sampler._penalise(logits).tolist() == [1.0, -4.0, 1.0, 0.0]
    sampler = Sampler(Options(frequency_penalty=0.5, presence_penalty=0.25), [0, 1])
    assert sampler._penalise(logits).tolist() == logits.tolist()  # the prompt does not count
    for expected in (0, 0, 0):
        assert sampler(logits + np.array([9, 0, 0, 0], np.float32)) == expected
    assert sampler._penalise(logits).tolist() == [2.0 - 3 * 0.5 - 0.25, -2.0, 1.0, 0.0]


def test_a_greedy_answer_with_a_penalty_does_not_repeat_itself():
    sampler = Sampler(Options(presence_penalty=2.0), [])
    flat = np.linspace(1, 0.9, 10, dtype=np.float32)
    assert [sampler(flat) for _ in range(10)] == list(range(10))


@pytest.mark.parametrize("options", [CASES["everything"], {"temperature": 0.0}, {"temperature": 1.0}])
def test_the_logits_are_left_as_they_are(options):
    logits = LOGITS.copy()
    logits.flags.writeable = False
    sampler = Sampler(Options(**options), [1, 2])
    for _ in range(3):
        sampler(logits)
    assert (logits == LOGITS).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error_and_not_an_answer(temperature):
    broken = LOGITS.copy()
    broken[5] = np.nan
    with pytest.raises(ArithmeticError, match="not a number"):
        Sampler(Options(temperature=temperature), [])(broken)


def test_the_log_probability_is_the_models_own_whatever_the_options_do_to_the_logits():
    weights = [math.exp(float(logit)) for logit in LOGITS]
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])
    for token in (0, 17, ranked[0], ranked[-1]):
        told = logprob(LOGITS, token, 5)
        assert (told.token, told.logprob) == (token, pytest.approx(math.log(weights[token] / sum(weights))))
        assert [likely for likely, _ in told.top] == ranked[:5]
        assert [value for _, value in told.top] == pytest.approx(
            [math.log(weights[i] / sum(weights)) for i in ranked[:5]]
        )
    assert logprob(LOGITS, 3, 0).top == ()


def test_of_equally_likely_tokens_the_lowest_ids_are_named():
    told = logprob(np.zeros(9, np.float32), 8, 3)
    assert told.top == tuple((token, pytest.approx(-math.log(9))) for token in (0, 1, 2))
    assert logprob(np.array([1000, -1000], np.float32), 1, 2).top == ((0, 0.0), (1, -2000.0))


def test_a_logit_that_is_not_a_number_has_no_log_probability():
    with pytest.raises(ArithmeticError, match="not a number"):
        logprob(np.array([1, np.nan, 2], np.float32), 0, 0)
