"""What the server says of itself to whoever watches over it: whether it lives, and whether it takes requests."""

from collections.abc import Mapping

from starlette.responses import Response

from .errors import HttpError
from .models import Models
from .wire import JsonResponse

_UNASKED = "has no model in memory yet: each is loaded at its first request, or at the start with --preload"


def health(models: Models) -> Response:
    """Alive, as long as one of the models is not known to have failed: its requests are worth that the process lives.

    Raises:
        HttpError: 503, every model has failed.
    """
    failed = models.failed()
    if failed and len(failed) == len(models.list()):
        raise HttpError(503, _told(failed), kind="server_error", code="unavailable")
    return _well(failed)


def ready(models: Models, *, starting: bool, draining: bool) -> Response:
    """Ready, where a model is loaded and its queue has room.

    Args:
        models: all that are served.
        starting: whether models are still loaded that were to be before the first request.
        draining: whether the server is ending.

    Raises:
        HttpError: 503 with the reason.
    """
    failed = models.failed()
    state = [loaded.service.statistics() for loaded in models.loaded()]
    if draining or starting or not any(each.has_room for each in state):
        if draining:
            problem = "is ending"
        elif starting:
            problem = "is loading its models"
        elif state:
            problem = "has no model with room in its queue"
        else:
            problem = "has no model in memory" if failed else _UNASKED
        told = f"the server {problem}{f': {_told(failed)}' if failed else ''}"
        raise HttpError(503, told, kind="server_error", code="unavailable", retry_after=5)
    return _well(failed)


def _told(failed: Mapping[str, str]) -> str:
    """Models that have failed, in one line."""
    return "; ".join(f"the model `{name}` {problem}" for name, problem in failed.items())


def _well(failed: Mapping[str, str]) -> Response:
    """What MLflow's server says where all is well; and which models are not."""
    return JsonResponse({"failed": failed}) if failed else Response("\n", media_type="application/json")
