"""The notebooks run from a fresh kernel to a served model, and what is committed is what they print.

Run: pytest tests/test_notebooks.py
"""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
BUILDERS = ("onnx", "transformers")
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|var|opt|mnt|private|Users)/|[A-Z]:\\|site-packages")

pytestmark = pytest.mark.parametrize("executed", BUILDERS, indirect=True)


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: NotebookNode, *, errors: bool = False) -> str:
    """What a cell shows as text, on stderr if `errors`."""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            texts.append(output.text if (output.name == "stderr") == errors else "")
        elif not errors:
            texts.append(output.data["text/plain"])
    return "".join(texts)


def cell_with(notebook: NotebookNode, code: str) -> NotebookNode:
    (cell,) = [cell for cell in code_cells(notebook) if code in cell.source]
    return cell


@pytest.fixture(scope="module")
def executed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, NotebookNode]:
    """A notebook's name, and a copy of it that was executed in a fresh kernel and an empty folder."""
    spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    name = request.param
    return name, run.execute(read(name), tmp_path_factory.mktemp(f"notebook-{name}"), timeout=300)


def test_the_loaded_the_streaming_and_the_served_model_answer(executed):
    _, notebook = executed

    assert "The capital of Spain is Madrid." in printed(cell_with(notebook, "completions = model.predict(question)"))
    assert "Madrid" in printed(cell_with(notebook, "model.predict_stream(question)"))
    served = printed(cell_with(notebook, "with served("))
    assert served.startswith("200 ")
    assert "Madrid" in served
    assert "\n400 " in served


def test_the_cells_print_no_warnings_and_no_progress_bars(executed):
    _, notebook = executed

    for cell in code_cells(notebook):
        lines = printed(cell, errors=True).splitlines()
        assert all(re.match(r"(Successfully registered|Created version)", line) for line in lines), lines


def test_the_first_code_cell_alone_chooses_the_weights(executed):
    name, notebook = executed
    real = {
        "onnx": "microsoft/Phi-3-mini-4k-instruct-onnx",
        "transformers": "microsoft/Phi-3-mini-4k-instruct",
    }

    settings, *others = code_cells(notebook)

    assert 'WEIGHTS = "embedded"' in settings.source
    assert f'WEIGHTS = "{real[name]}"' in settings.source
    assert not [cell for cell in others if "embedded" in cell.source]


def test_the_committed_notebook_was_executed_from_top_to_bottom_and_holds_no_path_of_a_machine(executed):
    name, fresh = executed
    committed = code_cells(read(name))

    assert [cell.execution_count for cell in committed] == list(range(1, len(committed) + 1))
    for before, now in zip(committed, code_cells(fresh), strict=True):
        assert [output.output_type for output in before.outputs] == [output.output_type for output in now.outputs]
        assert not MACHINE_PATH.search(printed(before) + printed(before, errors=True))
    assert "The capital of Spain is Madrid." in printed(cell_with(read(name), "with served("))
