"""JSON as it goes over the wire: values in, bytes out. Knows nothing of what they mean."""

import json
from typing import Any

from starlette.responses import JSONResponse


def encode(value: Any) -> bytes:
    """A value as UTF-8. Lone surrogates, which JSON lets a client send and UTF-8 does not have, become question marks.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


class JsonResponse(JSONResponse):
    """Starlette's response, by `encode`."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return encode(content)
