"""Answers with and without tokens that are proposed, for each decoder: in alternation.

    python benchmarks/full_size.py && python benchmarks/speculation.py
    python benchmarks/speculation.py --folder artifacts/onnx --rounds 1   a quick look at the embedded model

Prints tables below the name of the machine. The first: what a step of so many tokens of one answer takes, and what
each token more than one takes as a share of a step of one, beside the number that the decoder goes by. The second: one
request at a time from its first token to its last, as a ratio of times and of steps. Its answer conforms to a schema
that forces 200 tokens; or repeats a text of 400 tokens with one changed; or is of digits at random, which look like
something that came before and are not. For the last two, the decoder computes what it computes, and its logits are
replaced by those of a model that would say that. Nothing else should run meanwhile.
"""

import argparse
import importlib.util
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import full_size
import numpy as np

from phi3_mlflow import machine
from phi3_mlflow.runtime.decoders.base import Decoder, Part
from phi3_mlflow.runtime.loading import onnx_decoder
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.runtime.tokens import Tokens

FORCED, COPIED = 200, 400
SIZES = (1, 2, 4, 8, 16)  # tokens of a step
SLOTS = {"genai": 1, "onnxruntime": 2, "openvino": 2}
TEXT = (full_size.ROOT / "LICENSE").read_text("utf-8")


class Scripted:
    """A decoder that computes as ever, and says what it was told to where that is anything.

    Attributes:
        prompt: how many tokens the prompt has.
        answer: what it says after that; nothing for what the model says.
        steps: how many there were in which an answer went on.
    """

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self._lengths = [0] * decoder.slots
        self.prompt = self.steps = 0
        self.answer: Sequence[int] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def step(self, parts: Mapping[int, Part]) -> Mapping[int, np.ndarray]:
        """See Decoder."""
        self.steps += any(self._lengths[slot] >= self.prompt for slot in parts)
        logits = self._decoder.step(parts)
        for slot, part in parts.items():
            self._lengths[slot] += len(part.ids)
        return {slot: self._said(slot, rows) for slot, rows in logits.items()} if self.answer else logits

    def rewind(self, slot: int, length: int) -> None:
        """See Decoder."""
        self._decoder.rewind(slot, length)
        self._lengths[slot] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """See Decoder."""
        self._decoder.copy(source, target, length)
        self._lengths[target] = length

    def _said(self, slot: int, rows: np.ndarray) -> np.ndarray:
        said = np.full_like(rows, -30)
        first = self._lengths[slot] - len(rows) + 1 - self.prompt
        for place, row in enumerate(said, first):
            if place >= 0:
                row[self.answer[min(place, len(self.answer) - 1)]] = 30
        return said


class Engine:
    """One decoder, and a service over it that can be told whether to propose tokens."""

    def __init__(self, name: str, folder: Path, threads: int | None):
        self.name = name
        settings = {"engine": name, "parallel": SLOTS[name], "context_length": 2048}
        self.decoder = Scripted(onnx_decoder(folder, settings | ({"threads": threads} if threads else {})))
        raw = {"task": "llm/v1/completions", "template": False}
        self.service = Service(Tokens.from_folder(folder), self.decoder, renew_after=None, **raw)

    def schema(self, propose: bool) -> tuple[float, int]:
        """Seconds and steps of an answer that can only be written in one way."""
        digits = "".join(random.Random(0).choices("0123456789", k=FORCED))
        wanted = {"type": "json_schema", "json_schema": {"name": "digits", "schema": {"const": digits}}}
        self.decoder.answer = ()
        return self._ask("Digits:", propose, response_format=wanted, max_tokens=2 * FORCED)

    def copying(self, propose: bool) -> tuple[float, int]:
        """Seconds and steps of an answer that repeats the prompt but for one token."""
        answer = self._ids(TEXT)[1 : COPIED + 1]
        answer[len(answer) // 2] = answer[0]
        self.decoder.answer = answer
        return self._ask(TEXT, propose, max_tokens=len(answer))

    def digits(self, propose: bool) -> tuple[float, int]:
        """Seconds and steps of an answer of digits at random to a prompt of digits at random."""
        prompt, answer = ("".join(random.Random(seed).choices("0123456789", k=COPIED)) for seed in (1, 2))
        self.decoder.answer = self._ids(answer)[-FORCED:]
        return self._ask(prompt, propose, max_tokens=FORCED)

    def steps(self) -> Iterator[tuple[int, float]]:
        """(tokens, seconds) of steps of one sequence, behind 100 tokens. Nothing may be asked meanwhile."""
        decoder = self.decoder._decoder
        ids = self._ids(TEXT)[:100]
        decoder.rewind(0, 0)
        for at in range(0, len(ids), 16):
            decoder.step({0: Part(ids[at : at + 16])})
        for size in SIZES:
            took = []
            for _ in range(5):
                decoder.rewind(0, len(ids))
                start = time.perf_counter()
                decoder.step({0: Part(ids[:size], size)})
                took.append(time.perf_counter() - start)
            yield size, median(took)
        decoder.rewind(0, 0)

    def _ids(self, text: str) -> list[int]:
        return self.service.prepare(self.service.parse({"prompt": text, "max_tokens": 1})).ids.tolist()

    def _ask(self, prompt: str, propose: bool, **options: Any) -> tuple[float, int]:
        self.service._scheduler._steps._propose = propose
        self.decoder.prompt = len(self._ids(prompt))
        guards = {"repetition_guard": False, "self_talk_guard": False}
        before = self.decoder.steps
        run = self.service.start({"prompt": prompt, **guards, **options})
        run.wait()
        return run.ended - run.first_token, self.decoder.steps - before


TASKS = {
    f"schema, {FORCED} forced tokens": Engine.schema,
    f"copying {COPIED} tokens": Engine.copying,
    f"{FORCED} digits at random": Engine.digits,
}


def measure(asked: argparse.Namespace) -> dict[tuple[str, ...], list[float]]:
    """Seconds of steps by (engine, tokens); seconds and steps of tasks by (engine, task, with or without, unit)."""
    names = [name for name in SLOTS if name != "openvino" or importlib.util.find_spec("openvino")]
    engines = [Engine(name, asked.folder, asked.threads) for name in names]
    found: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for _ in range(asked.rounds):
        for engine in engines:
            for size, seconds in engine.steps():
                found[engine.name, str(size)].append(seconds)
            found[engine.name, "cost"].append(engine.decoder.cost)
            for task, ask in TASKS.items():
                for propose in (False, True):
                    seconds, steps = ask(engine, propose)
                    found[engine.name, task, str(propose), "s"].append(seconds)
                    found[engine.name, task, str(propose), "steps"].append(steps)
                    print(f"{engine.name}, {task}, {propose=}: {seconds:.2f} s, {steps} steps", file=sys.stderr)
    for engine in engines:
        engine.service.close()
    return found


def tables(found: Mapping[tuple[str, ...], float]) -> Iterator[str]:
    """In Markdown."""
    names = list(dict.fromkeys(key[0] for key in found))
    yield f"| a step of tokens: | {' | '.join(map(str, SIZES))} | each more | the decoder's `cost` |"
    yield "|---|" + "---:|" * (len(SIZES) + 2)
    for name in names:
        took = [found[name, str(size)] for size in SIZES]
        more = (took[-1] / took[0] - 1) / (SIZES[-1] - SIZES[0])
        cells = [*(f"{seconds * 1000:.1f} ms" for seconds in took), f"{more:.2f}", f"{found[name, 'cost']:.2f}"]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    yield "| | engine | time without | with | ratio | steps without | with | ratio |"
    yield "|---|---|" + "---:|" * 6
    for task in TASKS:
        for name in names:
            cells = []
            for unit, form in (("s", "{:.2f} s"), ("steps", "{:.0f}")):
                without, ahead = (found[name, task, str(propose), unit] for propose in (False, True))
                cells += [form.format(without), form.format(ahead), f"{ahead / without:.2f}"]
            yield f"| {task} | {name} | {' | '.join(cells)} |"


def main() -> None:
    """Measures what the command line says."""
    parser = full_size.options(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="alternations; the tables have the medians")
    parser.add_argument("--threads", type=int, help="the engines' own choice where left out")
    asked = parser.parse_args()
    found = {key: median(values) for key, values in measure(asked).items()}
    print(f"\n{machine.line()}; {asked.folder.name}, medians of {asked.rounds} alternations\n")
    print("\n".join(tables(found)))


if __name__ == "__main__":
    main()
