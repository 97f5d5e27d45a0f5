"""What a verb is doing, on a line of a terminal. Imports nothing slow, so that it can be shown at once."""

import shutil
from typing import Self

from tqdm import tqdm

_STEP = ": {desc} ..."
_BAR = ": {n_fmt} of {total_fmt} {desc} |{bar}| {elapsed}, {remaining} left"


class Progress:
    """One line of stderr, where that is a terminal; gone at the end of the block, or with `close`.

    Args:
        verb: of the command line; the line begins with it.
        hidden: show none on a terminal either.
    """

    def __init__(self, verb: str, *, hidden: bool = False):
        self._verb = verb
        columns, lines = shutil.get_terminal_size()  # 80 and 24 where the terminal does not say
        self._bar = tqdm(
            desc="starting", bar_format=verb + _STEP, leave=False, mininterval=0.5, ncols=columns, nrows=lines,
            disable=hidden or None,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def say(self, what: str) -> None:
        """Names a step."""
        self._bar.bar_format = self._verb + _STEP
        self._bar.set_description_str(what)

    def count(self, what: str, total: int) -> None:
        """Names a step that has a bar."""
        self._bar.bar_format = self._verb + _BAR
        self._bar.set_description_str(what, refresh=False)
        self._bar.reset(total)

    def advance(self, steps: int) -> None:
        """Moves the bar."""
        self._bar.update(steps)

    def close(self) -> None:
        """Clears the line. Harmless the second time."""
        self._bar.close()
