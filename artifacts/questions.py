"""The held-out questions, and the check that none of them occurs in the training text.

It knows nothing of models; score.py asks the questions.
"""

import random
from collections.abc import Iterator

from answers import COUNT_KINDS, FACT_KINDS, NUMBER_KINDS, ORDER_KINDS, SELF_KINDS, UNKNOWN
from phrases import HELPERS, SYSTEM_JSON, SYSTEM_ONE_WORD
from text import Message, Speaker

QUOTAS: dict[str, int] = {
    "capital": 56, "country": 22, "continent": 14, "opposite": 32, "colour": 16, "sound": 16, "order": 20,
    "sum": 40, "difference": 26, "counting": 20, "list": 6, "persona": 32, "memory": 14, "follow-up": 44,
    "json": 24, "one word": 16, "self": 8, "unknown": 14,
}  # fmt: skip
_KINDS_OF = {
    "colour": ["colour", "animal colour"],
    "sound": ["sound", "animal"],
    "order": ORDER_KINDS,
    "counting": COUNT_KINDS,
    "persona": SELF_KINDS,
    "self": [*SELF_KINDS, "ability"],
    "json": [*FACT_KINDS, *NUMBER_KINDS],
    "one word": [*FACT_KINDS, *ORDER_KINDS, *NUMBER_KINDS],
}


def draw(seed: int, trained: set[tuple[str, ...]]) -> list[dict[str, object]]:
    """The held-out set: QUOTAS of each category, none of whose keys is in `trained`.

    Returns:
        One dictionary for each question: category, messages (a chat that ends in a user turn) and answer.
    """
    rng = random.Random(seed)
    found: list[dict[str, object]] = []
    seen = set(trained)
    for category, quota in QUOTAS.items():
        taken = 0
        while taken < quota:
            question = _question(rng, category)
            if question is None or question_key(question) in seen:
                continue
            seen.add(question_key(question))
            found.append(question)
            taken += 1
    return found


def _question(rng: random.Random, category: str) -> dict[str, object] | None:
    speaker = Speaker(rng, asked=True)
    messages: list[Message] = []
    if category == "persona":
        messages.append({"role": "system", "content": speaker.play()})
    elif category in ("json", "one word"):
        speaker.mode = category
        messages.append(
            {"role": "system", "content": rng.choice(SYSTEM_JSON if category == "json" else SYSTEM_ONE_WORD)}
        )
    elif category != "self" and rng.random() < 0.35:
        messages.append({"role": "system", "content": rng.choice(HELPERS)})
    kinds = _KINDS_OF.get(category, [category])
    if category in ("follow-up", "memory"):
        speaker.asked = False
        if category == "memory":
            before = [speaker.fresh("introduction")]
            before += [speaker.fresh(rng.choice(FACT_KINDS)) for _ in range(rng.randint(0, 3))]
        else:
            before = [speaker.fresh(rng.choice([*FACT_KINDS, *ORDER_KINDS, *NUMBER_KINDS]))]
        for question, answer, _ in before:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if any(answer == UNKNOWN for _, answer, _ in before):
            return None
        speaker.asked = True
        turn = speaker.fresh("my name") if category == "memory" else speaker.follow_up()
    else:
        turn = speaker.fresh(rng.choice(kinds))
    if turn is None:
        return None
    question, answer, _ = turn
    return {"category": category, "messages": [*messages, {"role": "user", "content": question}], "answer": answer}


def plain(question: str) -> str:
    """The question without capital letters, and without signs and white space around it."""
    return question.casefold().strip(" \n.?!=")


def keys(messages: list[Message]) -> Iterator[tuple[str, ...]]:
    """What may not be shared between the training text and the questions, for every user turn of a chat.

    A question alone; a question with the system message; a question with the one before it.
    """
    system = next((message["content"] for message in messages if message["role"] == "system"), "")
    asked = [plain(message["content"]) for message in messages if message["role"] == "user"]
    for before, question in zip(["", *asked], asked, strict=False):
        yield ("alone", question)
        yield ("system", system, question)
        yield ("before", before, question)


def question_key(question: dict[str, object]) -> tuple[str, ...]:
    """The key of `keys` that must not occur in the training text for this question of questions.jsonl.

    A persona question is new by its system message, one in a chat by the turn before it, any other by itself.
    """
    messages: list[Message] = question["messages"]  # type: ignore[assignment]
    alone, system, before = list(keys(messages))[-3:]
    if question["category"] == "persona":
        return system
    return before if sum(message["role"] == "user" for message in messages) > 1 else alone
