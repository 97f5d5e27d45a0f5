"""A logged model that is measured: loading it, and requests whose answers have exactly the length that was asked for.

Prompts are random digits, so that none begins like another one, and answers are digits too: a bias on the logits
forbids the control tokens, which end an answer or show nothing. So each token of an answer is text, and the first and
the last chunk with text are those of the first and the last token. MLflow's schema for completions has no place for a
bias; there a regex does the same, and the time that its masks take is part of what is measured.
"""

import json
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PyFuncModel

from phi3_mlflow.logged import given_or_embedded
from phi3_mlflow.machine import resident
from phi3_mlflow.runtime import mlmodel, snapshots
from phi3_mlflow.runtime.errors import InvalidRequest, Phi3Error
from phi3_mlflow.runtime.tokens import Tokens

_OVERRIDES = "MLFLOW_PYFUNC_INFERENCE_CONFIG"
_BIAS = 100  # the most that the contract allows


@dataclass(frozen=True)
class Subject:
    """A loaded model and what its files say."""

    model: PyFuncModel
    config: Mapping[str, Any]  # the model_config
    builder: str  # `onnx` or `transformers`
    tokens: Tokens
    context_length: int

    @property
    def task(self) -> str:
        """One of the two tasks that are measured."""
        return self.config["task"]

    def overhead(self) -> int:
        """Tokens of a prompt that are not its text: the template's."""
        if self.task == "llm/v1/chat" or self.config["template"]:
            return len(self.tokens.encode_chat([{"role": "user", "content": "0" * 64}])) - 64
        return len(self.tokens.encode_text("0" * 64)) - 64


@contextmanager
def subject(model_uri: str | None, parallel: int | None = None) -> Iterator[tuple[Subject, dict[str, int | None]]]:
    """A model, loaded for a block.

    Args:
        model_uri: what MLflow loads; None for the embedded ONNX model.
        parallel: takes the place of the model's own setting.

    Yields:
        The model, and how much memory the process used before and after loading it.

    Raises:
        Phi3Error: it is not a model of this toolkit, or one whose answers cannot be counted.
        InvalidRequest: the model cannot do `parallel`.
    """
    with given_or_embedded(model_uri) as uri:
        folder = Path(mlflow.artifacts.download_artifacts(uri))
        logged = mlmodel.load(folder)
        task = (logged.metadata or {}).get("task")
        if task is None:
            raise Phi3Error(f"{uri} was not logged by phi3_mlflow, and nothing else can be measured")
        if task not in ("llm/v1/chat", "llm/v1/completions"):
            raise Phi3Error(
                f"{uri} is a model for the task {task}; a measurement needs one for llm/v1/chat or llm/v1/completions"
                + (": the flat task's answers have no token counts" if task == "flat" else "")
            )
        flavor = logged.flavors["python_function"]
        # All requests of a measurement wait as long as they have to. Answers that may not end by themselves go round in
        # circles, which proposals would make fast.
        apart = {"queue_limit": 2**20, "queue_timeout": None, "speculation": "off"}
        config = {**flavor["config"], **_from_environment(), **apart}
        if parallel is not None:
            config["parallel"] = parallel
        before = resident()
        model = mlflow.pyfunc.load_model(str(folder), suppress_warnings=True, model_config=config)
        memory = {"before_loading_bytes": before, "after_loading_bytes": resident()}
        place = snapshots.place(folder, logged.flavors, logged.metadata or {})
        weights = place.find()
        builder, tokenizer = place.form, place.tokenizer(weights)
        if builder == "transformers":
            config_file = place.configuration(weights) / "config.json"
            own = json.loads(config_file.read_text("utf-8"))["max_position_embeddings"]
        else:
            own = json.loads((weights / "genai_config.json").read_text("utf-8"))["model"]["context_length"]
        context = min(config.get("context_length") or own, own)
        tokens = Tokens.from_folder(tokenizer, template=config["template"])
        yield Subject(model, config, builder, tokens, context), memory


def _from_environment() -> dict[str, Any]:
    """The settings that MLflow takes from the environment, and which an argument of load_model would overrule."""
    try:
        return dict(json.loads(os.environ.get(_OVERRIDES) or "{}"))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(_OVERRIDES, f"is not a JSON object: {error}") from error


@dataclass(frozen=True)
class Answer:
    """One streamed answer: when it was asked for, when its first and last text came (seconds), and what it says."""

    start: float
    first: float
    end: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    engine: str | None

    @property
    def first_token_ms(self) -> float:
        """From the call to the first chunk."""
        return (self.first - self.start) * 1000

    @property
    def per_token_ms(self) -> float | None:
        """The mean for the tokens after the first; None where there are none."""
        rest = self.completion_tokens - 1
        return (self.end - self.first) * 1000 / rest if rest else None


class Requests:
    """Asks a model, from as many threads as requests.

    Args:
        subject: the model.
        advance: is told of each answer, and of 0 where none comes for a second.
    """

    def __init__(self, subject: Subject, advance: Callable[[int], Any] = lambda _: None):
        self._model = subject.model
        self._chat = subject.task == "llm/v1/chat"
        self._advance = advance
        self._random = random.Random(0)
        self._stopped = threading.Event()
        digits = [subject.tokens.encode_text(digit)[-1] for digit in "0123456789"]
        control = dict.fromkeys(subject.tokens.control.values(), -_BIAS)
        self._bias = {str(token): bias for token, bias in (control | dict.fromkeys(digits, _BIAS)).items()}
        self._params: dict[str, Any] = {"repetition_guard": False, "self_talk_guard": False, "max_time": 1e6}
        # Models that were logged before there was this option do not say.
        signature = subject.model.metadata.signature
        if "show_engine" in {param.name for param in signature.params or ()}:
            self._params["show_engine"] = True

    def digits(self, count: int) -> str:
        """Text of so many tokens."""
        return "".join(self._random.choices("0123456789", k=count))

    def together(self, prompts: Sequence[str], tokens: int, spread: float = 0.0) -> list[Answer]:
        """Answers to requests that arrive within some seconds of each other.

        Raises:
            Phi3Error: an answer is not as long as it was asked to be.
        """
        results: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

        def work(prompt: str, delay: float) -> None:
            try:
                time.sleep(delay)
                results.put(self._ask(prompt, tokens))
            except Exception as error:
                results.put(error)

        threads = [
            threading.Thread(target=work, args=(prompt, spread * self._random.random()), daemon=True)
            for prompt in prompts
        ]
        answers: list[Answer] = []
        try:
            for thread in threads:
                thread.start()
            while len(answers) < len(threads):
                try:
                    result = results.get(timeout=1)
                except queue.Empty:
                    self._advance(0)
                    continue
                if isinstance(result, Exception):
                    raise result
                answers.append(result)
                self._advance(1)
        except BaseException:
            self._abandon({thread.ident for thread in threads})
            raise
        return answers

    def _ask(self, prompt: str, tokens: int) -> Answer:
        body: dict[str, Any] = {"n": 1, "max_tokens": tokens}
        params = self._params
        if self._chat:
            body |= {"messages": [{"role": "user", "content": prompt}], "custom_inputs": {"logit_bias": self._bias}}
        else:
            body["prompt"] = prompt
            params = {**params, "response_format": {"type": "regex", "regex": f"[0-9]{{{tokens}}}"}}
        arrivals = []
        last: Mapping[str, Any] = {}
        start = time.perf_counter()
        chunks: Iterator[Any] = self._model.predict_stream(body, params=params)
        for last in chunks:
            choice = last["choices"][0]
            if choice["delta"].get("content") if self._chat else choice["text"]:
                arrivals.append(time.perf_counter())
            if self._stopped.is_set():
                break
        else:
            return _checked(start, arrivals, last, tokens)
        chunks.close()  # type: ignore[attr-defined]
        raise Phi3Error("the measurement was broken off")

    def _abandon(self, threads: set[int | None]) -> None:
        """Lets threads end by themselves, each with its next chunk, without waiting for them."""
        self._stopped.set()
        # When the process ends before they do, the runtime would report an error for each of them.
        logger = logging.getLogger("phi3_mlflow.runtime.model")
        logger.addFilter(lambda record: record.thread not in threads)


def _checked(start: float, arrivals: Sequence[float], last: Mapping[str, Any], tokens: int) -> Answer:
    usage, custom = last["usage"], last.get("custom_outputs", {})
    if usage["completion_tokens"] != tokens or not arrivals:
        raise Phi3Error(
            f"an answer ended ({', '.join(custom.get('stop_reason', []))}) after {usage['completion_tokens']} tokens "
            f"and should have {tokens}; a default that the model was logged with may be the reason"
        )
    cached = custom.get("cached_tokens", 0)
    return Answer(start, arrivals[0], arrivals[-1], usage["prompt_tokens"], tokens, cached, custom.get("engine"))
