"""The code blocks of README.md and docs/*.md."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: the file, from the repository's root.
        heading: the text of the heading that it stands below.
        language: `bash`, `python`, `text` and so on; empty where none is named.
        code: what is in it.
    """

    page: str
    heading: str
    language: str
    code: str

    @property
    def name(self) -> str:
        """The page and the first line."""
        return f"{self.page}: {self.code.strip().splitlines()[0]}"


def blocks(page: str, heading: str | None = None, language: str | None = None, root: Path = ROOT) -> list[Block]:
    """The blocks of a page, all or those below a heading and of a language."""
    found = [
        block
        for block in _blocks(page, (root / page).read_text("utf-8"))
        if heading in (None, block.heading) and language in (None, block.language)
    ]
    assert found or heading is None, (page, heading, language)
    return found


def _blocks(page: str, text: str) -> Iterator[Block]:
    heading = ""
    for found in re.finditer(r"^#+ (?P<heading>[^\n]*)$|^```(?P<language>\w*)\n(?P<code>.*?)^```$", text, re.M | re.S):
        if found["heading"] is None:
            yield Block(page, heading, found["language"], found["code"])
        else:
            heading = found["heading"].strip()


def commands(code: str) -> list[str]:
    """The commands of a shell block, each with the lines that go on with it and without what is said beside it."""
    lines = [re.sub(r"\s+# .*$", "", line) for line in code.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]
