"""Who answers: a server with OpenAI's API at an address, `phi3-mlflow serve` or any other."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from phi3_mlflow.runtime.options import Options

from . import texts
from .models import ChatError, Message

KEY = "PHI3_MLFLOW_API_KEY"
_CONNECT = 10.0  # seconds
_MAX_LINE = 4 * 2**20  # bytes of one event
_MAX_BODY = 64 * 2**20  # bytes of an answer that comes as a whole
_OURS = "phi3_mlflow"  # what `phi3-mlflow serve` names as the owner of its models
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Server:
    """One model of a server.

    Args:
        url: its base URL; where it has no path, /v1 is meant.
        name: of the model; None for the only one that the server lists.
        seconds: for which it may say nothing.
        key: its API key; None for the one in the environment.

    Raises:
        ChatError: the address is none, or nobody answers there, or the model has to be named.
    """

    defaults: Options | None = None

    def __init__(self, url: str, name: str | None = None, seconds: float = 300.0, key: str | None = None):
        self._url = _base(url)
        self._seconds = seconds
        self._key = _key() if key is None else key
        headers = {"accept-encoding": "identity"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        try:
            self._client = httpx.Client(
                headers=headers,
                timeout=httpx.Timeout(seconds, connect=min(_CONNECT, seconds)),
                # A connection that was kept may be gone when the next question comes.
                limits=httpx.Limits(max_keepalive_connections=0),
                trust_env=self._url.host not in _LOOPBACK,  # a proxy is asked for what lies outside
            )
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            raise ChatError(f"what the environment says of proxies or certificates is of no use: {error}") from None
        try:
            listed = self._listed(needed=name is None)
        except BaseException:
            self.close()
            raise
        self.drops_oldest = any(each.get("owned_by") == _OURS for each in listed)
        names = _names(listed)
        if name is None:
            if len(names) != 1:
                found = f"it has {', '.join(names)}" if names else "it lists none"
                raise ChatError(f"name a model of the server with --model; {found}")
            name = names[0]
        self.name = name

    @property
    def exposes_key(self) -> bool:
        """Whether the key goes over a network for everybody to read."""
        return bool(self._key) and self._url.scheme == "http" and self._url.host not in _LOOPBACK

    def chunks(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Iterator[Any]:
        """See Model."""
        body = self._body(messages, options) | {"stream": True, "stream_options": {"include_usage": True}}
        ended = False
        with self._asked("POST", "/chat/completions", body) as response:
            # Some servers send their events as text.
            if not response.headers.get("content-type", "").startswith(("text/event-stream", "text/plain")):
                yield _chunk_of(self._read(response))
                return
            for data in _events(response):
                if data == b"[DONE]":
                    return
                chunk = self._parsed(data)
                ended = ended or any(choice.get("finish_reason") for choice in _objects(chunk.get("choices")))
                yield chunk
        if not ended:
            raise ChatError("the server broke the answer off")

    def whole(self, messages: Sequence[Message], options: Mapping[str, Any]) -> dict[str, Any]:
        """See Model."""
        with self._asked("POST", "/chat/completions", self._body(messages, options)) as response:
            return self._read(response)

    def other(self, name: str) -> "Server":
        """See Model."""
        return Server(str(self._url), name, self._seconds, self._key)

    def known(self) -> list[str]:
        """See Model."""
        return _names(self._listed())

    def close(self) -> None:
        """See Model."""
        self._client.close()

    def _listed(self, *, needed: bool = False) -> list[dict[str, Any]]:
        """The server's model objects; none where it keeps no list and none is needed."""
        try:
            with self._asked("GET", "/models") as response:
                return _objects(self._read(response).get("data"))
        except _Refused as error:
            if needed or error.status in (401, 403):
                raise
            return []

    def _body(self, messages: Sequence[Message], options: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.name, "messages": list(messages), **options}

    @contextmanager
    def _asked(self, method: str, path: str, body: Any = None) -> Iterator[httpx.Response]:
        """A good response, not yet read."""
        url = self._url.copy_with(path=self._url.path + path)
        try:
            with self._client.stream(method, url, json=body) as response:
                if not response.is_success:
                    raise self._refusal(response)
                yield response
        except httpx.ConnectTimeout:
            raise ChatError(f"nobody answers at {self._url}") from None
        except httpx.TimeoutException:
            raise ChatError(f"the server said nothing for {self._seconds:g} seconds") from None
        except httpx.ConnectError as error:
            raise ChatError(f"there is no server at {self._url}: {self._line(str(error))}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ChatError(f"the connection to the server broke: {self._line(str(error))}") from None

    def _refusal(self, response: httpx.Response) -> "_Refused":
        said = ""
        try:
            for content in response.iter_text():
                said += content
                if len(said) > _MAX_LINE:
                    break
            said = _message(json.loads(said)) or said
        except (ValueError, RecursionError, httpx.HTTPError):
            pass  # what came so far says more than nothing
        if response.is_redirect:
            said = f"it points to {response.headers.get('location')}; give that address"
        told = f"the server refuses ({response.status_code}): {self._line(said) or response.reason_phrase}"
        if response.status_code == 401 and not self._key:
            told += f" (the environment variable {KEY} may hold a key)"
        after = response.headers.get("retry-after", "")
        if response.status_code in (429, 503) and after.isdigit():
            told += f" (try again in {self._line(after)} s)"
        return _Refused(response.status_code, told)

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        """The JSON object that the response is."""
        content = b""
        for part in response.iter_bytes():
            content += part
            if len(content) > _MAX_BODY:
                raise ChatError(f"the server's answer is longer than {_MAX_BODY} bytes")
        return self._parsed(content)

    def _parsed(self, data: bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(data)
        except (ValueError, RecursionError):
            raise ChatError(f"the server's answer is no JSON: {self._line(repr(data[:60]))}") from None
        if not isinstance(parsed, dict):
            raise ChatError(f"the server's answer is no object: {self._line(repr(data[:60]))}")
        if (said := _message(parsed)) is not None:
            raise ChatError(f"the server failed: {self._line(said)}")
        return parsed

    def _line(self, text: str) -> str:
        """What the server said, without the key that it may have repeated."""
        return texts.line(text.replace(self._key, "***") if self._key else text)


class _Refused(ChatError):
    """An answer with a status that is no success."""

    def __init__(self, status: int, problem: str):
        self.status = status
        super().__init__(problem)


def _base(url: str) -> httpx.URL:
    """The base URL, under which /chat/completions lies."""
    try:
        base = httpx.URL(url)
        if "://" not in url and (here := httpx.URL(f"http://{url}")).host in _LOOPBACK:
            base = here
    except (httpx.InvalidURL, TypeError):
        base = httpx.URL("")
    if base.userinfo:
        raise ChatError(f"the address holds a password; the environment variable {KEY} is the place for a key")
    if base.scheme not in ("http", "https") or not base.host:
        problem = f"{texts.line(url)!r} is no address of a server"
        raise ChatError(f"{problem}: one begins with http:// or https://, such as http://127.0.0.1:8000")
    path = base.path.rstrip("/").removesuffix("/chat/completions")
    return base.copy_with(path=path or "/v1", fragment=None)


def _key() -> str:
    """The key in the environment; empty where there is none."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ChatError(f"the key in the environment variable {KEY} has characters that no key has")
    return key


def _events(response: httpx.Response) -> Iterator[bytes]:
    """The data of server-sent events, one line each (https://html.spec.whatwg.org/multipage/server-sent-events.html).

    Raises:
        ChatError: a line has no end.
    """
    begun = b""
    for content in response.iter_bytes():
        *lines, begun = (begun + content).split(b"\n")
        if len(begun) > _MAX_LINE:
            raise ChatError(f"the server sent a line of more than {_MAX_LINE} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _chunk_of(completion: dict[str, Any]) -> dict[str, Any]:
    """A whole completion in a chunk's shape: some servers cannot stream."""
    choices = [{**choice, "delta": choice.get("message")} for choice in _objects(completion.get("choices"))]
    return {**completion, "choices": choices}


def _objects(value: Any) -> list[dict[str, Any]]:
    """The objects in a list; none where it is no list."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _names(listed: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [each["id"] for each in listed if isinstance(each.get("id"), str)]
    return [name for name in names if name == texts.storable(name)]


def _message(body: Any) -> str | None:
    """The message of an error as servers write them; None where the body is none."""
    if not isinstance(body, dict):
        return None
    error = body.get("error") or body.get("detail")
    if isinstance(error, dict):
        error = error.get("message") or json.dumps(error)
    return None if error is None else str(error)
