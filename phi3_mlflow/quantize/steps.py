"""The lines that quantizing reports, as a bar on a terminal."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_QUANTIZED = re.compile(r"Quantized (\d+) of (\d+) matrices")
# How the lines begin that name a step; the model builder prints others.
_STEPS = ("Reading", "Saving", "Merging")


@contextmanager
def bar(*, disable: bool = False) -> Iterator[Callable[[str], None]]:
    """A bar over the matrices, with the step's name before it; none where stderr is no terminal.

    Args:
        disable: show none there either.

    Yields:
        What takes the lines.
    """
    with tqdm(desc="Starting", unit=" matrices", disable=True if disable else None, leave=False) as shown:

        def report(line: str) -> None:
            if found := _QUANTIZED.search(line):
                shown.set_description("Quantizing", refresh=False)
                shown.total = int(found[2])
                shown.update(int(found[1]) - shown.n)
            elif line.startswith(_STEPS):
                shown.set_description(line.partition(" in /")[0])

        yield report
