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
        """The body. Of an answer with several choices each is encoded by itself.

        `json.dumps` keeps Python's lock until it is done, and log probabilities of many prompts may be 100 MB.
        """
        if not isinstance(content, dict) or len(content.get("choices", ())) < 2:
            return encode(content)
        rest = encode({name: value for name, value in content.items() if name != "choices"})
        choices = b",".join(encode(choice) for choice in content["choices"])
        return rest.removesuffix(b"}") + b',"choices":[' + choices + b"]}"
