"""The models that a server was started with: which one a request means, and which version an alias means.

Knows no HTTP but its errors, and nothing of how models come into memory.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from phi3_mlflow.runtime.errors import Phi3Error, shorten

from .errors import HttpError
from .memory import Memory, Place
from .served import Loaded, Spec, load
from .watch import follow

Objects = list[dict[str, Any]]


class Models:
    """Loads models when they are asked for, keeps the most recently used ones, and follows aliases.

    Args:
        specs: at least one, each with a name of its own.
        max_loaded: how many may be in memory, at least 1; None for all. While an alias is followed to a new version,
            both are.
        parallel: how many requests an ONNX model answers at once; None for what the model says, else 4.
        load_timeout: seconds that a request waits for its model to be loaded.
        watch: whether aliases are followed.
        watch_seconds: between two questions to the registry.
        settings: changes of every model's model_config.

    Raises:
        Phi3Error: there is no model, or two have the same name.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        *,
        max_loaded: int | None = None,
        parallel: int | None = None,
        load_timeout: float = 300.0,
        watch: bool = False,
        watch_seconds: float = 30.0,
        settings: Mapping[str, Any] | None = None,
    ):
        if not specs:
            raise Phi3Error("there is no model to serve: name at least one")
        self._places = {spec.name: Place(spec) for spec in specs}
        if len(self._places) < len(specs):
            names = [spec.name for spec in specs]
            twice = next(name for name in names if names.count(name) > 1)
            raise Phi3Error(f"two models are named {twice!r}: give each a name of its own")
        self._max = max_loaded
        self._memory = Memory(
            list(self._places.values()),
            most=max_loaded,
            load=partial(load, parallel=parallel, settings=settings or {}),
            load_timeout=load_timeout,
        )
        self._watch_seconds = watch_seconds if watch else None
        self._created = int(time.time())
        self._watching: list[asyncio.Task[None]] = []

    def list(self) -> Objects:
        """OpenAI's model objects, in the order in which the models were named."""
        return [
            {
                "id": place.spec.name,
                "object": "model",
                "created": self._created,
                "owned_by": "phi3_mlflow",
                "root": place.spec.root,
                "max_model_len": place.context_length,
                "loaded": place.loaded is not None,
            }
            for place in self._places.values()
        ]

    def find(self, name: str | None) -> Spec:
        """The model that a request means.

        Args:
            name: the served name; or the registered name, with `@ALIAS` or `:VERSION`, or the URI, as the server was
                given them. None for the first model.

        Raises:
            HttpError: 404, the server was given no such model, or several.
        """
        specs = [place.spec for place in self._places.values()]
        if name is None:
            return specs[0]
        if name in self._places:
            return self._places[name].spec
        found = [spec for spec in specs if name in spec.names]
        if len({spec.uri for spec in found}) == 1:
            return found[0]
        problem = "may be any of several models" if found else "is not served here"
        served = ", ".join(spec.name for spec in found or specs)
        raise HttpError(
            404, f"the model {shorten(name)} {problem}; name one of {served}", param="model", code="model_not_found"
        )

    def loaded(self) -> Sequence[Loaded]:
        """The models that take requests now without being loaded first."""
        return [place.loaded for place in self._places.values() if place.loaded is not None]

    def failed(self) -> dict[str, str]:
        """Models that nobody gets an answer from, by their names, and what is the matter with each."""
        return self._memory.failed()

    @asynccontextmanager
    async def lease(self, name: str | None) -> AsyncIterator[Loaded]:
        """A model in memory, which stays there while it is held.

        Args:
            name: see `find`.

        Raises:
            HttpError: 404, see `find`; 503 where it cannot be loaded, or not in time, or the server is ending.
        """
        loaded = await self._memory.take(self._places[self.find(name).name])
        try:
            yield loaded
        finally:
            self._memory.give_back(loaded)

    async def start(self, preload: bool) -> None:
        """Begins to follow aliases.

        Args:
            preload: whether to load first as many models as may stay.

        Raises:
            HttpError: one of them cannot be loaded, or not in time.
        """
        for place in list(self._places.values())[: self._max] if preload else ():
            self._memory.give_back(await self._memory.take(place))
        if self._watch_seconds is None:
            return
        for place in self._places.values():
            if place.spec.follows_alias:
                self._watching.append(
                    asyncio.create_task(
                        follow(
                            place.spec.name,
                            place.spec.uri,
                            seconds=self._watch_seconds,
                            present=partial(_version, place),
                            change=partial(self._memory.change, place),
                        )
                    )
                )

    async def close(self, seconds: float) -> None:
        """Refuses requests, waits for those under way, and closes every model. Loads under way are abandoned.

        Args:
            seconds: to wait; then what is still under way is ended. A second call can only shorten that.
        """
        for task in self._watching:
            task.cancel()
        await self._memory.close(seconds)


def _version(place: Place) -> str | None:
    """What of a registered model is in memory."""
    return None if place.loaded is None else place.loaded.version
