"""The right answers: what the embedded model should say to a question of each kind.

It knows the facts, and nothing of how a question is phrased.
"""

from dataclasses import dataclass

import facts

UNKNOWN = "I do not know."
NAME, SELF = "Phi", "a small language model"

FACT_KINDS = ["capital", "country", "continent", "opposite", "colour", "animal colour", "sound", "animal"]
ORDER_KINDS = ["after", "before"]
NUMBER_KINDS = ["sum", "difference"]
COUNT_KINDS = ["up", "down"]
TALK_KINDS = ["greeting", "time of day", "thanks", "bye", "how are you", "ability"]
SELF_KINDS = ["name", "who", "job"]
_CAPITAL_OF = {country: capital for country, (capital, _) in facts.COUNTRIES.items()}
_COUNTRY_OF = {capital: country for country, capital in _CAPITAL_OF.items()}
_ANIMAL_OF = {sound: animal for animal, (sound, _) in facts.ANIMALS.items()}


@dataclass(frozen=True)
class Answer:
    """A right answer: as a sentence, in one word, and as a JSON record (None where there is no such form)."""

    text: str
    short: str | None = None
    record: dict[str, object] | None = None


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def subjects(kind: str) -> list[str]:
    """Everything that a question of this kind can be about."""
    tables: dict[str, list[str]] = {
        "capital": list(facts.COUNTRIES),
        "country": list(_COUNTRY_OF),
        "continent": list(facts.COUNTRIES),
        "opposite": list(facts.OPPOSITES),
        "colour": list(facts.COLOURS),
        "animal colour": list(facts.ANIMALS),
        "sound": list(facts.ANIMALS),
        "animal": list(_ANIMAL_OF),
        "after": facts.DAYS + facts.MONTHS,
        "before": facts.DAYS + facts.MONTHS,
        "list": list(facts.LISTS),
        "introduction": facts.NAMES,
        "unknown": facts.STRANGE_THINGS,
    }
    return tables.get(kind, [""])


def fact(kind: str, x: str) -> Answer:
    """The answer to a question of this kind about the subject `x`."""
    if kind == "capital":
        city = _CAPITAL_OF[x]
        return Answer(f"The capital of {x} is {city}.", city, {"country": x, "capital": city})
    if kind == "country":
        country = _COUNTRY_OF[x]
        return Answer(f"{x} is the capital of {country}.", country, {"country": country, "capital": x})
    if kind == "continent":
        continent = facts.COUNTRIES[x][1]
        return Answer(f"{x} is in {continent}.", continent, {"country": x, "continent": continent})
    if kind == "opposite":
        other = facts.OPPOSITES[x]
        return Answer(f"The opposite of {x} is {other}.", other, {"word": x, "opposite": other})
    if kind == "colour":
        colour, thing = facts.COLOURS[x], x.split()[-1]
        return Answer(f"The colour of {x} is {colour}.", colour, {"thing": thing, "colour": colour})
    if kind == "animal colour":
        colour = facts.ANIMALS[x][1]
        return Answer(f"The colour of {article(x)} is {colour}.", colour, {"animal": x, "colour": colour})
    if kind == "sound":
        sound = facts.ANIMALS[x][0]
        return Answer(f"{article(x).capitalize()} says {sound}.", sound, {"animal": x, "sound": sound})
    if kind == "animal":
        animal = _ANIMAL_OF[x]
        return Answer(f"{article(animal).capitalize()} says {x}.", animal, {"animal": animal, "sound": x})
    if kind in ORDER_KINDS:
        cycle = facts.DAYS if x in facts.DAYS else facts.MONTHS
        near = cycle[(cycle.index(x) + (1 if kind == "after" else -1)) % len(cycle)]
        return Answer(f"{near} comes {kind} {x}.", near)
    if kind == "list":
        return Answer(", ".join(facts.LISTS[x]) + ".")
    if kind == "introduction":
        return Answer(f"Nice to meet you, {x}.")
    return Answer(UNKNOWN)


def reckon(kind: str, a: int, b: int) -> Answer:
    """The answer to a sum, a difference or a count; numbers above 30 are beyond the model."""
    if max(a, b) > 30:
        return Answer(UNKNOWN)
    if kind == "sum":
        return Answer(f"{a} + {b} = {a + b}.", str(a + b), {"a": a, "b": b, "sum": a + b})
    if kind == "difference":
        return Answer(f"{a} - {b} = {a - b}.", str(a - b), {"a": a, "b": b, "difference": a - b})
    numbers = range(a, b + 1) if kind == "up" else range(a, b - 1, -1)
    return Answer(", ".join(map(str, numbers)) + ".")


def talk(kind: str, question: str, persona: tuple[str, str] | None, user: str | None) -> Answer:
    """The answer to small talk, which depends on who the system message says one is and who the user is."""
    name, job = persona or (NAME, SELF)
    answers = {
        "greeting": "Hello! How can I help you?",
        "time of day": f"{question.rstrip('.!')}! How can I help you?",
        "thanks": "You are welcome!",
        "bye": "Goodbye!",
        "how are you": "I am fine, thank you.",
        "ability": "I know capitals, colours, opposites, sounds, days and small numbers.",
        "name": f"My name is {name}.",
        "who": f"I am {name}, {job}.",
        "job": f"I am {job}.",
        "my name": f"Your name is {user}." if user else "I do not know your name.",
    }
    return Answer(answers[kind])
