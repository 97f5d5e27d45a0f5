"""The notebooks run from a fresh kernel to their last cell, and what is committed is what they print.

Run: pytest tests/test_notebooks.py
"""

import base64
import importlib.util
import io
import re
from pathlib import Path

import matplotlib.image
import nbformat
import pytest
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
BUILDERS = pytest.mark.parametrize("executed", ["onnx", "transformers"], indirect=True)
COMPARISON = pytest.mark.parametrize("executed", ["compare"], indirect=True)
ALL = pytest.mark.parametrize("executed", ["compare", "onnx", "transformers"], indirect=True)
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|var|opt|mnt|private|Users)/|[A-Z]:\\|site-packages")


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


@BUILDERS
def test_the_loaded_the_streaming_and_the_served_model_answer(executed):
    name, notebook = executed

    assert "The capital of Spain is Madrid." in printed(cell_with(notebook, "completions = model.predict(question)"))
    assert "Madrid" in printed(cell_with(notebook, "model.predict_stream(question)"))
    for each in (notebook, read(name)):
        served = printed(cell_with(each, "with served("))
        assert served.startswith("200 ")
        assert "The capital of Spain is Madrid." in served
        assert "\n400 " in served


@ALL
def test_the_cells_print_no_warnings_and_no_progress_bars(executed):
    _, notebook = executed

    for cell in code_cells(notebook):
        lines = printed(cell, errors=True).splitlines()
        assert all(re.match(r"(Successfully registered|Created version)", line) for line in lines), lines


@BUILDERS
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


@ALL
def test_the_committed_notebook_was_executed_from_top_to_bottom_and_holds_no_path_of_a_machine(executed):
    name, fresh = executed
    committed = code_cells(read(name))

    assert [cell.execution_count for cell in committed] == list(range(1, len(committed) + 1))
    for before, now in zip(committed, code_cells(fresh), strict=True):
        assert [output.output_type for output in before.outputs] == [output.output_type for output in now.outputs]
        assert not MACHINE_PATH.search(printed(before) + printed(before, errors=True))


@COMPARISON
def test_three_models_are_compared(executed):
    _, notebook = executed

    (output,) = cell_with(notebook, "result = compare(uris)").outputs
    table = output.data["text/markdown"]
    rows = {cells[1].strip(): cells[2:-1] for line in table.splitlines() if len(cells := line.split("|")) > 2}
    assert [name.strip() for name in rows[""]] == ["phi3-full/1", "phi3-block-32/1", "phi3-block-256/1"]
    drifts = [float(cell.split("[")[0]) for cell in rows["drift, nats a token"][1:]]
    assert 0 < drifts[0] < drifts[1]
    assert "block 256" in table


@COMPARISON
def test_the_plots_are_pictures(executed):
    name, fresh = executed

    for notebook in (fresh, read(name)):
        outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
        pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
        assert len(pictures) == 4
        for picture in pictures:
            pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(picture)), format="png")
            assert pixels.shape[1] > 1000
            assert pixels[..., :3].std() > 0.05  # not a blank one
