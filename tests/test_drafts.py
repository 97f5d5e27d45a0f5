"""Run with: python -m pytest tests/test_drafts.py"""

import random

import pytest

from phi3_mlflow.runtime.drafts import Drafts, worth

FREE = 1e-6  # what a token costs that may as well be proposed


def follow(prompt, answer, most=8, cost=0.1):
    """(steps, proposed, accepted) of an answer to a prompt whose first token came with the prompt."""
    drafts, steps, proposed, accepted = Drafts(prompt), 0, 0, 0
    drafts.append(answer[0])
    rest = answer[1:]
    while rest:
        tokens = drafts.propose(most, cost)
        steps, proposed = steps + 1, proposed + len(tokens)
        right = next((place for place, pair in enumerate(zip(tokens, rest, strict=False)) if len(set(pair)) > 1), None)
        right = min(len(tokens), len(rest)) if right is None else right
        accepted += right
        came, rest = rest[: right + 1], rest[right + 1 :]
        for token in came:
            drafts.append(token)
    return steps, proposed, accepted


def test_what_followed_the_same_three_tokens_last_is_proposed():
    drafts = Drafts([1, 2, 3, 4, 9, 9, 1, 2, 3, 5, 6, 7, 8, 1, 2])
    assert drafts.propose(3, FREE) == []
    drafts.append(3)
    assert drafts.propose(3, FREE) == [5, 6, 7]
    assert drafts.propose(1, FREE) == [5]
    assert drafts.propose(0, FREE) == []


def test_a_text_that_goes_round_in_circles_is_proposed_to_go_on():
    assert Drafts([1, 2, 3, 1, 2, 3]).propose(7, FREE) == [1, 2, 3, 1, 2, 3, 1]
    assert Drafts([7, 7, 7, 7]).propose(3, FREE) == [7, 7, 7]


@pytest.mark.parametrize("prompt", [[], [1], [1, 2, 3], [1, 2, 3, 4]])
def test_nothing_is_proposed_where_nothing_came_twice(prompt):
    drafts = Drafts(prompt)
    for token in (11, 12, 13, 14, 15):
        assert drafts.propose(5, FREE) == []
        drafts.append(token)


def test_after_a_changed_token_the_rest_is_found_again():
    prompt = list(range(100))
    answer = [*range(40), 500, *range(41, 100)]
    steps, _, accepted = follow(prompt, answer, most=99, cost=FREE)
    # Three tokens at the beginning, the rest up to the change, three behind it, and all that is left.
    assert steps <= 9
    assert accepted >= 90


def test_it_takes_no_proposals_to_find_out_that_they_have_become_worth_it():
    drafts = Drafts([1, 2, 3, 4] * 20)
    drafts.trust = 0.0
    for token in [1, 2, 3, 4] * 3:
        assert drafts.propose(5, 0.9) == []
        drafts.append(token)
    assert drafts.trust > 0.7


def test_texts_that_do_not_repeat_themselves_cost_next_to_nothing():
    rng = random.Random(0)
    # Three tokens of few come again and again, and say nothing of the fourth.
    prompt, answer = (rng.choices(range(6), k=400) for _ in range(2))
    steps, proposed, accepted = follow(prompt, answer, cost=0.3)
    assert proposed > 0
    assert steps + 0.3 * proposed <= 1.03 * (len(answer) - 1)
    assert follow(prompt, answer, cost=0.3) == (steps, proposed, accepted)


def test_as_many_tokens_are_proposed_as_give_the_most_for_the_time():
    def rate(count, trust, cost):
        return sum(trust**place for place in range(count + 1)) / (1 + count * cost)

    for trust in (0.0, 0.1, 0.3, 0.5, 0.8, 0.95, 1.0):
        for cost in (0.01, 0.1, 0.16, 0.3, 1.0):
            best = max(range(16), key=lambda count: (rate(count, trust, cost), -count))
            assert rate(worth(trust, cost, 15), trust, cost) == pytest.approx(rate(best, trust, cost))
    assert worth(0.29, 0.3, 15) == 0
    assert worth(1.0, 0.3, 15) == 15
    assert worth(1.0, 0.3, 0) == worth(1.0, 0.3, -1) == 0
