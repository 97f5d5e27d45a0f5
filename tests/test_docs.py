"""The documentation: the site builds, links lead somewhere, and commands are ones that there are.

What the commands and the code do is tested where their page says so; see test_recipes.py and its like.

Run with: python -m pytest tests/test_docs.py
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from phi3_mlflow.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, in strict mode: a link or an anchor that leads nowhere is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300
    )
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    return folder


def test_the_site_has_each_page_and_loads_nothing_from_elsewhere(site):
    for page in PAGES[1:]:
        html = (site / ("" if page.stem == "index" else page.stem) / "index.html").read_text("utf-8")
        loaded = re.findall(r"""<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=["']?([^"'> ]+)""", html)
        assert loaded
        assert [address for address in loaded if re.match(r"(?:https?:)?//", address)] == []


def headings(page):
    """The anchors of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_repository_lead_to_what_is_there(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in headings(file), target


def commands():
    """The toolkit's own commands in the pages' shell blocks."""
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if "phi3-mlflow " in line and not line.lstrip().startswith("#"):
                    yield pytest.param(line, id=f"{page.name}: {line.strip()[:60]}")


@pytest.mark.parametrize("line", commands())
def test_a_command_has_the_verbs_and_options_that_it_is_shown_with(line):
    words = shlex.split(line.strip(), comments=True)
    words = words[words.index("phi3-mlflow") + 1 :]
    end = next((place for place, word in enumerate(words) if word in ("|", "&&", ">", ";", "&")), len(words))
    words = words[:end]
    command, context = cli, click.Context(cli, info_name="phi3-mlflow")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, found, words = command.resolve_command(context, words)
        command, context = found, click.Context(found, info_name=name, parent=context)
    command.make_parser(context).parse_args(list(words))
