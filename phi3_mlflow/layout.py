"""How numbers look, in tables and in plots, wherever models are measured."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#2f6fb0", "#d9822b", "#5c6670"
# One for each model that is compared; they differ in lightness too.
COLOURS = (BLUE, ORANGE, "#3d8b57", "#8e5aa8", "#b8433f", "#7a6a4f")
_LEAST = 0.01  # milliseconds; a small model's tokens may come in one burst


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, aligned for a terminal: text to the left in the first column, to the right in the others."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)) + " |"
        for pairs in ([*zip(row, widths, strict=True)] for row in (header, *rows))
    ]
    rule = "|" + "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def time(milliseconds: float | None) -> str:
    """Milliseconds with three digits, as seconds from one second on."""
    if milliseconds is None:
        return "-"
    if milliseconds < _LEAST:
        return f"<{_LEAST} ms"
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{milliseconds:.{0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2}f} ms"


def size(amount: int | None) -> str:
    """Bytes in MiB or GiB."""
    if amount is None:
        return "unknown"
    return f"{amount / 2**30:.1f} GiB" if amount >= 2**30 else f"{amount / 2**20:.0f} MiB"


def short(number: float) -> str:
    """Three digits, or all before the point; two below 1."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}" if number >= 1 else f"{number:.2g}"


def counted(number: int, what: str) -> str:
    """A number of things, such as `1 question` or `2 questions`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def name_axes(axes: "Axes", title: str, x: str, y: str) -> None:
    """Gives a plot its title, the names of its axes, and the look that all have."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", color="#d8dde2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
