"""Writes what a plan says: the model, the toolkit, and the files made from `templates`. All or nothing."""

import json
import shutil
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from tqdm import tqdm

import phi3_mlflow
from phi3_mlflow.embedding import embed

from .plan import Plan, check_folder

# Where `serve` listens in the container, and who it is there.
PORT, USER = 8000, 10001
# Seconds that a load and the end of running answers may take.
LOAD_SECONDS, DRAIN_SECONDS, TIMEOUT_SECONDS = 300, 30, 600
_PREFIX = "PHI3_MLFLOW_SERVE_"
# Parts of the toolkit that no server needs: the embedded weights.
_LEFT_OUT = ("__pycache__", "artifacts")


def write(plan: Plan, folder: Path, *, progress: bool = False) -> None:
    """Writes the folder. It appears when it is whole.

    Args:
        plan: from `plan.plan`.
        folder: must not exist, or be empty.
        progress: show a bar on stderr where copying takes long.

    Raises:
        ContainerError: there is something in the folder by now.
        OSError: the disk is full.
    """
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=parent) as temporary:
        room = Path(temporary) / "whole"
        room.mkdir()
        _copy_model(plan, room / "model", progress=progress)
        source = Path(phi3_mlflow.__file__).parent
        ignore = shutil.ignore_patterns(*_LEFT_OUT)
        shutil.copytree(source, room / "toolkit" / "phi3_mlflow", ignore=ignore, copy_function=shutil.copyfile)
        (room / "requirements.txt").write_text("\n".join(plan.requirements) + "\n", "utf-8")
        for name, text in rendered(plan).items():
            path = room / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
        _let_read(room)
        check_folder(folder)
        if folder.is_dir():
            for child in room.iterdir():
                child.rename(folder / child.name)
        else:
            room.rename(folder)


def settings(plan: Plan) -> dict[str, str]:
    """`serve`'s options as its environment has them."""
    options: dict[str, Any] = {
        "PARALLEL": plan.parallel,
        "CONFIG": " ".join(f"{name}={_value(value)}" for name, value in plan.settings.items()),
        "TIMEOUT": TIMEOUT_SECONDS,
        "DRAIN": DRAIN_SECONDS,
        "LOAD_TIMEOUT": LOAD_SECONDS,
        "MAX_BODY": 4 * 2**20,
        "ACCESS_LOG": "-",
    }
    return {_PREFIX + name: str(value) for name, value in options.items() if value is not None}


def rendered(plan: Plan) -> dict[str, str]:
    """The files that are made from templates: text by path."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["json"] = json.dumps
    top = sorted({path.relative_to(plan.model.folder).parts[0] for path in plan.model.files()})
    folders = [name for name in top if (plan.model.folder / name).is_dir()]
    values = {
        "plan": plan,
        "port": PORT,
        "user": USER,
        "settings": settings(plan),
        "load_seconds": LOAD_SECONDS,
        "drain_seconds": DRAIN_SECONDS,
        "timeout_seconds": TIMEOUT_SECONDS,
        "weights": [name for name in folders if name in plan.weights],
        "folders": [name for name in folders if name not in plan.weights],
        "files": [name for name in top if name not in folders],
    }
    templates = Path(str(files(__package__) / "templates"))
    paths = sorted(path for path in templates.rglob("*") if path.is_file())
    names = [path.relative_to(templates).as_posix() for path in paths]
    return {
        {"dockerignore": ".dockerignore"}.get(name, name): environment.from_string(path.read_text("utf-8")).render(
            values
        )
        for name, path in zip(names, paths, strict=True)
    }


def _value(value: Any) -> str:
    """A setting as the command line reads it: JSON, and text that would be read as something else in quotes."""
    if not isinstance(value, str):
        return json.dumps(value, separators=(",", ":"))
    try:
        json.loads(value)
    except ValueError:
        return value
    return json.dumps(value)


def _copy_model(plan: Plan, folder: Path, *, progress: bool) -> None:
    size = plan.model.size
    with tqdm(total=size, unit="B", unit_scale=True, delay=2, leave=False, disable=not progress) as bar:
        step: Callable[[int], Any] = bar.update

        def put(path: Path, target: Path) -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            step(path.stat().st_size)

        for path in plan.model.files():
            put(path, folder / path.relative_to(plan.model.folder))
        embed(plan.model.place, folder, put)


def _let_read(folder: Path) -> None:
    """Files keep their modes in an image, where another user reads them."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
