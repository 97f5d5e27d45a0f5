"""A span for what a model answers, below the trace that is active where it is asked; nothing where none is."""

from typing import Any, Self

import mlflow
from mlflow.entities import SpanType

from .answers import Answer


class Span:
    """A context in which a model answers somebody whose trace may be active.

    Args:
        name: the model's, as responses name it.
        model_id: of its LoggedModel, whose page then shows the trace; None where it has none.
        inputs: what was asked.

    Attributes:
        outputs: what was answered.
    """

    def __init__(self, name: str, model_id: str | None, inputs: Any):
        self.outputs: Any = None
        self._answers: list[Answer] = []
        self._span = None
        parent = mlflow.get_current_active_span()
        if parent is None:
            return
        self._span = mlflow.start_span_no_context(
            "phi3_mlflow",
            span_type=SpanType.CHAT_MODEL,
            parent_span=parent,
            inputs=inputs,
            attributes={"mlflow.llm.model": name, "mlflow.llm.provider": "phi3_mlflow"},
        )
        # Without it MLflow looks for the price of a model of that name, in the network.
        cost = dict.fromkeys(("input_cost", "output_cost", "total_cost"), 0.0)
        self._span.set_attribute("mlflow.llm.cost", cost)
        if model_id is not None:
            mlflow.update_current_trace(model_id=model_id)

    def answered(self, answer: Any) -> None:
        """Counts an answer's tokens; whatever else stands in its place is left out."""
        if isinstance(answer, Answer):
            self._answers.append(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self._span is None:
            return
        prompt = sum(answer.prompt_tokens for answer in self._answers)
        completion = sum(choice.tokens for answer in self._answers for choice in answer.choices)
        usage = {"input_tokens": prompt, "output_tokens": completion, "total_tokens": prompt + completion}
        usage["cache_read_input_tokens"] = sum(answer.cached_tokens for answer in self._answers)
        self._span.set_attribute("mlflow.chat.tokenUsage", usage)
        if isinstance(error, Exception):
            self._span.record_exception(error)
        self._span.end(outputs=self.outputs)
