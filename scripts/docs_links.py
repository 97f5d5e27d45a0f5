"""A hook of mkdocs: links to files of the repository that are not on the site become their text."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parent.parent


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Checks that each of these files is there."""

    def text(link: "re.Match[str]") -> str:
        if not (ROOT / link[2].partition("#")[0]).exists():
            raise PluginError(f"{page.file.src_path} links to {link[2]}, which is not in the repository")
        return link[1]

    return re.sub(r"\[([^]]+)\]\(\.\./([^)]+)\)", text, markdown)
