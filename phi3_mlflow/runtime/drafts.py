"""Prompt lookup: the tokens that are likely to follow are those that followed the same tokens before. Pure.

After Saxena 2023 (https://github.com/apoorvumang/prompt-lookup-decoding). Knows token ids; no model and no text.
"""

from collections.abc import Sequence

# So many of the last tokens are looked up.
_LOOKED_UP = 3
# How often a token that was found comes, before any has been seen to come or not, and what each one changes of that.
_TRUST, _WEIGHT = 0.5, 0.125


class Drafts:
    """The tokens of a prompt and of its answer, and what they say of those that come next.

    What was found is compared with what came, whether it was proposed or not: so it costs nothing to find out when
    proposals begin to pay, and which are made depends on nothing but the tokens.

    Args:
        prompt: the prompt's ids.

    Attributes:
        trust: how often a token that was found came, lately; from 0 to 1.
    """

    def __init__(self, prompt: Sequence[int]):
        self.trust = _TRUST
        self._tokens = list(prompt)
        self._followed: dict[tuple[int, ...], int] = {}  # some tokens -> the place behind the last time that they came
        self._indexed = _LOOKED_UP  # the first place that is not in it
        self._place: int | None = None  # of the token that should come next

    def append(self, token: int) -> None:
        """Takes the token that came."""
        if self._place is not None:
            right = self._tokens[self._place] == token
            self.trust += (right - self.trust) * _WEIGHT
            self._place = self._place + 1 if right else None
        self._tokens.append(token)

    def propose(self, most: int, cost: float) -> list[int]:
        """The tokens that should come next, as many as pay.

        Args:
            most: how many at most.
            cost: see `worth`.
        """
        if self._place is None:
            self._place = self._find()
        if self._place is None:
            return []
        # Where the end is reached, what would be appended goes on: a text that goes round in circles.
        proposed: list[int] = []
        for place in range(self._place, self._place + worth(self.trust, cost, most)):
            ahead = place - len(self._tokens)
            proposed.append(self._tokens[place] if ahead < 0 else proposed[ahead])
        return proposed

    def _find(self) -> int | None:
        tokens = self._tokens
        for place in range(self._indexed, len(tokens)):
            self._followed[tuple(tokens[place - _LOOKED_UP : place])] = place
        self._indexed = max(self._indexed, len(tokens))
        return self._followed.get(tuple(tokens[-_LOOKED_UP:]))


def worth(trust: float, cost: float, most: int) -> int:
    """How many tokens to propose: as many as give the most tokens for the time.

    With n proposals a step gives 1 + trust + ... + trust**n tokens and takes 1 + n * cost times as long (Leviathan et
    al. 2023, arXiv:2211.17192, section 3.3).

    Args:
        trust: the probability that a proposed token comes if the one before it did.
        cost: what one token more takes in a step, as a share of a step of one token.
        most: how many at most.
    """
    count, given = 0, 1.0
    while count < most and trust ** (count + 1) * (1 + count * cost) > cost * given:
        count += 1
        given += trust**count
    return count
