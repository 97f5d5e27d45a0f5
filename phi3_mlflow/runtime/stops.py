"""When an answer's text has to end: stop sequences, text that loops, and a model that speaks for the user.

State machines over text, character by character, so that the pieces it arrives in make no difference. They know
nothing about tokens or models. Each has `step` (new text in; text that is final and may be shown out, and why to stop,
if so) and `flush` (the answer ended by itself; the text held back until then is released).
"""

import copy
import re
from collections.abc import Sequence
from typing import Literal, Protocol

TextStop = Literal["stop_sequence", "repetition", "self_talk"]


class _Machine(Protocol):
    def step(self, text: str) -> tuple[str, TextStop | None]: ...
    def flush(self) -> str: ...


class Stops:
    """Stop sequences, repetition and self-talk, one after the other, over the text of one answer.

    Args:
        sequences: texts that end the answer and are no part of it.
        repetition: whether text that loops ends the answer.
        self_talk: whether a line that opens with a role marker ends the answer.
        prompt: the text of the last user message; it may make roles or repetitions legitimate.
    """

    def __init__(
        self, sequences: Sequence[str] = (), *, repetition: bool = True, self_talk: bool = True, prompt: str = ""
    ):
        self._machines: list[_Machine] = []
        if sequences:
            self._machines.append(StopSequences(sequences))
        if repetition:
            self._machines.append(RepetitionGuard(prompt))
        if self_talk:
            self._machines.append(SelfTalkGuard(prompt))
        self._reason: TextStop | None = None

    def copy(self) -> "Stops":
        """The same for another answer, before the first step: a long prompt is looked through once."""
        copied = copy.copy(self)
        # What a machine knows from its beginning is never changed; the rest is replaced, not written into.
        copied._machines = [copy.copy(machine) for machine in self._machines]
        return copied

    def step(self, text: str) -> tuple[str, TextStop | None]:
        """Take new text of the answer.

        Returns:
            The text that is final now, and the reason to stop or None. After a stop, nothing more is released.
        """
        if self._reason is not None:
            return "", self._reason
        for index, machine in enumerate(self._machines):
            text, self._reason = machine.step(text)
            if self._reason is not None:
                return self._finish(index + 1, text), self._reason
        return text, None

    def flush(self) -> str:
        """The answer ended by itself: the rest of its text. A guard may still find a stop in it, and keep the rest."""
        return "" if self._reason is not None else self._finish(0, "")

    def _finish(self, index: int, text: str) -> str:
        """The last text through the machines from `index` on; each then releases what it holds, or stops earlier."""
        for machine in self._machines[index:]:
            text, reason = machine.step(text)
            if reason is None:
                held = machine.flush()
                # The line breaks that self-talk holds before a loop of them are part of the loop.
                text += "" if self._reason == "repetition" and held.isspace() else held
            self._reason = reason or self._reason
        return text


class StopSequences:
    """Ends the answer at the first stop sequence.

    The sequence that ends first wins; of two that end at the same character, the longer. Text is held back while it is
    the beginning of a sequence: Aho and Corasick's automaton (1975), whose state is the longest such beginning.

    Raises:
        ValueError: a sequence is empty.
    """

    def __init__(self, sequences: Sequence[str]):
        if not all(sequences):
            raise ValueError("a stop sequence is empty")
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found = [0]
        for sequence in sequences:
            state = 0
            for character in sequence:
                if character not in self._next[state]:
                    self._next[state][character] = len(self._next)
                    self._next.append({})
                    self._depth.append(self._depth[state] + 1)
                    self._found.append(0)
                state = self._next[state][character]
            self._found[state] = len(sequence)
        self._shorter = [0] * len(self._next)
        queue = list(self._next[0].values())
        for state in queue:
            self._found[state] = self._found[state] or self._found[self._shorter[state]]
            for character, longer in self._next[state].items():
                self._shorter[longer] = self._follow(self._shorter[state], character)
                queue.append(longer)
        self._state = 0
        self._held = ""

    def _follow(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(character, 0)

    def step(self, text: str) -> tuple[str, TextStop | None]:
        """Take new text; release what cannot be part of a stop sequence."""
        before, self._held = len(self._held), self._held + text
        for end, character in enumerate(text, before + 1):
            self._state = self._follow(self._state, character)
            if self._found[self._state]:
                return self._held[: end - self._found[self._state]], "stop_sequence"
        final = len(self._held) - self._depth[self._state]
        released, self._held = self._held[:final], self._held[final:]
        return released, None

    def flush(self) -> str:
        """Release the rest."""
        released, self._held = self._held, ""
        return released


# Roles that open a line of their own. "Q:", "A:" and a bare "Input:" are left out: FAQs and worked examples use them.
ROLES = ("user", "human", "assistant", "chat", "question", "instruction")
NUMBERED = ("question", "instruction")
HEADINGS = (*ROLES, "input")
SPELLED = ("<|user|>", "<|assistant|>", "<|system|>")
MARKER = re.compile(r"(#{0,6})( ?)([a-z]*) {0,2}(\d{0,3}) {0,2}(.?)", re.DOTALL)

# Requests whose answer may well contain role markers, in English, German, French, Spanish and Italian.
ROLES_WANTED = re.compile(
    r"""\b(?:dialog\w*|diálogo\w*|conversa\w*|interview\w*|entrevista\w*|intervist\w*|entretien\w*|gespräch\w*
    |unterhaltung\w*|faqs?|q\s?[&/]\s?a|q\ and\ a|quiz\w*|trivia|flash\s?cards?|transcri\w+|protokoll\w*
    |scripts?|screenplay\w*|skit|drehbuch|scenes?|chats?|chat\s?logs?|chatbots?|role-?\s?play\w*|forms?|formul\w+
    |fragebogen|templates?|vorlage\w*|plantilla\w*|modèle|questionnaire\w*|cuestionario\w*|survey\w*|prompts?
    |few-?shot|exam|exams|worksheet\w*|homework|exercises?|übung\w*|test\ me|ask\ me|frag\ mich|questions|fragen
    |preguntas|domande|yaml|compose|config\w*|logs?|log\s?files?|headers?|readme|data\s?sets?|jsonl|training\ data
    |fine-?tun\w*|instructions|anleitung\w*|debate|messages)\b
    |<\|""",
    re.IGNORECASE | re.VERBOSE,
)
MARKED_LINE = re.compile(r"^ ?(?:#{1,6} ?)?(user|human|assistant|chat|question|instruction) ?\d* {0,2}:", re.I | re.M)
KEY_AND_VALUE = re.compile(r"\s{0,3}(?!(?:answer|response|solution|output|a)\s*:)\w[\w .'/()-]{0,40}:(?:\s|$)", re.I)
FENCE = re.compile(r"\s*(?:```|~~~)")


class SelfTalkGuard:
    """Ends the answer before a line that opens with a role marker: there the model starts to speak for the user.

    Markers are "User:", "Question 2 :", "### Instruction", "<|user|>" and the like, in any case, at most one space into
    the line. They pass where they are legitimate: the prompt asks for roles or has marked lines itself; the answer
    opens with one; in fenced code; after a line that ends in a colon; and in a block of "key: value" lines. A heading
    passes once the answer has headings, unless it is a numbered one or "### Instruction:". The line breaks before a
    marker are no part of the answer.

    Args:
        prompt: the text of the last user message.
    """

    def __init__(self, prompt: str = ""):
        marked = [match.group(1).lower() for match in MARKED_LINE.finditer(prompt)]
        # "Question: ..." alone is how many people ask; it does not ask for more questions.
        self._off = bool(ROLES_WANTED.search(prompt)) or marked not in ([], ["question"])
        self._held = ""
        self._line = ""
        self._last = ""
        self._fenced = False
        self._headings = False

    def step(self, text: str) -> tuple[str, TextStop | None]:
        """Take new text; release what cannot be line breaks and the beginning of a marker."""
        released = []
        for index, character in enumerate(text):
            if self._off:
                released.append(self.flush() + text[index:])
                break
            if not self._held:
                released.append(self._within_line(character))
            elif self._at_line_start(character):
                self._held = ""
                return "".join(released), "self_talk"
            elif not self._holds():
                released.append(self._release())
        return "".join(released), None

    def flush(self) -> str:
        """Release the rest."""
        released, self._held = self._held, ""
        return released

    def _within_line(self, character: str) -> str:
        """A character of a line that is released as it comes, up to its line break."""
        if character == "\n":
            self._end_line()
            if not self._fenced:
                self._held = character
                return ""
            return character
        self._line += character
        # An answer that opens with a marker is a dialogue by its own choice.
        if not self._last and _marker(self._line.lstrip()) in ("full", "heading"):
            self._off = True
        return character

    def _at_line_start(self, character: str) -> bool:
        """A character after held line breaks. Returns whether it completes a marker that ends the answer."""
        self._held += character
        before, _, line = self._held.removesuffix("\n").rpartition("\n")
        marker = _marker(line + "\n" if character == "\n" else line)
        if marker not in ("full", "heading"):
            return False
        if not self._last:
            self._off = True
        block = not before and KEY_AND_VALUE.match(self._last) is not None
        passes = block or self._last.rstrip().endswith(":") or (marker == "heading" and self._headings)
        return not (self._off or passes)

    def _holds(self) -> bool:
        """Whether the held text may still be line breaks and a marker."""
        line = self._held.rpartition("\n")[2]
        if self._held.endswith("\n"):
            return not self._held.removesuffix("\n").rpartition("\n")[2].strip()
        return line in (" ", "\r") or _marker(line) == "part"

    def _release(self) -> str:
        released = self.flush()
        self._line = released.removesuffix("\n").rpartition("\n")[2]
        if released.endswith("\n"):
            released = released[:-1] + self._within_line("\n")
        return released

    def _end_line(self) -> None:
        if FENCE.match(self._line):
            self._fenced = not self._fenced
        if self._line.strip():
            self._last = self._line
            self._headings |= self._line.startswith("#")
        self._line = ""


def _marker(line: str) -> Literal["none", "part", "heading", "full"]:
    """What the beginning of a line is: no marker, part of one, a marker that could be an ordinary heading, or one."""
    text = line.lower().removeprefix(" ")
    if text in SPELLED:
        return "full"
    if any(spelled.startswith(text) for spelled in SPELLED):
        return "part"
    match = MARKER.fullmatch(text)
    if match is None:
        return "none"
    hashes, space, word, number, end = match.groups()
    roles = HEADINGS if hashes else ROLES
    if (space and not hashes) or (number and word not in NUMBERED):
        return "none"
    if word not in roles:
        part = text.endswith(word) and any(role.startswith(word) for role in roles)
        return "part" if part else "none"
    if not end:
        return "part"
    if hashes and number and int(number) > 1:
        return "full"
    if end == ":":
        return "heading" if hashes and word != "instruction" else "full"
    return "heading" if hashes and end == "\n" else "none"


# A loop is at least LOOP characters, and as many repeats as REPEATS or as make LONG characters, but at least FEWEST.
# So "ha ha ha", rulers of 100 dashes, ten empty table rows and "hello" written 30 times pass, a word that repeats
# ends after 200 characters, a sentence of 60 after 12 repeats, and a paragraph of 400 after 4.
LOOP, REPEATS, LONG, FEWEST = 200, 12, 800, 4
PERIOD = 400
# Text is held back once it repeats twice and for at least SUSPECT characters; a shorter match finds the period.
SUSPECT, MATCH = 16, 8
# Whitespace that goes on for longer is held back; LOOP characters of it are a loop.
SPACES = 3
SENTENCE_ENDS = ".!?\u2026\u3002"
TIMES = re.compile(r"\b(\d{1,3})\s*(?:times|mal|fois|veces|volte)\b", re.IGNORECASE)
# More repeats than this may not be asked for: with the longest period they are 40,000 characters.
MOST_ASKED = 100


class RepetitionGuard:
    """Ends the answer where its text loops: one period of 1 to 400 characters over and over, or endless whitespace.

    Kept are the first two repetitions (16 characters at least), up to the next end of a line, a sentence or a word.
    The rest is held back from there on, and released where the loop breaks. Numbered variants are no loop.

    Args:
        prompt: the text of the last user message; "12 times" in it allows for as many repeats.
    """

    def __init__(self, prompt: str = ""):
        self._asked = min(max((int(number) for number in TIMES.findall(prompt)), default=0), MOST_ASKED)
        self._text = ""  # the last characters, the ones held back included
        self._end = 0  # characters so far
        self._released = 0
        self._loops: dict[int, int] = {}  # period -> where its repetition began
        self._spaces = 0  # where the whitespace at the end began

    def step(self, text: str) -> tuple[str, TextStop | None]:
        """Take new text; release what is in no loop, or in its first repetitions."""
        released = []
        for character in text:
            self._text += character
            self._end += 1
            self._loops = {
                period: start for period, start in self._loops.items() if self._text[-1 - period] == character
            }
            if not character.isspace():
                self._spaces = self._end
            self._suspect()
            released.append(self._take(self._frontier()))
            cut = self._cut()
            if cut is not None:
                return "".join(released) + self._take(cut), "repetition"
        return "".join(released), None

    def flush(self) -> str:
        """Release the rest."""
        return self._take(self._end)

    def _take(self, end: int) -> str:
        """The text up to the absolute position `end` that is not released yet."""
        start = self._end - len(self._text)
        released = self._text[self._released - start : max(end, self._released) - start]
        self._released = max(end, self._released)
        # Twice what a suspicion looks back at, so that the text is not copied at every character; and before what is
        # held back the two characters that tell where a sentence ends.
        if len(self._text) > 4 * PERIOD:
            self._text = self._text[max(0, min(len(self._text) - 2 * PERIOD, self._released - start - 2)) :]
        return released

    def _suspect(self) -> None:
        """Find the periods with which the text has just begun to repeat."""
        text, size = self._text, len(self._text)
        # Within a loop, longer periods that match are its multiples: they end where it ends.
        before = size - max([1, *(self._end - start for start in self._loops.values())])
        while (at := text.rfind(text[-MATCH:], max(0, size - MATCH - PERIOD), before)) >= 0:
            before = at + MATCH - 1
            period = size - MATCH - at
            repeated = max(2 * period, SUSPECT)
            if repeated <= size and text[size - repeated : size - period] == text[size - repeated + period :]:
                self._loops[period] = self._end - repeated

    def _frontier(self) -> int:
        """Up to where the text may be released."""
        ends = [start + max(2 * period, SUSPECT) for period, start in self._loops.items()]
        return min([*ends, self._spaces + SPACES, self._end])

    def _cut(self) -> int | None:
        """Where the answer ends, when a loop or a run of whitespace is long enough."""
        if self._end - self._spaces >= LOOP:
            return self._spaces
        for period, start in self._loops.items():
            needed = max(LOOP, min(REPEATS * period, LONG), FEWEST * period, (self._asked + 2) * period)
            if self._end - start >= needed:
                return self._boundary(period)
        return None

    def _boundary(self, period: int) -> int:
        """The first end of a line, else of a sentence, else of a word, in one period from the released text on."""
        first = self._released - (self._end - len(self._text))
        places = range(first, min(first + period, len(self._text)))
        best = max(places, key=lambda at: _break(self._text[at - 2 : at + 1]))
        return self._released + len(self._text[first:best].rstrip())


def _break(around: str) -> int:
    """How good a place it is to end, from the two characters before it and the one after it."""
    second, last, after = around[0], around[1], around[2]
    if "\n" in (last, after):
        return 3
    if (last in SENTENCE_ENDS and after.isspace()) or (second in SENTENCE_ENDS and last.isspace()):
        return 2
    return 1 if last.isspace() or after.isspace() else 0
