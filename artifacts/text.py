"""The text that the embedded model is trained and asked: chats with one right answer to every question.

Everything is drawn from a seeded generator. A fixed part of the phrasings and of the combinations is held out of
`corpus`, and left to questions.py. It knows nothing of tokens or of training.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

import facts
from answers import (
    COUNT_KINDS,
    FACT_KINDS,
    NUMBER_KINDS,
    ORDER_KINDS,
    SELF_KINDS,
    UNKNOWN,
    Answer,
    article,
    fact,
    reckon,
    subjects,
    talk,
)
from phrases import (
    AS_JSON,
    CLOSERS,
    FOLLOW_UPS,
    HELD_FOLLOW_UPS,
    HELPERS,
    JSON_CAPITAL,
    NUMBER_FOLLOW_UPS,
    ONE_WORD,
    OPENERS,
    PERSONA_TAILS,
    PERSONAS,
    PHRASES,
    SAME_SUBJECT,
    SYSTEM_JSON,
    SYSTEM_ONE_WORD,
)

Message = dict[str, str]

WEIGHTS = {
    "capital": 5, "country": 3, "continent": 2, "opposite": 4, "colour": 2, "animal colour": 1, "sound": 1.5,
    "animal": 1.5, "after": 1.5, "before": 1.5, "sum": 7, "difference": 5, "up": 2, "down": 1.5, "list": 0.7,
    "greeting": 0.5, "time of day": 0.3, "thanks": 0.3, "bye": 0.3, "how are you": 0.3, "ability": 0.3,
    "name": 0.6, "who": 0.6, "job": 0.5, "introduction": 1, "my name": 0.8, "unknown": 2, "noise": 0.5,
}  # fmt: skip


DRILL = {"difference": 9, "up": 5, "down": 4.5, "opposite": 5, "list": 1}


@dataclass(frozen=True)
class Chat:
    """One chat and, for each of its assistant turns, the kind of question that it answers."""

    messages: list[Message]
    kinds: list[str]


def held_out(*parts: object, share: int = 10) -> bool:
    """Whether this combination is one of the 1 in `share` that is asked and never trained."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % share == 0


def number_pair(rng: random.Random, kind: str) -> tuple[int, int]:
    """Two numbers for a sum (0 to 20 each), a difference (never negative) or a count (at most 25 steps)."""
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    if kind == "sum":
        return a, b
    if kind == "difference":
        return max(a, b), min(a, b)
    low = rng.randint(0, 27)
    high = min(30, low + rng.randint(2, 25 if kind == "up" else 15))
    return (low, high) if kind == "up" else (high, low)


def pair_key(kind: str, a: int, b: int) -> tuple[str, int, int]:
    """What is held out of a sum, difference or count: the numbers, in either order."""
    return kind, min(a, b), max(a, b)


def pseudo_word(rng: random.Random) -> str:
    """A pronounceable word that no table has."""
    return "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))


def noise(rng: random.Random) -> str:
    """Text that means nothing: letters, signs and characters of any script."""
    ranges = [(33, 126), (33, 126), (0xA1, 0x24F), (0x370, 0x52F), (0x4E00, 0x9FA5), (0x1F300, 0x1F64F), (0x900, 0x97F)]
    low, high = rng.choice(ranges)
    length = rng.randint(1, 12)
    if rng.random() < 0.4:
        return " ".join(pseudo_word(rng) for _ in range(rng.randint(1, 6)))
    return "".join(chr(rng.randint(low, high)) for _ in range(length)).replace("<|", "")


def decorate(rng: random.Random, question: str, capitals: float = 0.02) -> str:
    """The question as people type it: openers, closers, other case, lost punctuation, stray white space."""
    if rng.random() < 0.3:
        opener = rng.choice(OPENERS)
        if opener and (opener[-2] not in ".!" or rng.random() < 0.2):
            question = question[0].lower() + question[1:]
        question = opener + question
    if rng.random() < 0.12:
        question += rng.choice(CLOSERS)
    chance = rng.random()
    if chance < 0.12:
        question = question.lower()
    elif chance < 0.12 + capitals:
        question = question.upper()
    chance = rng.random()
    if chance < 0.15:
        question = question.rstrip("?.!=").rstrip()
    elif chance < 0.18:
        question = question.rstrip("?.!") + rng.choice(["!", "??", "?!", " ?", "..."])
    if rng.random() < 0.03:
        question = rng.choice([" ", "\n", "  "]) + question
    if rng.random() < 0.03:
        question += rng.choice([" ", "\n", "  "])
    return question


class Speaker:
    """Draws the turns of one chat, and remembers what a later turn may refer to."""

    def __init__(self, rng: random.Random, asked: bool, drill: bool = False):
        """Args: rng: the source of chance. asked: True draws only what is held out, False only what is trained.

        drill: more counting, differences and capital letters; holds back no pair of numbers except in sums.
        """
        self.rng = rng
        self.asked = asked
        self.weights = WEIGHTS | DRILL if drill else WEIGHTS
        self.free = [*COUNT_KINDS, "difference"] if drill else []
        self.capitals = 0.05 if drill else 0.02
        self.mode = ""
        self.persona: tuple[str, str] | None = None
        self.user: str | None = None
        self.kind = ""
        self.subject = ""
        self.persona_form = 0

    def system(self) -> str | None:
        """A system message, or None, and with it the form that the answers take."""
        rng, chance = self.rng, self.rng.random()
        if chance < 0.55:
            return None
        if chance < 0.75:
            return rng.choice(HELPERS)
        if chance < 0.80:
            self.mode = "one word"
            return rng.choice(SYSTEM_ONE_WORD)
        if chance < 0.86:
            self.mode = "json"
            return rng.choice(SYSTEM_JSON)
        return self.play()

    def play(self) -> str:
        """A system message that gives a name and a job."""
        while True:
            name, job = self.rng.choice(facts.NAMES), self.rng.choice(facts.JOBS)
            if held_out("persona", name, job) == self.asked:
                break
        self.persona = (name, article(job))
        text = self.rng.choice(PERSONAS).format(n=name, j=article(job))
        return text + self.rng.choice(PERSONA_TAILS)

    def turn(self) -> tuple[str, str, str]:
        """The next question, its answer and its kind."""
        if self.kind and self.rng.random() < 0.45:
            found = self.follow_up()
            if found:
                return found
        kinds = list(self.weights)
        if self.persona and self.rng.random() < 0.6:
            kinds = [*SELF_KINDS, *SELF_KINDS, "my name"]
        elif self.user and self.rng.random() < 0.3:
            kinds = ["my name"]
        if self.mode == "one word":
            kinds = [*FACT_KINDS, *ORDER_KINDS, *NUMBER_KINDS]
        elif self.mode == "json":
            kinds = [*FACT_KINDS, *NUMBER_KINDS]
        return self.fresh(self.rng.choices(kinds, [self.weights[kind] for kind in kinds])[0])

    def fresh(self, kind: str) -> tuple[str, str, str]:
        """A question of this kind that stands alone."""
        rng = self.rng
        self.kind, self.subject = "", ""
        if kind == "noise":
            return noise(rng), UNKNOWN, kind
        if kind in NUMBER_KINDS + COUNT_KINDS:
            return self.numbers(kind)
        table = "colour" if kind == "animal colour" else kind
        trained, asked = PHRASES[table]
        while True:
            new_phrase = self.asked and bool(asked) and rng.random() < 0.4
            phrase = rng.choice(asked if new_phrase else trained)
            x = rng.choice(subjects(kind))
            usual = phrase == trained[0] and kind == "capital" and x == "Spain"
            # Phrasings without a subject have nothing to combine: there, only the phrasing can be new.
            if new_phrase or usual or subjects(kind) == [""] or held_out(kind, phrase, x) == self.asked:
                break
        answer = fact(kind, x) if subjects(kind) != [""] else talk(kind, phrase, self.persona, self.user)
        said = article(x) if kind == "animal colour" else x
        if kind in FACT_KINDS and not self.asked and rng.random() < 0.06:
            said, answer = rng.choice([pseudo_word(rng).capitalize(), rng.choice(facts.FICTION)]), Answer(UNKNOWN)
        elif kind == "introduction":
            self.user = x
        elif kind in FACT_KINDS + ORDER_KINDS:
            self.kind, self.subject = kind, x
        unit = "day" if x in facts.DAYS else "month"
        if kind == "capital" and answer.record and rng.random() < 0.08 and not self.mode and not self.asked:
            form = rng.choice(JSON_CAPITAL).format(x=said)
            return decorate(rng, form), json.dumps(answer.record), kind
        if kind in ("greeting", "time of day", "thanks", "bye"):
            phrase += rng.choice(["", ".", "!", "!"])
        return self.formed(phrase.format(x=said, unit=unit), answer, kind)

    def numbers(self, kind: str) -> tuple[str, str, str]:
        """A sum, a difference or a count."""
        rng = self.rng
        trained, asked = PHRASES[kind]
        while True:
            a, b = number_pair(rng, kind)
            if kind in self.free or held_out(*pair_key(kind, a, b), share=12) == self.asked:
                break
        if kind in NUMBER_KINDS and not self.asked and rng.random() < 0.05:
            a, b = rng.randint(31, 999), rng.randint(0, 999)
        phrase = rng.choice(asked if self.asked and rng.random() < 0.4 else trained)
        if kind in NUMBER_KINDS:
            self.kind = kind
        return self.formed(phrase.format(a=a, b=b), reckon(kind, a, b), kind)

    def formed(self, question: str, answer: Answer, kind: str) -> tuple[str, str, str]:
        """The question and its answer in the form that the system message or the question itself asks for."""
        rng, mode = self.rng, self.mode
        wish = ""
        if not mode and (answer.short or answer.record) and rng.random() < 0.1:
            mode = rng.choice(["one word", "json"]) if answer.record else "one word"
            wish = rng.choice(ONE_WORD if mode == "one word" else AS_JSON)
        text = answer.text
        if mode == "one word" and answer.short:
            text = answer.short
        elif mode == "json" and answer.record:
            text = json.dumps(answer.record)
        return decorate(rng, question, self.capitals) + wish, text, kind

    def follow_up(self) -> tuple[str, str, str] | None:
        """A question that only the one before it makes clear."""
        rng, kind, x = self.rng, self.kind, self.subject
        if kind in NUMBER_KINDS:
            while True:
                a, b = number_pair(rng, kind)
                if kind in self.free or held_out(*pair_key(kind, a, b), share=12) == self.asked:
                    break
            question = rng.choice(NUMBER_FOLLOW_UPS).format(q=f"{a} {'+' if kind == 'sum' else '-'} {b}")
            return self.formed(question, reckon(kind, a, b), "follow-up")
        others = [now for before, now in SAME_SUBJECT if before == kind]
        if others and rng.random() < 0.4 and not (self.mode == "json" and kind in ORDER_KINDS):
            phrase = rng.choice(SAME_SUBJECT[kind, others[0]])
            if held_out(kind, x, phrase) != self.asked:
                return None
            self.kind = others[0]
            return self.formed(phrase, fact(others[0], x), "follow-up")
        y = rng.choice(subjects(kind))
        phrases = HELD_FOLLOW_UPS if self.asked and rng.random() < 0.3 else FOLLOW_UPS
        if kind in ORDER_KINDS and (x in facts.DAYS) != (y in facts.DAYS):
            return None
        if phrases is FOLLOW_UPS and held_out(kind, x, y) != self.asked:
            return None
        self.subject = y
        said = article(y) if kind in ("animal colour", "sound") else y
        return self.formed(rng.choice(phrases).format(x=said), fact(kind, y), "follow-up")


def chat(rng: random.Random, turns: int, drill: bool = False) -> Chat:
    """One chat of so many user turns, with or without a system message."""
    speaker = Speaker(rng, asked=False, drill=drill)
    system = speaker.system()
    messages = [{"role": "system", "content": system}] if system else []
    kinds = []
    for _ in range(turns):
        question, answer, kind = speaker.turn()
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        kinds.append(kind)
    return Chat(messages, kinds)


def corpus(seed: int, count: int, drill: bool = False) -> Iterator[Chat]:
    """Training text: `count` chats, most of one to five turns, a few long enough to fill the context."""
    rng = random.Random(seed)
    for number in range(count):
        if number % 20_000 == 19_999:
            turns = 140
        elif number % 1000 == 999:
            turns = rng.randint(20, 50)
        else:
            turns = rng.choices([1, 2, 3, 4, 5, rng.randint(6, 16)], [56, 22, 10, 6, 4, 2])[0]
        yield chat(rng, turns, drill)
