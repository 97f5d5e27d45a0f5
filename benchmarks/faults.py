"""A decoder of the embedded model that fails at random, and callers that leave, raise and fork. Ends with 1 on a fault.

    python benchmarks/faults.py --minutes 10

Runs each decoder for so long. Fails where a caller gets no answer, or one that it should not have got, where a slot is
still taken at the end, where the memory at the end is above that after the first third by more than 64 MiB, or where
the next request without a fault is not answered as by a decoder that never failed.
"""

import argparse
import logging
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from phi3_mlflow.machine import resident
from phi3_mlflow.runtime.answers import Answer, Piece
from phi3_mlflow.runtime.decoders.base import Decoder, Part
from phi3_mlflow.runtime.errors import Busy, Unavailable
from phi3_mlflow.runtime.loading import onnx_decoder
from phi3_mlflow.runtime.runs import Event
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.runtime.tokens import Tokens

ROOT = Path(__file__).resolve().parent.parent
GROWTH = 64  # MiB
PATIENCE = 120  # seconds after which a caller counts as one without an answer


class Fault(Exception):
    """What a decoder raises that was told to."""


class Faulty:
    """A decoder that fails now and then: it raises before or after it did its work, gives NaN, or takes long.

    Args:
        decoder: what does the work.
        seed: of the faults.
        share: of the calls that fail.
        pause: seconds that a slow call takes longer.

    Attributes:
        faults: how many of each kind there were.
        sound: whether it does not fail any more.
    """

    def __init__(self, decoder: Decoder, seed: int, *, share: float = 0.02, pause: float = 0.02):
        self._decoder = decoder
        self._random = random.Random(seed)
        self._share = share
        self._pause = pause
        self.faults: Counter[str] = Counter()
        self.sound = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def step(self, parts: Mapping[int, Part]) -> Mapping[int, np.ndarray]:
        """See Decoder."""
        kind = self._kind(["raises before", "raises after", "out of memory", "not a number", "slow"])
        if kind == "raises before":
            raise Fault(kind)
        if kind == "out of memory":
            raise MemoryError(kind)
        if kind == "slow":
            time.sleep(self._pause)
        logits = self._decoder.step(parts)
        if kind == "raises after":
            raise Fault(kind)
        if kind == "not a number" and logits:
            poisoned = self._random.choice(sorted(logits))
            return {slot: np.full_like(rows, np.nan) if slot == poisoned else rows for slot, rows in logits.items()}
        return logits

    def rewind(self, slot: int, length: int) -> None:
        """See Decoder."""
        if self._kind(["raises in rewind"]):
            raise Fault("rewind")
        self._decoder.rewind(slot, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """See Decoder."""
        if self._kind(["raises in copy"]):
            raise Fault("copy")
        self._decoder.copy(source, target, length)

    def close(self) -> None:
        """See Decoder."""
        self._decoder.close()

    def _kind(self, kinds: Sequence[str]) -> str | None:
        if self.sound or self._random.random() >= self._share:
            return None
        kind = self._random.choice(kinds)
        self.faults[kind] += 1
        return kind


@dataclass(frozen=True)
class Question:
    """What a caller asks, and the answer of a decoder that does not fail."""

    body: Mapping[str, Any]
    text: str


class Callers:
    """Callers of one service, and what they must have got.

    Args:
        service: over a decoder that fails.
        questions: what is asked; each is answered greedily.

    Attributes:
        counts: what became of the requests.
        wrong: what no caller should have got.
    """

    def __init__(self, service: Service, questions: Sequence[Question]):
        self.service = service
        self.questions = questions
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    def ask(self, rng: random.Random) -> None:
        """One random operation, and a look at what came of it."""
        operation = rng.choice([self._iterate, self._call_back, self._leave, self._hurry, self._table, self._many])
        try:
            kind = operation(rng)
        except Busy:
            kind = "busy"
        except (Fault, MemoryError, ArithmeticError):
            kind = "failed"
        except Exception as error:
            kind = "wrong"
            self.wrong.append(f"{operation.__name__}: {error!r}")
        with self._lock:
            self.counts[kind] += 1

    def _iterate(self, rng: random.Random) -> str:
        question = rng.choice(self.questions)
        pieces = list(self.service.start(question.body))
        self._check("".join(piece.text for piece in pieces), question)
        assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        return "iterated"

    def _call_back(self, rng: random.Random) -> str:
        """A callback that may raise; then nothing comes after it, and nobody else is disturbed."""
        question, events, ended = rng.choice(self.questions), list[Event](), threading.Event()
        raises = rng.choice([None, None, Fault, SystemExit])

        def deliver(event: Event) -> None:
            events.append(event)
            if raises is not None:
                ended.set()
                raise raises
            if isinstance(event, Exception) or event.last:
                ended.set()

        self.service.start(question.body, deliver=deliver)
        assert ended.wait(PATIENCE), "no answer"
        if raises is not None:
            assert len(events) == 1, "a callback that had raised was called again"
            return "raised"
        if isinstance(events[-1], Exception):
            raise events[-1]
        self._check("".join(event.text for event in events if isinstance(event, Piece)), question)
        return "called back"

    def _leave(self, rng: random.Random) -> str:
        question = rng.choice(self.questions)
        pieces, text = iter(self.service.start(question.body)), ""
        for _ in range(rng.randint(0, 3)):
            piece = next(pieces, None)
            text += piece.text if piece else ""
        pieces.close()  # type: ignore[attr-defined]
        assert question.text.startswith(text), f"{text!r} is not what {question.text!r} begins with"
        return "left"

    def _hurry(self, rng: random.Random) -> str:
        question = rng.choice(self.questions)
        answer = self.service.start(question.body, deadline=time.monotonic() + rng.random() * 0.02).wait()
        (choice,) = answer.choices
        if choice.reason != "max_time":
            self._check(choice.text, question)
        begins = choice.text.rstrip("\ufffd")  # the beginning of a character, where the time was over in it
        assert question.text.startswith(begins), f"{begins!r} is not what {question.text!r} begins with"
        return "in time"

    def _table(self, rng: random.Random) -> str:
        rows = [rng.choice(self.questions) for _ in range(rng.randint(2, 5))]
        prepared = [self.service.prepare(self.service.parse(row.body)) for row in rows]
        found: dict[int, Answer | Exception | None] = dict(self.service.run_table(prepared))
        assert sorted(found) == list(range(len(rows))), "a row has no answer"
        for row, answer in found.items():
            if isinstance(answer, Answer):
                self._check(answer.choices[0].text, rows[row])
            else:
                assert isinstance(answer, Fault | MemoryError | ArithmeticError), repr(answer)
        return "table"

    def _many(self, rng: random.Random) -> str:
        question, n = rng.choice(self.questions), rng.randint(2, 3)
        answer = self.service.start({**question.body, "n": n}).wait()
        for choice in answer.choices:
            self._check(choice.text, question)
        return "choices"

    def fork(self) -> None:
        """A process that forks while answers are computed: the child is told so at once."""
        child = os.fork()
        if child == 0:
            code = 1
            try:
                self.service.start(self.questions[0].body)
            except Unavailable:
                code = 0
            finally:
                os._exit(code)
        limit = time.monotonic() + PATIENCE
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > limit:
                os.kill(child, 9)
                os.waitpid(child, 0)
                break
            time.sleep(0.01)
        if ended[1] != 0 or ended[0] == 0:
            self.wrong.append("a forked child was not told that the model stayed behind")

    def _check(self, text: str, question: Question) -> None:
        assert text == question.text, f"{text!r} instead of {question.text!r}"


def settled(service: Service) -> bool:
    """Whether nothing runs and nothing waits, within some seconds."""
    limit = time.monotonic() + PATIENCE
    while True:
        now = service.statistics()
        if now.alive and not now.running and not now.waiting:
            return True
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)


def _decoders(folder: Path) -> Iterator[tuple[str, Callable[[], Decoder], Tokens]]:
    def onnx(**settings: Any) -> Callable[[], Decoder]:
        return lambda: onnx_decoder(folder / "onnx", {"threads": 1, **settings})

    tokens = Tokens.from_folder(folder / "onnx")
    yield "genai", onnx(engine="genai"), tokens
    yield "batched", onnx(engine="onnxruntime", parallel=4), tokens
    yield "openvino", onnx(engine="openvino", parallel=4), tokens

    def pipeline() -> Decoder:
        import torch
        import transformers

        from phi3_mlflow.runtime.decoders.pipeline import PipelineDecoder

        torch.set_num_threads(1)
        return PipelineDecoder(transformers.pipeline("text-generation", str(folder / "transformers")))

    yield "pipeline", pipeline, Tokens.from_folder(folder / "transformers")


COUNTRIES = ["Spain", "France", "Italy", "Japan", "Germany", "Portugal", "Greece", "Norway"]


def _questions(decoder: Decoder, tokens: Tokens) -> list[Question]:
    """Questions, with the answers of a decoder that does not fail; the decoder is closed."""
    system = {"role": "system", "content": "Answer in a full sentence, please."}
    asked = [
        {"messages": [*before, {"role": "user", "content": f"What is the capital of {country}?"}], "max_tokens": most}
        for country in COUNTRIES
        for before, most in (([], 4), ([system], 16))
    ]
    alone = Service(tokens, decoder)
    try:
        return [Question(body, alone.start(body).wait().choices[0].text) for body in asked]
    finally:
        alone.close()


def _run(name: str, make: Callable[[], Decoder], tokens: Tokens, minutes: float, clients: int) -> bool:
    """Whether a decoder and its callers came through."""
    questions = _questions(make(), tokens)
    faulty = Faulty(make(), 0)
    callers = Callers(Service(tokens, faulty, queue_limit=clients), questions)
    begin = time.monotonic()
    end = begin + minutes * 60

    def client(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            callers.ask(rng)

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    memory: list[tuple[float, float]] = []
    while time.monotonic() < end:
        time.sleep(min(1.0, minutes))
        if len(memory) % 10 == 5:
            callers.fork()
        memory.append((time.monotonic() - begin, (resident() or 0) / 2**20))
    for thread in threads:
        thread.join(PATIENCE)
    unanswered, taken = sum(thread.is_alive() for thread in threads), not settled(callers.service)
    faulty.sound = True
    for question in questions:
        if callers.service.start(question.body).wait().choices[0].text != question.text:
            callers.wrong.append(f"after the faults: another answer than {question.text!r}")
    callers.service.close()
    whole = minutes * 60
    third = median([used for at, used in memory if whole / 3 <= at < whole / 2] or [memory[0][1]])
    last = median([used for at, used in memory if at >= whole * 5 / 6] or [memory[-1][1]])
    print(f"{name}: {callers.counts.total()} operations {dict(callers.counts)}; faults {dict(faulty.faults)}")
    print(f"{name}: memory {third:.1f} MiB after a third, {last:.1f} MiB at the end; {unanswered} unanswered; "
          f"{'a slot is' if taken else 'no slot'} taken; {len(callers.wrong)} wrong", flush=True)  # fmt: skip
    for each in callers.wrong[:10]:
        print(f"{name}: {each}", file=sys.stderr)
    return not (unanswered or taken or callers.wrong or last - third > GROWTH)


def main() -> None:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="for each decoder")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--decoder", choices=["genai", "batched", "openvino", "pipeline"], help="this one alone")
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)  # each fault is in the log, with its traceback
    chosen = [each for each in _decoders(ROOT / "artifacts") if asked.decoder in (None, each[0])]
    came_through = [_run(*each, asked.minutes, asked.clients) for each in chosen]
    sys.exit(not all(came_through))


if __name__ == "__main__":
    main()
