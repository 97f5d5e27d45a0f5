"""The errors a user sees. Every message says what was wrong, with the value, and what to do next."""


class Phi3Error(Exception):
    """Base of every error that is meant for a person: its text is shown as one line, without a traceback."""


class InvalidRequest(Phi3Error):
    """A request that cannot be answered as it stands.

    Args:
        field: the request's field at fault, as the caller wrote it, for example `messages[2].content`.
        problem: what is wrong with it, with the value, and what is allowed.
    """

    def __init__(self, field: str, problem: str):
        super().__init__(f"`{field}` {problem}")
        self.field = field


class WeightsError(Phi3Error):
    """Weights that are missing, incomplete, damaged or of the wrong kind."""


class FormatError(Phi3Error):
    """A logged model whose format this runtime cannot read."""


def shorten(value: object, limit: int = 60) -> str:
    """The value as an error message shows it: its repr, cut to `limit` characters."""
    text = repr(value[: limit + 1]) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
