"""How fast a logged model is on this machine, measured from the outside: through predict_stream, in this process.

Times begin with the call of predict_stream and end with the arrival of a chunk, so they hold all that a caller in
Python waits for: MLflow's checks, the queue, prefill, sampling. HTTP is not in them. Tokens are those that `usage`
counts. The time per token is an answer's mean, from the first chunk to the last: a small model's chunks reach the
caller's thread in bursts, so that single gaps say little.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import mlflow
from tqdm import tqdm

from phi3_mlflow import tracking
from phi3_mlflow.bench.report import figure, log_run
from phi3_mlflow.bench.requests import Answer, Requests, Subject, subject
from phi3_mlflow.machine import forget_peak, machine, peak
from phi3_mlflow.runtime.errors import InvalidRequest, Phi3Error, shorten
from phi3_mlflow.unfinished import Unfinished

_NEW = 16  # tokens behind the shared part of a prompt
_LEAST_DIGITS = 8  # of a prompt; fewer would soon repeat
# Requests that belong together arrive within this share of the time that one takes alone.
_SPREAD = 0.1
_PREFIX_CASES = ("unseen", "seen")
# By engine, or where that is not known by builder.
_PACKAGES = {
    "onnx": ("onnxruntime", "onnxruntime-genai"),
    "onnxruntime-genai": ("onnxruntime", "onnxruntime-genai"),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "transformers": ("torch", "transformers"),
}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        prompt_tokens: of each prompt, chat template included.
        tokens: of each answer.
        concurrency: numbers of requests at once, ascending; 1 is always measured.
        rounds: how often everything is measured.
        prefix: tokens that the two prompts of the prefix measurement share, beside the template's.
    """

    prompt_tokens: int = 128
    tokens: int = 64
    concurrency: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 3
    prefix: int = 400


def parse_concurrency(text: str) -> tuple[int, ...]:
    """Numbers from text such as "1,2,4,8", ascending, with 1 among them.

    Raises:
        InvalidRequest: the text is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 1024 for part in parts):
        problem = f'is {shorten(text)}; it must be numbers from 1 to 1024 with commas between them, such as "1,2,4,8"'
        raise InvalidRequest("--concurrency", problem)
    return tuple(sorted({1, *map(int, parts)}))


def check(plan: Plan, subject: Subject) -> None:
    """Checks that the prompts and answers fit the model.

    Raises:
        InvalidRequest: names the option.
    """
    overhead, context = subject.overhead(), subject.context_length
    holds = f"the model's context holds {context} tokens"
    if plan.prompt_tokens < overhead + _LEAST_DIGITS:
        problem = f"is {plan.prompt_tokens}; it must be at least {overhead + _LEAST_DIGITS}, since the template alone "
        raise InvalidRequest("--prompt-tokens", f"{problem}takes {overhead}")
    if plan.prompt_tokens >= context:
        raise InvalidRequest("--prompt-tokens", f"is {plan.prompt_tokens}, and {holds}, the answer included")
    if plan.prompt_tokens + plan.tokens > context:
        room = context - plan.prompt_tokens
        raise InvalidRequest("--tokens", f"is {plan.tokens}, and {holds}: the prompt leaves room for {room}")
    if overhead + plan.prefix + _NEW >= context:
        most = context - overhead - _NEW - 1
        raise InvalidRequest("--prefix", f"is {plan.prefix}, and {holds}: it must be at most {most}")


def measure(subject: Subject, plan: Plan, advance: Callable[[int], Any] = lambda _: None) -> dict[str, Any]:
    """Measures a model. Each round goes through all cases, so that a busy machine spoils all of them alike.

    Args:
        subject: the model.
        plan: what to measure; it was checked.
        advance: is told of each answer, and of 0 where none comes for a second.

    Returns:
        `concurrency`: a list with, for each number of `requests` at once, `tokens_per_second` (of all answers
        together, from the first request's start to the last token; median of the rounds), `first_token_ms` (median)
        and `first_token_worst_ms` of all requests, `per_token_ms` (median of the answers' means; None
        for answers of one token), `prompt_tokens` of each prompt and `completion_tokens` of all answers of all rounds.

        `prefix`: for a prompt of `prompt_tokens`, `unseen` and then `seen` up to its last tokens, `first_token_ms`
        and `cached_tokens` (medians).

        `engine`: what computed the answers; None where the model does not say.
    """
    overhead = subject.overhead()
    requests = Requests(subject, advance)
    Requests(subject).together([requests.digits(_NEW)], min(plan.tokens, 8))  # what is only done once, is done now
    groups: dict[int, list[list[Answer]]] = defaultdict(list)
    prefixes: dict[str, list[Answer]] = {name: [] for name in _PREFIX_CASES}
    spread = 0.0
    for _ in range(plan.rounds):
        for count in plan.concurrency:
            prompts = [requests.digits(plan.prompt_tokens - overhead) for _ in range(count)]
            answers = requests.together(prompts, plan.tokens, spread)
            groups[count].append(answers)
            if count == 1:
                spread = _SPREAD * (answers[0].end - answers[0].start)
        shared = requests.digits(plan.prefix)
        for group in prefixes.values():
            group += requests.together([shared + requests.digits(_NEW)], 1)
    return {
        "engine": prefixes["seen"][0].engine,
        "concurrency": [_row(count, rounds) for count, rounds in groups.items()],
        "prefix": {
            "prompt_tokens": prefixes["unseen"][0].prompt_tokens,
            **{
                name: {
                    "first_token_ms": median(answer.first_token_ms for answer in group),
                    "cached_tokens": median(answer.cached_tokens for answer in group),
                }
                for name, group in prefixes.items()
            },
        },
    }


def _row(count: int, rounds: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    answers = [answer for group in rounds for answer in group]
    paces = [answer.per_token_ms for answer in answers if answer.per_token_ms is not None]
    firsts = [answer.first_token_ms for answer in answers]
    return {
        "requests": count,
        "tokens_per_second": median(_rate(group) for group in rounds),
        "first_token_ms": median(firsts),
        "first_token_worst_ms": max(firsts),
        "per_token_ms": median(paces) if paces else None,
        "prompt_tokens": answers[0].prompt_tokens,
        "completion_tokens": sum(answer.completion_tokens for answer in answers),
    }


def _rate(answers: Sequence[Answer]) -> float:
    seconds = max(answer.end for answer in answers) - min(answer.start for answer in answers)
    return sum(answer.completion_tokens for answer in answers) / seconds


def _check_plot(plot: Path) -> None:
    """Finds out before the measurement whether the file can be written."""
    if plot.suffix.lower() != ".png" or not plot.absolute().parent.is_dir():
        problem = f"is {str(plot)!r}; it must be a file that ends in .png, in a folder that exists"
        raise InvalidRequest("--plot", problem)
    try:
        existed = plot.exists()
        plot.open("ab").close()
        if not existed:
            plot.unlink()
    except OSError as error:
        problem = f"--plot: {plot} cannot be written ({error.strerror}); name a file in a folder that can"
        raise Phi3Error(problem) from error


def run(
    model_uri: str | None, plan: Plan, *, parallel: int | None = None, plot: Path | None = None, log: bool = False
) -> dict[str, Any]:
    """Loads a model and measures it, with a progress bar on stderr.

    Args:
        model_uri: what MLflow loads; None for the embedded ONNX model.
        plan: what to measure.
        parallel: takes the place of the model's own setting.
        plot: a PNG file to write.
        log: make an MLflow run of it, linked with the logged model where the tracking store has it.

    Returns:
        What `measure` gives, with `model`, `machine`, `versions`, `settings`, `memory` and, if it was logged,
        `run_id`. `memory` is what the whole process holds, in bytes: before loading (but with MLflow imported), after
        loading, and at most while it answered; None where this system does not tell. Memory of a GPU is not in it.

    Raises:
        InvalidRequest: a size does not fit the model, or the model cannot do `parallel`.
        Unfinished: the numbers could not be logged, or the plot not be written; has the result.
        Phi3Error: the model cannot be measured.
    """
    if plot is not None:
        _check_plot(plot)
    if log:
        # A store that cannot be reached should not cost the numbers, nor the client's own memory be the model's.
        tracking.check()
    result: dict[str, Any] | None = None
    try:
        with ExitStack() as stack:
            found, memory = stack.enter_context(subject(model_uri, parallel))
            check(plan, found)
            # With a tracking server, MLflow prints the run's address on stdout.
            stack.enter_context(redirect_stdout(sys.stderr))
            stack.enter_context(tracking.impatient())
            run_name = f"bench {found.config['name']}"
            active = stack.enter_context(mlflow.start_run(run_name=run_name)) if log else None
            result = _result(found, plan, model_uri or "embedded", memory)
            if active is not None:
                model_id = found.model.model_id
                log_run(result, model_id if tracking.known(model_id) else None)
                result["run_id"] = active.info.run_id
    except Exception as error:
        if result is None:
            raise
        # Where the store is gone, the run cannot be ended either, and that says less.
        raise Unfinished("what was measured is not in MLflow: ", error, result) from error
    if plot is not None:
        try:
            figure(result).savefig(plot)
        except Exception as error:
            plot.unlink(missing_ok=True)
            raise Unfinished(f"the plot {plot} could not be written: ", error, result) from error
    return result


def _result(found: Subject, plan: Plan, uri: str, memory: Mapping[str, int | None]) -> dict[str, Any]:
    """What `run` returns, measured."""
    forget_peak()
    total = plan.rounds * (sum(plan.concurrency) + len(_PREFIX_CASES))
    with tqdm(total=total, desc="bench", unit=" answers", delay=2, mininterval=1, leave=False) as bar:
        measured = measure(found, plan, bar.update)
    engine = measured.pop("engine")
    return {
        "model": {
            "uri": uri,
            "name": found.config["name"],
            "task": found.task,
            "builder": found.builder,
            "engine": engine,
            "parallel": int(found.config.get("parallel") or 1),
            "context_length": found.context_length,
            "threads": found.config.get("threads"),
            "prefix_reuse": found.config.get("prefix_reuse") or "exact",
            "kv_budget": found.config.get("kv_budget"),
        },
        "machine": machine(),
        "versions": {package: version(package) for package in _PACKAGES[engine or found.builder]},
        "settings": {**asdict(plan), "concurrency": ",".join(map(str, plan.concurrency))},
        **measured,
        "memory": {**memory, "peak_bytes": peak()},
    }
