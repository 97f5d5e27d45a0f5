"""The chat page: the files in `page/`, and the headers that keep a browser from loading anything else.

Knows nothing of models or of the routes that the page's script calls.
"""

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

_FOLDER = Path(__file__).parent / "page"
# By name rather than from the system's table: a script of another type is not run.
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "font-src 'none'",
        "frame-src 'none'",
        "media-src 'none'",
        "object-src 'none'",
        "worker-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # The page never makes HTML from a string; with these the browser refuses to.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Else a browser looks up the hosts that an answer's links name, before anybody follows one.
    "X-DNS-Prefetch-Control": "off",
    # Kept, and asked for again each time: a newer version shows at once, an unchanged file costs a 304.
    "Cache-Control": "no-cache",
}


def routes() -> list[BaseRoute]:
    """The page at `/` and what it loads below `/page/`, read once into memory (about 100 KB)."""
    files = [path for path in sorted(_FOLDER.rglob("*")) if path.suffix in _TYPES]
    return [_route(path) for path in files]


def _route(path: Path) -> Route:
    content = path.read_bytes()
    headers = {**_HEADERS, "Content-Type": _TYPES[path.suffix], "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def answer(request: Request) -> Response:
        if headers["ETag"] in request.headers.get("If-None-Match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    name = path.relative_to(_FOLDER).as_posix()
    return Route("/" if name == "index.html" else f"/page/{name}", answer, methods=["GET"])
