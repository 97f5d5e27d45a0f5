"""Answers with tokens that are proposed, against the same answers without.

Run with: python -m pytest tests/test_speculation.py
"""

import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fakes import EOS, IDS, LOGITS, TOKENS, FakeDecoder, hashed, spell
from test_grammar import SCHEMAS, closed, wrap

from phi3_mlflow.runtime.decoders.base import Part
from phi3_mlflow.runtime.drafts import Drafts
from phi3_mlflow.runtime.generation import Generation
from phi3_mlflow.runtime.loading import onnx_decoder
from phi3_mlflow.runtime.service import Service
from phi3_mlflow.runtime.tokens import Tokens

ROOT = Path(__file__).resolve().parent.parent
ONNX = ROOT / "artifacts" / "onnx"
PATIENCE = 120  # seconds; only what is broken takes as long
LETTERS = spell("abcdefghijklmnopqrstuvwxyz")[1:]
FOREVER = {"repetition_guard": False, "self_talk_guard": False}


class Babble(FakeDecoder):
    """Says mostly what the last token makes it say, so that it soon repeats itself; a little depends on all of them."""

    def _logits(self, slot, length):
        sequence = self._sequences[slot][:length]
        return 5 * hashed(sequence[-1][0] % 12) + hashed(sequence) / 2


@pytest.fixture
def load():
    """Makes services, and closes them after the test."""
    made = []

    def make(decoder, tokens=TOKENS, **scheduling):
        made.append(Service(tokens, decoder, **{"renew_after": None, **scheduling}))
        return made[-1]

    yield make
    for service in made:
        service.close()


def chat(content="one two", **options):
    return {"messages": [{"role": "user", "content": content}], **FOREVER, **options}


def all_of(answer):
    """All that a client can see of an answer."""
    return answer.prompt_tokens, answer.choices


def schema(rng, depth=2):
    """A random schema, of which much is spelled out."""
    kinds = ["const", "enum", "boolean", "integer", *["object", "array"] * (depth > 0)]
    words = [" ".join(rng.choices(["hello", "world", "the capital", "é", '"q"'], k=3)) for _ in range(3)]
    match rng.choice(kinds):
        case "object":
            properties = {word: schema(rng, depth - 1) for word in words}
            return closed(properties, required=rng.sample(words, rng.randint(1, 3)))
        case "array":
            return {"type": "array", "items": schema(rng, depth - 1), "minItems": 1, "maxItems": rng.randint(1, 3)}
        case "const":
            return {"const": rng.choice([words[0], None, 12345, [words[1], True]])}
        case "enum":
            return {"enum": words}
        case kind:
            return {"type": kind}


def request(rng):
    """A request with random options."""
    options = {
        "max_tokens": rng.choice([1, 2, 5, 30, 60]),
        "logprobs": rng.random() < 0.5,
        "n": rng.choice([1, 1, 2]),
        "temperature": rng.choice([0.0, 0.0, 0.7, 1.5]),
        "seed": rng.randrange(100),
        "stop": rng.choice([None, ["e"], ["an", "is"]]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.2]),
        "frequency_penalty": rng.choice([0.0, 0.0, 0.3]),
        "top_p": rng.choice([1.0, 0.9]),
    }
    if rng.random() < 0.6:
        regex = {"type": "regex", "regex": "(yes|no), hello world( the capital of spain){1,4}"}
        options["response_format"] = rng.choice([regex, wrap(rng.choice(SCHEMAS)), wrap(schema(rng))])
    return chat(rng.choice(["yes", "no", "hello world the capital", "abcdef" * 3]), **options)


@pytest.mark.parametrize(("slots", "mixed"), [(1, False), (3, False), (2, True), (3, True)])
def test_random_mixes_of_requests_get_the_answers_they_get_alone_without_proposals(load, slots, mixed):
    rng = random.Random(slots + mixed)
    values = {"context_length": 160, "chunk": 8, "mixed": mixed}
    plain = load(Babble(**values), speculation=False)
    service = load(Babble(slots=slots, **values), renew_after=0.0)
    for _ in range(60):
        requests = [request(rng) for _ in range(rng.randint(1, slots + 1))]
        runs = [service.start(each) for each in requests]
        for each, run in zip(requests, runs, strict=True):
            assert all_of(run.wait()) == all_of(plain.start(each).wait())
    counts = service.statistics()
    assert counts.accepted > 100
    assert counts.proposed - counts.accepted > 30  # so that answers went on behind proposals that were wrong
    assert plain.statistics().proposed == 0


def test_conversations_go_on_in_what_was_proposed_and_what_was_not(load):
    """The next turn begins with the answer, of which idle time makes what prefill writes."""
    for reuse in ("exact", "all"):
        rng, messages = random.Random(1), []
        service = load(Babble(context_length=400, chunk=4), reuse=reuse, renew_after=0.0)
        for _ in range(6):
            messages.append({"role": "user", "content": rng.choice(["yes", "hello world", "abc"])})
            asked = {"messages": messages, "max_tokens": 24, **FOREVER}
            answer = service.start(asked).wait()
            if reuse == "exact":
                alone = load(Babble(context_length=400, chunk=4), speculation=False).start(asked).wait()
                assert all_of(answer) == all_of(alone)
            said = "".join(letter for letter in answer.choices[0].text if letter.isprintable())
            messages.append({"role": "assistant", "content": said or "no"})
        assert service.statistics().accepted > 10


def test_an_answer_with_one_way_to_be_written_takes_a_step_for_each_chunk(load):
    text = "the capital of spain is madrid " * 8
    decoder = FakeDecoder(context_length=400, chunk=16, cost=0.9)
    answer = load(decoder).start(chat(response_format={"type": "regex", "regex": text}, max_tokens=300)).wait()
    (choice,) = answer.choices
    assert (choice.text, choice.reason) == (text, "eos")
    assert choice.tokens > 50
    assert decoder.count("decode") == -(-(choice.tokens - 1) // 16)


@pytest.mark.parametrize(("cost", "forced", "looked_up"), [(0.1, True, True), (0.9, True, False), (1.0, False, False)])
def test_what_a_token_more_takes_in_a_step_decides_what_is_proposed(load, cost, forced, looked_up):
    regex = {"type": "regex", "regex": "the capital of spain is madrid " * 4}
    service = load(FakeDecoder(context_length=400, chunk=16, cost=cost))
    service.start(chat(response_format=regex, max_tokens=300)).wait()
    assert (service.statistics().proposed > 20) is forced
    # Half of what is found comes.
    script = [letter for at in range(20) for letter in (*LETTERS[:3], LETTERS[3 + at])]
    service = load(FakeDecoder(lambda prompt: script, context_length=400, chunk=16, cost=cost))
    assert service.start(chat()).wait().choices[0].text == TOKENS.decode(script)
    assert (service.statistics().proposed > 0) is looked_up


def test_an_answer_that_quotes_the_prompt_with_one_word_changed_takes_less_than_half_of_the_steps(load):
    rng = random.Random(0)
    text = spell(" ".join(rng.choices(["hello", "world", "the", "capital", "of", "spain", "is", "no"], k=400)))[:400]
    changed = [*text[:200], spell("madrid")[0], *text[201:]]
    decoders = [FakeDecoder(lambda prompt: changed, context_length=1000, chunk=16, cost=0.3) for _ in range(2)]
    body = {"prompt": TOKENS.decode(text), "max_tokens": 500, **FOREVER}
    answers = [
        load(decoder, task="llm/v1/completions", template=False, speculation=speculation).start(body).wait()
        for decoder, speculation in zip(decoders, (True, False), strict=True)
    ]
    assert all_of(answers[0]) == all_of(answers[1])
    assert decoders[1].count("decode") == 400
    assert decoders[0].count("decode") <= 80


def sampled(service, tokens, seed):
    """The tokens of an answer, by their text; all letters."""
    answer = service.start(
        {"prompt": "ab" * 20, "max_tokens": tokens, "seed": seed, "temperature": 1.0, **FOREVER}
    ).wait()
    return answer.choices[0].text


def test_sampled_tokens_have_the_models_distribution_where_they_were_proposed(load):
    shares = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}

    class Dice(FakeDecoder):
        def _logits(self, slot, length):
            logits = np.full(LOGITS, -np.inf, np.float32)
            for letter, share in shares.items():
                logits[IDS[letter]] = np.log(share)
            return logits

    values = {"context_length": 200, "chunk": 4, "cost": 0.01}
    settings = {"task": "llm/v1/completions", "template": False}
    decoder = Dice(**values)
    service, plain = load(decoder, **settings), load(Dice(**values), **settings, speculation=False)
    found = Counter()
    for seed in range(60):
        text = sampled(service, 100, seed)
        assert text == sampled(plain, 100, seed)  # one random number a token
        found.update(text)
    total = found.total()
    counts = service.statistics()
    assert counts.proposed > total / 2
    # A first token that is proposed is right as often as two dice are alike.
    assert 0.3 * counts.drafts < counts.accepted < 0.5 * counts.drafts
    chi_square = sum((found[letter] - total * share) ** 2 / (total * share) for letter, share in shares.items())
    assert chi_square < 16.27  # 0.1 % of fair dice are above, with three degrees of freedom


def test_a_stop_sequence_a_limit_and_an_end_token_end_an_answer_in_the_middle_of_what_was_proposed(load):
    def script(prompt):
        return (LETTERS[:5] * 9)[:40]

    decoder = FakeDecoder(script, context_length=200, chunk=16, cost=0.01)
    service, plain = load(decoder), load(FakeDecoder(script, context_length=200), speculation=False)
    for options in ({"stop": ["cdeab"]}, {"max_tokens": 23}, {}, {"stop": ["abcdeabcdeabcdea"]}, {"max_tokens": 21}):
        answer = service.start(chat(**options)).wait()
        assert all_of(answer) == all_of(plain.start(chat(**options)).wait())
        # What was computed behind the end is given back, or was never asked for.
        assert service.statistics().held <= answer.prompt_tokens + answer.choices[0].tokens - 1
    assert service.statistics().accepted > 50


def test_an_end_token_in_the_prompt_is_not_proposed():
    end = IDS["<|end|>"]
    service = Service(TOKENS, FakeDecoder())
    run = service.start(chat())
    run.wait()
    service.close()
    answer = Generation(
        [*LETTERS[:4], end, *LETTERS[:3]], service.defaults, max_tokens=20, limit="max_tokens", vocab_size=LOGITS,
        eos=EOS, text=TOKENS.decoder(), stops=None,
    )  # fmt: skip
    assert answer.propose(5, 0.001) == [LETTERS[3]]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_with_proposals_that_fails_is_tried_again_without(load, mixed, caplog):
    class Fails(FakeDecoder):
        def step(self, parts):
            logits = super().step(parts)
            if any(self._answers[slot] and part.logits > 1 for slot, part in parts.items()):
                self._failed = True
                raise MemoryError("too many tokens")
            return logits

    script = LETTERS[:4] * 8
    service = load(Fails(lambda prompt: script, slots=1 + mixed, context_length=100, mixed=mixed))
    runs = [service.start(chat()) for _ in range(1 + mixed)]
    for run in runs:
        assert run.wait().choices[0].text == TOKENS.decode(script)
    counts = service.statistics()
    assert (counts.failed, counts.accepted) == (0, 0)
    assert counts.drafts > 5
    assert "each is tried alone" in caplog.text


def test_a_proposal_that_cannot_be_taken_back_ends_its_answer_alone(load, caplog):
    class Stuck(FakeDecoder):
        stuck = True

        def rewind(self, slot, length):
            if self.stuck and self._answers[slot] and 0 < length < len(self._sequences[slot]):
                self.stuck = False
                raise MemoryError("no way back")
            super().rewind(slot, length)

    # What the prompt goes on with is not what the answer does.
    service = load(Stuck(lambda prompt: [*LETTERS[:3], 7], context_length=100, cost=0.01))
    with pytest.raises(MemoryError, match="no way back"):
        service.start(chat("abcdef")).wait()
    assert service.start(chat("abcdef")).wait().choices[0].reason == "eos"
    assert service.statistics().failed == 1


def test_nothing_comes_after_a_callback_that_raised_though_more_tokens_were_accepted(load):
    service = load(FakeDecoder(lambda prompt: LETTERS[:2] * 20, context_length=100, chunk=16, cost=0.01))
    events = []

    def deliver(event):
        events.append(event)
        if len(events) == 9:
            raise RuntimeError

    run = service.start(chat(), deliver=deliver)
    assert service.start(chat()).wait().choices[0].tokens == 41
    assert len(events) == 9
    assert run.answer.choices[0].tokens == 9


@pytest.mark.parametrize(("slots", "mixed", "most"), [(1, False, 1), (4, False, 1), (4, True, 2)])
def test_tokens_are_proposed_only_where_so_few_answers_run_that_it_pays(load, slots, mixed, most):
    seen = Counter()

    class Watched(FakeDecoder):
        def step(self, parts):
            answers = [part for slot, part in parts.items() if self._answers[slot]]
            seen[len(answers)] += sum(len(part.ids) > 1 for part in answers)
            assert sum(len(part.ids) for part in answers) <= max(len(answers), self.chunk)
            return super().step(parts)

    decoder = Watched(lambda prompt: LETTERS[:3] * 30, slots=slots, context_length=150, chunk=8, mixed=mixed, cost=0.01)
    service = load(decoder)
    for run in [service.start(chat(max_tokens=20 * (index + 1))) for index in range(slots)]:
        run.wait()
    assert {count for count, proposed in seen.items() if proposed} == set(range(1, most + 1))


def test_what_is_proposed_does_not_take_a_sequence_over_the_switch(load):
    class Switched(FakeDecoder):
        def step(self, parts):
            for slot, part in parts.items():
                start = len(self._sequences[slot])
                assert len(part.ids) == 1 or not start < self.switch < start + len(part.ids)
                crossed.append(start == self.switch)
            return super().step(parts)

    crossed = []
    decoder = Switched(lambda prompt: LETTERS[:3] * 20, context_length=150, chunk=16, cost=0.01, switch=48)
    service = load(decoder)
    assert service.start(chat()).wait().choices[0].tokens == 61
    assert any(crossed)
    assert service.statistics().steps < 30


def test_a_grammar_that_fails_while_tokens_are_proposed_ends_its_answer_alone(load, monkeypatch):
    service = load(FakeDecoder(slots=2, context_length=100, mixed=True))

    def fails(generation, most, cost):
        raise ArithmeticError("no proposal")

    monkeypatch.setattr(Generation, "propose", fails)
    with pytest.raises(ArithmeticError, match="no proposal"):
        service.start(chat()).wait()
    monkeypatch.undo()
    assert service.start(chat(max_tokens=3)).wait().choices[0].tokens == 3


# On the embedded model.


class Watched:
    """A decoder that counts the steps in which answers go on."""

    def __init__(self, decoder):
        self._decoder = decoder
        self.decoded = 0

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def step(self, parts):
        self.decoded += all(len(part.ids) == part.logits for part in parts.values())
        return self._decoder.step(parts)


def embedded(load, engine, speculation, **settings):
    decoder = Watched(onnx_decoder(ONNX, {"engine": engine, "threads": 1, "context_length": 1024, **settings}))
    return decoder, load(decoder, Tokens.from_folder(ONNX), speculation=speculation)


def again(line):
    """A question after it was answered."""
    history = [*line["messages"], {"role": "assistant", "content": line["answer"]}]
    return {"messages": [*history, line["messages"][-1]]}


def questions(every):
    lines = (ROOT / "artifacts" / "questions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines[::every]]


def test_answers_that_conform_to_a_schema_take_half_the_steps_and_are_the_same(load):
    """Over all of SCHEMAS, with what is forced and what a prompt lookup finds."""
    (decoder, service), (reference, plain) = (embedded(load, "genai", each) for each in (True, False))
    differences = 0
    for schema in SCHEMAS:
        asked = chat("What is the capital of Spain?", response_format=wrap(schema), max_tokens=40)
        answer, expected = (each.start(asked).wait() for each in (service, plain))
        differences += all_of(answer) != all_of(expected)
        if answer.choices[0].reason == "eos":
            json.loads(answer.choices[0].text)
    # Several tokens in a step are added up in another order than one by one.
    assert differences <= 1
    assert decoder.decoded <= 0.5 * reference.decoded


def test_what_a_schema_forces_saves_half_of_the_steps_of_answers_that_end_and_a_quarter_of_all(load, monkeypatch):
    """Over SCHEMAS, without a prompt lookup. A fifth of the answers are numbers that go on until their limit, of which
    nothing is forced; they take half of the steps."""
    monkeypatch.setattr(Drafts, "propose", lambda drafts, most, cost: [])
    (decoder, service), (reference, plain) = (embedded(load, "genai", each) for each in (True, False))
    steps = Counter()
    for schema in SCHEMAS:
        asked = chat("What is the capital of Spain?", response_format=wrap(schema), max_tokens=40)
        before = decoder.decoded, reference.decoded
        _, expected = (each.start(asked).wait() for each in (service, plain))
        for answers in ("all", expected.choices[0].reason):
            steps["with", answers] += decoder.decoded - before[0]
            steps["without", answers] += reference.decoded - before[1]
    assert steps["with", "eos"] <= 0.52 * steps["without", "eos"]
    assert steps["with", "all"] <= 0.75 * steps["without", "all"]
    counts = service.statistics()
    assert counts.accepted >= 0.8 * counts.proposed


def test_a_question_that_was_answered_before_takes_less_than_half_of_the_steps(load):
    (decoder, service), (reference, plain) = (embedded(load, "genai", each) for each in (True, False))
    differences = 0
    for line in questions(6):
        answer, expected = (each.start(again(line)).wait() for each in (service, plain))
        differences += all_of(answer) != all_of(expected)
    assert differences <= 1
    assert decoder.decoded <= 0.5 * reference.decoded


class Recorded(Generation):
    """Remembers the logits of its tokens, and the tokens."""

    def __init__(self, *arguments, **values):
        super().__init__(*arguments, **values)
        self.rows, self.tokens = [], []

    def accept(self, logits):
        self.rows.append(logits.copy())
        piece = super().accept(logits)
        self.tokens.append(self.next)
        return piece


@pytest.mark.parametrize(("engine", "slots"), [("genai", 1), ("onnxruntime", 2), ("openvino", 2)])
def test_tokens_that_were_proposed_get_the_logits_that_they_get_one_by_one(load, monkeypatch, engine, slots):
    """Mixes with joins, leaves, shared prefixes and grammars: so answers are those without, but for rounding."""
    if engine == "openvino" and importlib.util.find_spec("openvino") is None:
        pytest.skip("needs the extra openvino")
    parallel = {"parallel": slots} if slots > 1 else {}
    _, service = embedded(load, engine, True, **parallel)
    made = []

    def recorded(*arguments, **values):
        made.append(Recorded(*arguments, **values))
        return made[-1]

    monkeypatch.setattr("phi3_mlflow.runtime.service.Generation", recorded)
    rng, lines = random.Random(slots), questions(20)
    for seed in range(30):
        runs = []
        for _ in range(rng.randint(1, slots + 2)):
            options = [{}, {"temperature": 1.0, "seed": seed}, {"response_format": wrap(rng.choice(SCHEMAS))}]
            run = service.start({**again(rng.choice(lines)), "max_tokens": 30, **rng.choice(options)})
            runs.append((run, iter(run)))
            next(runs[0][1], None)  # the others come while the first one goes on
        for run, pieces in runs:
            if rng.random() < 0.25:
                run.cancel()
            for _ in pieces:
                pass
    counts = service.statistics()
    assert counts.accepted > 60
    assert counts.proposed > counts.accepted
    decoder = onnx_decoder(ONNX, {"engine": engine, "threads": 1, "context_length": 1024, **parallel})
    errors = []
    for answer in made:
        decoder.rewind(0, 0)
        for at in range(0, len(answer.prompt), 16):
            last = decoder.step({0: Part(answer.prompt[at : at + 16], 1)})[0][0]
        for row, token in zip(answer.rows, answer.tokens, strict=True):
            errors.append(np.abs(row - last).max() / np.std(last))
            if token is not None:
                last = decoder.step({0: Part([token], 1)})[0][0]
    decoder.close()
    # As shares of the logits' spread. A row behind another token is off by more than all of it.
    assert max(errors) < 0.2
    assert np.median(errors) < 0.02
