"""Follows an alias: asks the registry what it means, and says when that has changed. Loads nothing itself."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

from . import folders
from .causes import logged
from .threads import in_thread

_logger = logging.getLogger(__name__)

# Seconds after which the log says that the registry does not answer.
SLOW = 30.0
# Seconds until a version that failed is tried again.
AGAIN = 600.0


async def follow(
    name: str,
    uri: str,
    *,
    seconds: float,
    present: Callable[[], str | None],
    change: Callable[[], Awaitable[None]],
) -> None:
    """Runs until it is cancelled.

    Args:
        name: the served model's, for the log.
        uri: models:/NAME@ALIAS.
        seconds: between two questions.
        present: the version in memory; None where there is none, which needs no change.
        change: replaces that by what the alias means, or raises what hinders it.
    """
    registry = _Registry(name, uri)
    refused, again = None, 0.0
    while True:
        await asyncio.sleep(seconds)
        if present() is None:
            continue
        version, here = await registry.version(), present()
        if version is None or here is None:
            continue
        if version == here:
            refused = None
            continue
        if version == refused and time.monotonic() < again:
            continue
        try:
            await change()
        except Exception as error:
            if version != refused:
                _logger.error(
                    "%s stays with version %s, because version %s failed: %s", name, here, version, logged(error)
                )
            refused, again = version, time.monotonic() + AGAIN


class _Registry:
    """One question to the registry at a time; what hinders it is logged once."""

    def __init__(self, name: str, uri: str):
        self._name = name
        self._uri = uri
        self._silent = False

    async def version(self) -> str | None:
        """What the alias means; None where nobody knows."""
        asked = in_thread(partial(folders.version, self._uri), name=f"watch {self._name}")
        try:
            await asyncio.wait({asked}, timeout=SLOW)
            if not asked.done():
                self._complain(f"the registry has not answered for {SLOW:g} seconds")
            version = await asked
        except Exception as error:
            self._complain(logged(error))
            return None
        finally:
            asked.cancel()
        if self._silent:
            _logger.info("the registry answers again what %s means", self._uri)
            self._silent = False
        return version

    def _complain(self, problem: str) -> None:
        if not self._silent:
            _logger.warning("%s stays as it is: nobody says what %s means: %s", self._name, self._uri, problem)
            self._silent = True
