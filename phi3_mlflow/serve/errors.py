"""Errors as the OpenAI reference has them: `{"error": {"message", "type", "param", "code"}}` and a status."""

from typing import Any

from starlette.requests import Request

from phi3_mlflow.runtime.errors import Busy, InvalidRequest, Phi3Error, Unavailable, shorten

from .wire import JsonResponse


class HttpError(Phi3Error):
    """An error that a client is told.

    Args:
        status: of HTTP.
        message: what was wrong, with the value, and what to do.
        kind: OpenAI's `type`.
        param: the request's field at fault.
        code: OpenAI's `code`, for programs.
        retry_after: seconds after which a new attempt may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after
        super().__init__(message)

    @property
    def body(self) -> dict[str, Any]:
        """The envelope."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JsonResponse:
        """The whole answer."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JsonResponse(self.body, self.status, headers)


def http_error(error: Exception) -> HttpError:
    """What a client is told of an error; of one that is nobody's fault but ours, only that it happened."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, InvalidRequest):
        return HttpError(400, str(error), param=error.field, code="invalid_value")
    if isinstance(error, Busy):
        return HttpError(
            429, str(error), kind="rate_limit_error", code="rate_limit_exceeded", retry_after=error.seconds
        )
    if isinstance(error, Unavailable):
        return HttpError(503, str(error), kind="server_error", code="unavailable", retry_after=5)
    message = "the model failed while it answered; the server's log says why"
    return HttpError(500, message, kind="server_error", code="internal_error")


async def not_found(request: Request, error: Exception) -> JsonResponse:
    """What is told where there is no route."""
    return HttpError(404, f"there is nothing at {shorten(request.url.path)}", code="not_found").response()


async def not_allowed(request: Request, error: Exception) -> JsonResponse:
    """What is told where a route takes another method."""
    problem = f"{request.method} is not taken at {shorten(request.url.path)}"
    response = HttpError(405, problem, code="method_not_allowed").response()
    response.headers.update(getattr(error, "headers", None) or {})  # which methods are
    return response
