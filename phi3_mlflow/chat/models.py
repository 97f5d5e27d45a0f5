"""Who answers: a model that is loaded here. A conversation sees of it, and of a server, a stream of OpenAI's chunks."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from phi3_mlflow.runtime.errors import Phi3Error
from phi3_mlflow.runtime.options import Options
from phi3_mlflow.runtime.settings import default_options

from . import texts

Message = dict[str, str]
EMBEDDED = "embedded"


class ChatError(Phi3Error):
    """Why there is no answer, or no whole one."""


class Model(Protocol):
    """Answers chats.

    Attributes:
        name: as the user gave it.
        drops_oldest: whether it knows `context_overflow`.
        defaults: its own options; None where they are not known.
    """

    name: str
    drops_oldest: bool
    defaults: Options | None

    def chunks(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Iterator[Any]:
        """An answer as chat.completion.chunk objects, as they come. Closing the iterator ends the work.

        Raises:
            ChatError: there is no answer, or it was broken off.
        """

    def whole(self, messages: Sequence[Message], options: Mapping[str, Any]) -> dict[str, Any]:
        """The whole completion object; raises as `chunks`."""

    def other(self, name: str) -> "Model":
        """Another model of the same kind, by its URI or its name.

        Raises:
            ChatError: there is none.
        """

    def known(self) -> list[str]:
        """The names that `other` may be given, where they can be told."""

    def close(self) -> None:
        """Frees what it holds."""


class Logged:
    """A logged model, loaded with mlflow.pyfunc.

    Args:
        uri: of MLflow, or a folder; None (or `embedded`) for the embedded ONNX model.

    Raises:
        Exception: it cannot be loaded: MLflow's, its database's, the runtime's.
    """

    drops_oldest = True

    def __init__(self, uri: str | None):
        from phi3_mlflow.logged import given_or_embedded, load

        self.name = uri or EMBEDDED
        with ExitStack() as stack:
            given = stack.enter_context(given_or_embedded(None if uri == EMBEDDED else uri))
            self._model: Any = stack.enter_context(load(given))
            self._stack = stack.pop_all()
        self.defaults: Options | None = default_options(self._model.model_config or {})

    def chunks(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Iterator[Any]:
        """See Model."""
        body, params = self._split(messages, options)
        try:
            yield from self._model.predict_stream(body, params=params)
        except Exception as error:
            raise _told(error) from error

    def whole(self, messages: Sequence[Message], options: Mapping[str, Any]) -> dict[str, Any]:
        """See Model."""
        body, params = self._split(messages, options)
        try:
            completions: Any = self._model.predict(body, params=params)
        except Exception as error:
            raise _told(error) from error
        return completions[0]

    def other(self, name: str) -> "Logged":
        """See Model."""
        try:
            return Logged(name)
        except Exception as error:  # of MLflow, of its database, of whatever the model is made for
            raise _told(error) from error

    def known(self) -> list[str]:
        """See Model."""
        return []

    def close(self) -> None:
        """See Model."""
        self._model = None
        gc.collect()  # the weights go with the last reference to the model
        self._stack.close()

    def _split(self, messages: Sequence[Message], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """In Python MLflow takes what its chat schema lacks as params."""
        columns = set(self._model.metadata.get_input_schema().input_names())
        params = dict(options)
        body: dict[str, Any] = {"messages": list(messages)}
        if stop := params.pop("stop", None):
            body["stop"] = list(stop)
        if bias := params.pop("logit_bias", None):
            body["custom_inputs"] = {"logit_bias": {str(token): value for token, value in bias.items()}}
        body |= {name: params.pop(name) for name in columns & params.keys()}
        return body, params


def _told(error: Exception) -> ChatError:
    """The error in one line."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return ChatError(texts.line(error.message))
    return ChatError(texts.line(str(error) if isinstance(error, (Phi3Error, OSError)) else repr(error)))
