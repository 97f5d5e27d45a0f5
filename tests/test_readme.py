"""README.md as a newcomer follows it: its commands in their order, from a clone in an empty folder, without a network.

One thing is done beside them: the new environment gets the packages of the one that the tests run in, so that pip finds
installed what it would else download. `make demo` and `make test` do the same with a network, and what needs a hub or
Azure is tested elsewhere; see test_documented.py.

Run: pytest tests/test_readme.py
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from documented import ROOT, blocks, commands
from session import Session

MADRID = "The capital of Spain is Madrid."
SERVE, MLFLOW = "http://127.0.0.1:8000/health", "http://127.0.0.1:5000/ping"
# Programs that MLflow is called by and calls, with the new environment's Python; the setuptools that came with Python
# would hide the one that torch wants.
SHARE = """
own=$(python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
echo '{purelib}' > "$own/shared.pth"
rm -r "$own"/setuptools*
for program in mlflow uvicorn; do
  sed "1s|.*|#!$PWD/.venv/bin/python|" '{scripts}'/$program > .venv/bin/$program
  chmod +x .venv/bin/$program
done
"""

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed (make programs)")


def clone(folder: Path) -> None:
    """`git clone`; a checkout without its history is copied."""
    if (ROOT / ".git").exists():
        subprocess.run(["git", "-c", "safe.directory=*", "clone", "--quiet", ROOT, folder], check=True, timeout=120)
    else:
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "mlruns", "mlflow.db"))


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Everything that the page shows, once."""
    session = Session(tmp_path_factory.mktemp("newcomer") / "phi3-mlflow")
    clone(session.folder)
    ((block,), (rest, _azure, _real)) = (
        blocks("README.md", heading, "bash", session.folder)
        for heading in ("From a clone to registered, compared and served", "The shortest path")
    )
    notebook, client = blocks("README.md", "The shortest path", "python", session.folder)
    environment, install, log, compare, serve = commands(block.code)

    session.run("environment", environment)
    session.run("share", SHARE.format(**sysconfig.get_paths()))
    session.run("install", install)
    session.run("log", log)
    session.run("compare", compare)
    session.start("serve", serve, SERVE)
    session.run("client", f"python -c {shlex.quote(client.code)}")
    session.end(SERVE)
    session.run("notebook", f"python -c {shlex.quote(notebook.code)}")
    server, ask = commands(rest.code)
    session.start("mlflow", server, MLFLOW)
    session.run("rest", ask)
    session.end(MLFLOW)
    session.play(
        PIP_NO_INDEX="1",
        PIP_NO_BUILD_ISOLATION="0",  # the build's backend is one of the packages that are there
        PIP_CONFIG_FILE=os.devnull,
        OMP_NUM_THREADS="1",  # other tests run meanwhile, and torch's threads would wait for each other
    )
    return session


def test_five_commands_lead_to_both_models_registered_compared_and_served(newcomer):
    assert "Successfully installed phi3-mlflow" in newcomer.output("install")
    assert re.findall(r"models:/m-\w+", newcomer.output("log"))
    assert re.findall(r"^Registered as (\S+)$", newcomer.error("log"), re.M) == [
        "models:/phi3-transformers/1",
        "models:/phi3-onnx/1",
    ]
    rows = [line.strip("|").split("|") for line in newcomer.output("compare").splitlines() if line.startswith("|")]
    table = {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}
    assert table[""] == ["phi3-transformers/1", "phi3-onnx/1"]
    assert all(float(cell.split("%")[0]) > 90 for cell in table["right"])
    assert "http://127.0.0.1:8000" in newcomer.error("serve")


def test_the_code_beside_them_gets_its_answers(newcomer):
    assert newcomer.output("client").strip() == MADRID
    assert newcomer.output("notebook").strip() == MADRID
    (completion,) = json.loads(newcomer.output("rest"))
    assert completion["choices"][0]["message"]["content"]
    assert completion["choices"][0]["finish_reason"] == "stop"


def test_the_commands_ran_what_the_clone_installed(newcomer):
    """Not the checkout that the tests are part of."""
    (package,) = newcomer.folder.glob(".venv/lib/python3.*/site-packages/phi3_mlflow")
    assert package.is_dir()
    assert (package / "artifacts" / "onnx" / "model.onnx").is_file()
    (program,) = newcomer.folder.glob(".venv/bin/phi3-mlflow")
    assert program.read_text("utf-8").startswith(f"#!{newcomer.folder}")


def test_the_documentations_first_page_shows_the_same_commands():
    ((own,), (other,)) = (
        blocks(page, heading, "bash")
        for page, heading in (
            ("README.md", "From a clone to registered, compared and served"), ("docs/index.md", "phi3_mlflow"),
        )
    )  # fmt: skip
    assert commands(own.code) == commands(other.code)
