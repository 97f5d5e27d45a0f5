"""Kills `pull`, `quantize`, `log` and `log --register` by SIGKILL at random moments. Ends with 1 on a fault.

    python benchmarks/kills.py --times 50 [--seed 0] [--only log] [--only register]

Each is started in a folder of its own, with the embedded model's files, a local store and a stand-in for the hub. After
a kill nothing may be there that is taken for whole and is not, and the same command once more has to end well. Then
nothing may be left in the folder that nobody owns: neither the store nor a finished command.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# All that the commands import: they are forked from here, so that the kills hit what they do.
import mlflow
import onnxruntime_genai  # noqa: F401
from huggingface_hub import constants

from phi3_mlflow import verify
from phi3_mlflow.builders import onnx  # noqa: F401
from phi3_mlflow.cli import cli
from phi3_mlflow.weights import ONNX_FOLDER

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from hub import Hub  # noqa: E402

REPOSITORY = "microsoft/Phi-3-mini-4k-instruct-onnx"
GRACE = 60  # seconds for what a killed command had started to notice
PATIENCE = 300  # seconds for a command that nobody kills
_FORK = multiprocessing.get_context("fork")


def _call(function: Callable[..., Any], folder: Path, output: Path | None, answer: Any, arguments: tuple) -> None:
    os.setsid()
    os.chdir(folder)
    (folder.parent / "tmp").mkdir(exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder.parent / "tmp")
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    if output is not None:
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    found = function(*arguments)
    if answer is not None:
        answer.send(found)


def start(function: Callable[..., Any], folder: Path, *arguments: Any, output: Path | None = None) -> Any:
    """Starts a function in a process of its own, in a folder, with a store there."""
    process = _FORK.Process(target=_call, args=(function, folder, output, None, arguments))
    process.start()
    return process


def ask(function: Callable[..., Any], folder: Path, *arguments: Any) -> Any:
    """What a function gives in a process of its own.

    Raises:
        RuntimeError: it failed; has the line that names its error.
    """
    here, there = _FORK.Pipe()
    process = _FORK.Process(target=_call, args=(function, folder, folder.parent / "asked", there, arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        process.join()
        lines = (folder.parent / "asked").read_text("utf-8", "replace").splitlines()
        raise RuntimeError(next((line for line in reversed(lines) if "Error" in line), "it printed nothing")) from None
    finally:
        process.join()


class Verb:
    """A command that is killed.

    Args:
        folder: an empty one; the command runs in `folder/work`.
        fresh: whether it starts with an empty folder each time.
    """

    arguments: tuple[str, ...] = ()
    fresh = True

    def __init__(self, folder: Path):
        self.folder = folder / "work"
        self.output = folder / "output"
        self.empty()

    def empty(self) -> None:
        """Makes the folder an empty one."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def command(self) -> None:
        """Runs the command."""
        cli(list(self.arguments), prog_name="phi3-mlflow")

    def start(self) -> Any:
        """Starts the command in a process."""
        return start(self.command, self.folder, output=self.output)

    def end(self) -> list[str]:
        """Runs the command to its end; what was wrong."""
        process = self.start()
        process.join(PATIENCE)
        if process.exitcode == 0:
            return []
        process.kill()
        return [f"the second run ended with {process.exitcode}: {self.output.read_text('utf-8', 'replace')[-500:]}"]

    def half(self) -> list[str]:
        """What is taken for whole and is not."""
        raise NotImplementedError

    def left(self) -> list[str]:
        """What nobody owns, after a run that ended well."""
        raise NotImplementedError


class Pull(Verb):
    """A download from a hub."""

    arguments = ("pull", REPOSITORY)

    def __init__(self, folder: Path, url: str):
        self.url = url
        self.whole: dict[str, bytes] = {}
        super().__init__(folder)

    def command(self, offline: bool = False) -> None:
        """Runs the command, with the hub or from the cache alone."""
        constants.HF_HUB_OFFLINE = offline
        constants.HF_HUB_CACHE = str(self.folder / "cache")
        constants.ENDPOINT = self.url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        super().command()

    def half(self) -> list[str]:
        """A folder that is found without a network has to be the hub's."""
        process = start(self.command, self.folder, True, output=self.output)
        process.join(PATIENCE)
        if process.exitcode:
            return []
        folder = Path(self.output.read_text("utf-8").splitlines()[-1])
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.whole = self.whole or found  # nothing was killed before the first look
        wrong = {name for name in self.whole | found if self.whole.get(name) != found.get(name)}
        return [f"{name} is not the hub's, and pull without a network gives it" for name in sorted(wrong)]

    def left(self) -> list[str]:
        """What is no link's target."""
        targets = {path.resolve() for path in self.folder.rglob("snapshots/**/*") if path.is_file()}
        blobs = [path for path in self.folder.rglob("blobs/*") if path not in targets]
        return [f"{path.name} is left in the cache" for path in blobs]


class Quantize(Verb):
    """An export of the embedded model."""

    arguments = ("quantize", str(ROOT / "artifacts" / "transformers"), "int4")

    def half(self) -> list[str]:
        """A folder of that name has to have what a finished one has."""
        names = {path.name for path in (ROOT / "artifacts" / "onnx").iterdir()}
        found = self.folder / "int4"
        if not found.exists() or names <= {path.name for path in found.iterdir()}:
            return []
        return ["int4 is there and not whole"]

    def end(self) -> list[str]:
        """A finished folder is not overwritten."""
        shutil.rmtree(self.folder / "int4", ignore_errors=True)
        return super().end()

    def left(self) -> list[str]:
        """All but the folder."""
        return [f"{path.name} is left beside the folder" for path in self.folder.iterdir() if path.name != "int4"]


class Log(Verb):
    """Logging into a store that was there before."""

    arguments = ("log", "onnx")
    fresh = False

    def half(self) -> list[str]:
        """Models that count as whole have to be, registered ones too."""
        if not (self.folder / "mlflow.db").exists():
            return []
        try:
            return ask(_half, self.folder)
        except RuntimeError as error:
            return [f"the store cannot be read: {error}"]

    def left(self) -> list[str]:
        """Folders of models that the store does not know."""
        try:
            return ask(_left, self.folder)
        except RuntimeError as error:
            return [f"the store cannot be read: {error}"]


class First(Log):
    """Logging where there is no store yet."""

    fresh = True


class Register(Log):
    """Logging, and registering under a name with an alias."""

    arguments = ("log", "onnx", "--register", "phi3", "--alias", "champion")


def _whole(uri: str) -> bool:
    return not any(check.status == "failed" for check in verify.run(uri, progress=False))


def _half() -> list[str]:
    client, faults = mlflow.MlflowClient(), []
    for model in client.search_logged_models([each.experiment_id for each in client.search_experiments()]):
        ready = model.status == "READY"
        folder = Path(model.artifact_location.removeprefix("file://"))
        present = (folder / "MLmodel").is_file() and _whole(str(folder))
        if ready and not present:
            faults.append(f"{model.model_id} is READY and not whole")
        if present and not (folder / "artifacts").is_dir():
            faults.append(f"{model.model_id} passes verify without its weights")
    for version in client.search_model_versions():
        if version.status == "READY" and not _whole(f"models:/{version.name}/{version.version}"):
            faults.append(f"version {version.version} of {version.name} is READY and not whole")
    for registered in client.search_registered_models():
        for alias, version in registered.aliases.items():
            if not client.get_model_version(registered.name, str(version)).source:
                faults.append(f"the alias {alias} leads nowhere")
    return faults


def _left() -> list[str]:
    client = mlflow.MlflowClient()
    experiments = client.search_experiments()
    known = {model.model_id for model in client.search_logged_models([each.experiment_id for each in experiments])}
    folders = [path for path in Path("mlruns").glob("*/models/*") if path.name not in known]
    return [f"{path} is of no model that the store knows" for path in folders]


def kill(verb: Verb, seconds: float) -> tuple[bool, list[str]]:
    """Starts a command and kills it after so long, and it alone, as a machine without memory does.

    Returns:
        Whether it had ended before, and what was wrong with what it had started itself.
    """
    process = verb.start()
    process.join(seconds)
    ended = process.exitcode is not None
    process.kill()
    process.join()
    end = time.monotonic() + GRACE
    with suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        return ended, ["a process that it had started goes on"]
    return ended, []


def attack(verb: Verb, times: int, seed: int) -> tuple[list[str], int]:
    """Kills a command so many times.

    Returns:
        What was wrong, and how often the command had ended before it could be killed.
    """
    if not verb.fresh:
        verb.end()  # makes the store
    begin = time.monotonic()
    faults = verb.end()
    whole = time.monotonic() - begin
    faults += verb.half()
    moments, ended = random.Random(seed), 0
    for number in range(times):
        if verb.fresh:
            verb.empty()
        moment = moments.uniform(0, whole)
        too_late, found = kill(verb, moment)
        ended += too_late
        found += [*verb.half(), *verb.end(), *verb.half(), *verb.left()]
        faults += [f"kill {number} after {moment:.2f} s: {fault}" for fault in found]
    return faults, ended


def _serve(url: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it tells of every client that leaves
    with Hub() as hub:
        content = {f"{ONNX_FOLDER}/{path.name}": path.read_bytes() for path in (ROOT / "artifacts" / "onnx").iterdir()}
        hub.add(REPOSITORY, content | {"README.md": b"---\nlicense: mit\n---\n"}, commit=_pinned())
        url.send(hub.url)
        url.recv()


def _pinned() -> str | None:
    from phi3_mlflow.weights import REVISIONS

    return REVISIONS.get(REPOSITORY)


@contextmanager
def hub() -> Iterator[str]:
    """The address of a stand-in for the hub, in a process of its own; commands are forked from one without threads."""
    here, there = _FORK.Pipe()
    process = _FORK.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.kill()
        process.join()


VERBS: dict[str, type[Verb]] = {
    "pull": Pull,
    "quantize": Quantize,
    "first": First,
    "log": Log,
    "register": Register,
}


def main() -> int:
    """Attacks what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50, help="kills of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", choices=VERBS, action="append", help="repeatable")
    asked = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]  # of other stores
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, hub() as url:
        for name in asked.only or VERBS:
            place = Path(folder, name)
            verb = Pull(place, url) if name == "pull" else VERBS[name](place)
            begin = time.monotonic()
            faults, ended = attack(verb, asked.times, asked.seed)
            took = time.monotonic() - begin
            print(
                f"{name}: {asked.times - ended} kills, {ended} too late, {len(faults)} faults, {took:.0f} s", flush=True
            )
            for fault in faults:
                print(f"  {fault}")
            wrong += len(faults)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
