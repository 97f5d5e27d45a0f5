"""Executes notebooks in place, each in a fresh kernel of this interpreter, and keeps what they print.

    python notebooks/run.py [NOTEBOOK ...]

Without arguments, all that stand beside this file. What they write on disk goes to a temporary folder.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets import default

HERE = Path(__file__).resolve().parent


class _Kernel(AsyncKernelManager):
    """Takes ipykernel in this interpreter for `python3`, whatever kernels are installed for the user."""

    @default("kernel_spec_manager")
    def _without_folders(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])

    @default("transport_encryption")
    def _where_the_kernel_can(self) -> str:
        return "auto"


def execute(notebook: NotebookNode, folder: str | Path, timeout: int = 3600) -> NotebookNode:
    """Runs all cells and fills in their outputs.

    Args:
        notebook: changed in place.
        folder: the kernel's working directory.
        timeout: for each cell, in seconds.

    Returns:
        The notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; it holds the cell and the traceback.
    """
    NotebookClient(
        notebook,
        kernel_name="python3",
        kernel_manager_class=_Kernel,
        timeout=timeout,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    # The interpreter's version would change with each machine.
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(paths: list[Path]) -> None:
    """Executes the notebooks and writes them back."""
    for path in paths:
        print(f"Executing {path.name} ...", file=sys.stderr, flush=True)
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, folder)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")))
