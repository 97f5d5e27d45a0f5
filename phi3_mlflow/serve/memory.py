"""Which models are in memory: loads, leases, and who makes room for whom.

Knows no names but the served ones, no HTTP but its errors, and no registry. Everything here happens in the event
loop; what blocks is in threads.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from phi3_mlflow.runtime.errors import Phi3Error, without_passwords

from .causes import logged, told
from .errors import HttpError
from .folders import Folder
from .served import Loaded, Spec
from .threads import in_thread

_logger = logging.getLogger(__name__)

# Seconds between two attempts to load a model that cannot be loaded, or that ends whenever it is asked something: twice
# as long after each further failure, up to the last number.
RETRY_AFTER, MOST_RETRY_AFTER = 5.0, 300.0
# Seconds that a model has to go on for until its earlier failures are forgotten.
STEADY = 60.0
# Seconds after which a client may ask again where nobody knows how long it will take.
_LATER = 10
# Seconds for which a load waits for a model that nobody uses. Then the one that was not used for the longest time
# takes no more requests, for others would wait for ever beside one that is always in use.
FAIR = 5.0
# Seconds that a new version has to answer its example.
ANSWER_SECONDS = 60.0
# Seconds that `close` waits for decoders to come back.
_CLOSING = 10.0


@dataclass(eq=False)
class Place:
    """What is known of one served model.

    Attributes:
        spec: what was asked for.
        loaded: the one that takes requests.
        waiters: requests that wait for it; each is given a lease.
        loading: the load under way.
        began: when that was asked for, on time.monotonic()'s clock.
        claimed: whether that takes memory already.
        changing: whether another version is being loaded beside it.
        since: when `loaded` was, on time.monotonic()'s clock.
        failures: how often in a row it could not be loaded, or ended soon after.
        failure: what was the matter the last time, for clients; None where it was loaded since.
        again: when it may be loaded again, on time.monotonic()'s clock.
        folder: where it was loaded from.
        context_length: tokens; None until it is known.
    """

    spec: Spec
    loaded: Loaded | None = None
    waiters: "list[asyncio.Future[Loaded]]" = field(default_factory=list)
    loading: "asyncio.Task[None] | None" = None
    began: float = 0.0
    claimed: bool = False
    changing: bool = False
    since: float = 0.0
    failures: int = 0
    failure: str | None = None
    again: float = -math.inf
    folder: Folder | None = None
    context_length: int | None = None


class Memory:
    """Loads models when they are asked for, and keeps the most recently used ones.

    Args:
        places: one for each served model.
        most: how many may be in memory, at least 1; None for all.
        load: served.load with the server's settings; called in threads.
        load_timeout: seconds that a request waits for its model to be loaded.
    """

    def __init__(self, places: Sequence[Place], *, most: int | None, load: Callable[..., Loaded], load_timeout: float):
        self._places = places
        self._most = math.inf if most is None else most
        self._load = load
        self._load_timeout = load_timeout
        # Those that take no requests any more and are not closed yet.
        self._leaving: set[Loaded] = set()
        # Set when a model was loaded, given back or closed.
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._end: float | None = None  # when `close` stops waiting, on time.monotonic()'s clock

    async def take(self, place: Place) -> Loaded:
        """A model with one more lease, loaded where needed; `give_back` ends the lease.

        Raises:
            HttpError: 503 where it cannot be loaded, or not in time, or the server is ending.
        """
        if self._end is not None:
            raise _ending()
        if place.loaded is not None:
            if time.monotonic() >= place.since + STEADY:
                place.failures = 0
            if place.loaded.service.statistics().alive:
                return self._lend(place.loaded)
            self._bury(place)
        if place.loading is None:
            if time.monotonic() < place.again:
                raise _failed(place)
            place.began = time.monotonic()
            place.loading = self._spawn(self._bring(place))
        waiter: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()
        place.waiters.append(waiter)
        taken = False
        try:
            await asyncio.wait({waiter}, timeout=max(0.0, place.began + self._load_timeout - time.monotonic()))
            if not waiter.done():
                raise self._late(place)
            loaded = waiter.result()
            taken = True
            return loaded
        finally:
            if waiter in place.waiters:
                place.waiters.remove(waiter)
            if waiter.done() and waiter.exception() is None and not taken:
                self.give_back(waiter.result())
            if not place.waiters and not place.claimed and place.loading is not None:
                place.loading.cancel()  # it waits for memory, and nobody waits for it
                place.loading = None

    def failed(self) -> dict[str, str]:
        """Models that nobody gets an answer from, by their names, and what is the matter with each."""
        found = {}
        for place in self._places:
            if place.loaded is not None and not place.loaded.service.statistics().alive:
                found[place.spec.name] = "has ended and is loaded again at the next request"
            elif place.loaded is None and place.loading is None and place.failure is not None:
                found[place.spec.name] = f"{place.failure}; {_again(place)}"
        return found

    def give_back(self, loaded: Loaded) -> None:
        """Ends a lease."""
        loaded.leases -= 1
        loaded.used = time.monotonic()
        if not loaded.leases and loaded in self._leaving:
            self._spawn(self._close(loaded))
        self._changed.set()

    async def change(self, place: Place) -> None:
        """Loads what the alias means now beside what is there, has it answer a question, and lets it take over.

        Returns when the earlier one is closed, so that no third one is begun.

        Raises:
            Exception: it cannot be loaded, not in time, or cannot answer.
        """
        start = time.monotonic()
        _logger.info("loading what %s means now (%s) ...", place.spec.name, place.spec.uri)
        place.changing = True
        try:
            new = await self._successor(place.spec)
        finally:
            place.changing = False
            self._changed.set()
        if place.loading is not None or self._end is not None:  # what was there has failed meanwhile, or all ends
            _discard_later(new)
            return
        old = self._retire(place, final=True) if place.loaded is not None else None
        self._install(place, new)
        _logger.info("loaded %s in %.1f s; it takes over", _named(new), time.monotonic() - start)
        while old in self._leaving:
            await self._next_change()
        if old is not None:
            _logger.info("%s has answered its last request and is closed", _named(old))

    async def close(self, seconds: float) -> None:
        """Refuses requests, waits for those under way, and closes every model. Loads under way are abandoned.

        Args:
            seconds: to wait; then what is still under way is ended. A second call can only shorten that.
        """
        end = time.monotonic() + seconds
        self._end = end if self._end is None else min(end, self._end)
        self._changed.set()
        for place in self._places:
            if place.loading is not None:
                place.loading.cancel()
                place.loading = None
            self._refuse(place, _ending)
            if place.loaded is not None:
                self._retire(place)
        while any(loaded.leases for loaded in self._leaving) and time.monotonic() < self._end:
            await self._next_change(self._end)
        for loaded in self._leaving:
            if loaded.leases:
                self._spawn(self._close(loaded))
        last = time.monotonic() + _CLOSING
        while self._leaving and time.monotonic() < last:
            await self._next_change(last)
        for place in self._places:
            if place.folder is not None:
                place.folder.remove()

    def _lend(self, loaded: Loaded) -> Loaded:
        loaded.leases += 1
        loaded.used = time.monotonic()
        return loaded

    async def _bring(self, place: Place) -> None:
        """Loads a model, and gives it to those who wait for it."""
        spec = place.spec
        await self._room(place)
        try:
            start = time.monotonic()
            _logger.info("loading %s (%s) ...", spec.name, without_passwords(spec.uri))
            work = partial(self._load, spec, kept=place.folder)
            loaded = await in_thread(work, name=f"load {spec.name}", discard=_discard)
        except Exception as error:
            place.failures += 1
            place.failure = f"cannot be loaded: {told(error)}"
            place.again = time.monotonic() + _rest(place.failures)
            _logger.error("%s (%s) cannot be loaded: %s", spec.name, without_passwords(spec.uri), logged(error))
            place.loading = None
            self._refuse(place, partial(_failed, place))
        else:
            _logger.info("loaded %s in %.1f s", _named(loaded), time.monotonic() - start)
            place.loading = place.failure = None
            self._install(place, loaded)
            for waiter in place.waiters:
                if not waiter.done():
                    waiter.set_result(self._lend(loaded))
            place.waiters.clear()
        finally:
            place.claimed = False
            self._changed.set()

    async def _room(self, place: Place) -> None:
        """Waits until one more model may be in memory, and claims its place."""
        unfair = time.monotonic() + FAIR
        while True:
            here = [each for each in self._places if each.loaded is not None or each.claimed]
            until = None
            if len(here) >= self._most:
                could = [each for each in here if each.loaded is not None and not each.changing]
                idle = [each for each in could if each.loaded is not None and not each.loaded.leases]
                if victims := idle or (could if time.monotonic() >= unfair else []):
                    victim = min(victims, key=lambda each: each.loaded.used if each.loaded else 0.0)
                    _logger.info("%s gives its place in memory to %s", victim.spec.name, place.spec.name)
                    self._retire(victim)
                    continue
                until = unfair if could else None
            elif len(here) + len(self._leaving) < self._most:
                place.claimed = True
                return
            await self._next_change(until)

    async def _successor(self, spec: Spec) -> Loaded:
        """What an alias means now, loaded and tried."""
        try:
            async with asyncio.timeout(self._load_timeout) as limit:
                new = await in_thread(partial(self._load, spec), name=f"load {spec.name}", discard=_discard)
        except TimeoutError:
            if limit.expired():
                raise Phi3Error(f"it was not loaded within {self._load_timeout:g} seconds") from None
            raise
        try:
            await in_thread(partial(new.ask, ANSWER_SECONDS), name=f"ask {spec.name}")
        except BaseException:
            _discard_later(new)
            raise
        return new

    def _install(self, place: Place, loaded: Loaded) -> None:
        place.loaded, place.since = loaded, time.monotonic()
        place.folder = loaded.folder
        place.context_length = loaded.service.context_length

    def _bury(self, place: Place) -> None:
        """Ends a model whose thread has ended. The first time it may be loaded again at once."""
        place.failures += 1
        if place.failures == 1:
            _logger.error("%s has failed and is loaded again", place.spec.name)
        else:
            place.failure = f"has failed {place.failures} times in a row while it answered; the server's log says why"
            place.again = time.monotonic() + _rest(place.failures - 1)
            _logger.error("%s has failed %d times in a row; %s", place.spec.name, place.failures, _again(place))
        self._retire(place)

    def _retire(self, place: Place, *, final: bool = False) -> Loaded:
        """Ends that a model takes requests; it is closed when those that use it are done."""
        loaded, place.loaded = place.loaded, None
        assert loaded is not None
        loaded.final = final
        self._leaving.add(loaded)
        if not loaded.leases:
            self._spawn(self._close(loaded))
        return loaded

    async def _close(self, loaded: Loaded) -> None:
        try:
            await in_thread(loaded.close, name=f"close {loaded.name}")
        except Exception:
            _logger.exception("%s was not closed properly", loaded.name)
        finally:
            self._leaving.discard(loaded)
            self._changed.set()

    async def _next_change(self, until: float | None = None) -> None:
        """Waits for something to change, until a time on time.monotonic()'s clock at the longest."""
        self._changed.clear()
        # Not wait_for, which loses a cancellation where it comes together with the event.
        with suppress(TimeoutError):
            async with asyncio.timeout(None if until is None else max(0.0, until - time.monotonic())):
                await self._changed.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)
        return task

    def _refuse(self, place: Place, error: Callable[[], HttpError]) -> None:
        for waiter in place.waiters:
            if not waiter.done():
                waiter.set_exception(error())
        place.waiters.clear()

    def _late(self, place: Place) -> HttpError:
        problem = (
            f"is not loaded after {self._load_timeout:g} seconds, and its loading goes on"
            if place.claimed
            else "waits for its place in memory, and all other models there are in use"
        )
        return _unavailable(f"the model `{place.spec.name}` {problem}; try again later", _LATER)


def _named(loaded: Loaded) -> str:
    return loaded.name if loaded.version is None else f"{loaded.name} (version {loaded.version})"


def _discard(loaded: Loaded) -> None:
    """Closes what was loaded for nobody."""
    loaded.final = True
    loaded.close()


def _discard_later(loaded: Loaded) -> None:
    in_thread(partial(_discard, loaded), name=f"close {loaded.name}")


def _unavailable(message: str, seconds: int) -> HttpError:
    return HttpError(503, message, kind="server_error", code="model_not_loaded", retry_after=seconds)


def _failed(place: Place) -> HttpError:
    left = math.ceil(max(1.0, place.again - time.monotonic()))
    return _unavailable(f"the model `{place.spec.name}` {place.failure}", left)


def _rest(failures: int) -> float:
    """Seconds until a model may be loaded again after so many failures in a row."""
    return min(RETRY_AFTER * 2.0 ** min(failures - 1, 10), MOST_RETRY_AFTER)


def _again(place: Place) -> str:
    left = math.ceil(place.again - time.monotonic())
    return f"it is loaded again at the first request {f'after {left} seconds' if left > 0 else 'that comes'}"


def _ending() -> HttpError:
    return _unavailable("the server is ending; try again later", _LATER)
