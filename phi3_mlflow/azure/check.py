"""Whether a logged model will load in Azure ML, rule by rule: in the no-code image, and in a container deployment.

It reads the model's folder only: no network, no Azure package, no weights in memory.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from phi3_mlflow.azure import environment as environments
from phi3_mlflow.azure.model import LoggedModel
from phi3_mlflow.targets import NO_CODE_REQUIREMENTS, allows_pandas_3

Mode = Literal["ncd", "container"]
MODES: tuple[Mode, ...] = ("ncd", "container")
MODE_NAMES: dict[Mode, str] = {"ncd": "no-code image", "container": "container deployment"}
DEFAULT_UPLINK = 20.0
# azure-ai-ml asks the datastore for a signature that lives one hour (expireAfterHours of its list_secrets call).
TOKEN_SECONDS = 3600
_SCALARS = frozenset({"string", "long", "integer", "double", "float", "boolean"})
_IGNORE_FILES = (".amlignore", ".gitignore")
# An example that the no-code image can read is a DataFrame or none.
AZURE_EXAMPLE_TYPES = frozenset({"dataframe"})
# https://learn.microsoft.com/rest/api/storageservices/naming-and-referencing-containers--blobs--and-metadata
_LONGEST_BLOB_NAME, _MOST_SEGMENTS = 1024, 254
_PREFIX_LENGTH = 120


@dataclass(frozen=True)
class Finding:
    """One rule's answer.

    Args:
        rule: the rule's name.
        status: "ok", "warning" (works, but see the fix) or "failed".
        modes: the ways of deployment that the rule decides about; empty for a rule about the upload with
            azure-ai-ml or the studio, which `azure register` works around.
        found: what was found.
        fix: what to do; "" where nothing has to be done.
        mended: whether `azure register` mends it by itself in the copy that it uploads.
    """

    rule: str
    status: Literal["ok", "warning", "failed"]
    modes: tuple[Mode, ...]
    found: str
    fix: str = ""
    mended: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The finding as JSON data."""
        return asdict(self)


def check(model: LoggedModel, uplink: float = DEFAULT_UPLINK) -> list[Finding]:
    """All findings about a model.

    Args:
        model: the logged model, or a staged copy of it.
        uplink: the speed of the line in megabits a second, above 0, for the estimate of the upload.

    Returns:
        One finding for every rule, in a fixed order.
    """
    rules: tuple[Callable[[LoggedModel], Finding], ...] = (
        _pyfunc,
        _inputs,
        _outputs,
        _params,
        _example,
        _environment,
        _monitoring,
        _pandas,
        _weights,
        _links,
        _names,
        _ignore_files,
        _folder_name,
    )
    return [*(rule(model) for rule in rules), _size(model, uplink)]


def passing(findings: list[Finding]) -> tuple[Mode, ...]:
    """The ways of deployment that no failed rule speaks against."""
    return tuple(mode for mode in MODES if not any(f.status == "failed" and mode in f.modes for f in findings))


def passing_staged(findings: list[Finding]) -> tuple[Mode, ...]:
    """As `passing`, for the copy that `azure register` uploads."""
    return passing([finding for finding in findings if not finding.mended])


def failures(findings: list[Finding], mode: Mode) -> list[Finding]:
    """The failed rules that speak against one way of deployment."""
    return [finding for finding in findings if finding.status == "failed" and mode in finding.modes]


def upload_seconds(size: int, uplink: float) -> float:
    """Seconds that `size` bytes take at `uplink` megabits a second."""
    return size * 8 / (uplink * 1e6)


def _pyfunc(model: LoggedModel) -> Finding:
    flavor = model.flavors.get("python_function")
    if not flavor or not flavor.get("loader_module"):
        found = f"the flavors are {', '.join(sorted(model.flavors)) or 'none'}, without a usable python_function"
        return Finding("pyfunc flavor", "failed", MODES, found, "log the model with `phi3-mlflow log`")
    return Finding("pyfunc flavor", "ok", MODES, f"python_function, loaded by {flavor['loader_module']}")


def _inputs(model: LoggedModel) -> Finding:
    columns = model.columns("inputs")
    fix = "log it with `phi3-mlflow log ... --target azure`, or deploy with --mode container"
    if not columns:
        return Finding("input columns", "failed", ("ncd",), "the signature has no input columns", fix)
    bad = [f"{c.get('name', '(unnamed)')}: {c['type']}" for c in columns if c["type"] not in _SCALARS]
    if bad:
        found = f"the no-code image crashes at load on {', '.join(bad)}"
        return Finding("input columns", "failed", ("ncd",), found, fix)
    unnamed = [c for c in columns if not c.get("name")]
    if unnamed:
        found = "an input column without a name"
        return Finding("input columns", "failed", ("ncd",), found, fix)
    return Finding("input columns", "ok", ("ncd",), ", ".join(f"{c['name']}: {c['type']}" for c in columns))


def _outputs(model: LoggedModel) -> Finding:
    columns = model.columns("outputs") or []
    bad = [f"{c.get('name', '(unnamed)')}: {c['type']}" for c in columns if c["type"] not in _SCALARS]
    if bad:
        fix = "log it with `phi3-mlflow log ... --target azure`, or deploy with --mode container"
        found = f"the no-code image crashes at load on {', '.join(bad)}"
        return Finding("output columns", "failed", ("ncd",), found, fix)
    return Finding("output columns", "ok", ("ncd",), ", ".join(c["type"] for c in columns) or "none")


def _params(model: LoggedModel) -> Finding:
    params = model.columns("params") or []
    bad = [str(p.get("name")) for p in params if p.get("type") not in _SCALARS or p.get("shape") is not None]
    if bad:
        found = f"parameters that are no single value: {', '.join(bad)}"
        fix = "log it with `phi3-mlflow log ... --target azure`, or deploy with --mode container"
        return Finding("parameters", "failed", ("ncd",), found, fix)
    return Finding("parameters", "ok", ("ncd",), f"{len(params)} single values")


def _example(model: LoggedModel) -> Finding:
    example = model.data.get("saved_input_example_info")
    if not example:
        return Finding("input example", "ok", ("ncd",), "none")
    kind = example.get("type")
    if kind not in AZURE_EXAMPLE_TYPES:
        found = f"the example is of type {kind}, which crashes the no-code image at load"
        fix = "log the model with a DataFrame as its example or with none, or deploy with --mode container"
        return Finding("input example", "failed", ("ncd",), found, fix)
    if not (model.folder / str(example.get("artifact_path"))).is_file():
        found = f"MLmodel names the example {example.get('artifact_path')}, which is not in the folder"
        return Finding("input example", "warning", ("ncd",), found, "log the model again")
    return Finding("input example", "ok", ("ncd",), "a DataFrame")


def _environment(model: LoggedModel) -> Finding:
    environment = environments.read(model.folder)
    if environment.problem:
        return Finding("environment files", "failed", MODES, environment.problem, "log the model again")
    if not (model.folder / "requirements.txt").is_file():
        found = "requirements.txt is missing"
        return Finding("environment files", "failed", ("container",), found, "log the model again")
    local = [line for line in environment.pip if re.match(r"(-e\b|-r\b|--editable|\.{0,2}/|file:|[A-Za-z]:\\)", line)]
    local += [line for line in environment.pip if "@ file:" in line]
    if local:
        found = f"requirements that only the logging machine can install: {', '.join(sorted(set(local)))}"
        return Finding("environment files", "failed", MODES, found, "log the model with requirements from an index")
    if not environment.find("mlflow") and not environment.find("mlflow-skinny"):
        found = "conda.yaml does not ask for mlflow, which serves the model in a container"
        fix = "log the model with mlflow among its requirements"
        return Finding("environment files", "failed", ("container",), found, fix)
    return Finding("environment files", "ok", MODES, f"{len(environment.pip)} requirements")


def _monitoring(model: LoggedModel) -> Finding:
    if environments.read(model.folder).find(NO_CODE_REQUIREMENTS[0]) is None:
        found = "conda.yaml lacks azureml-ai-monitoring, which the no-code image imports first"
        fix = "`azure register` adds it to the staged copy, `log ... --target azure` to the model itself"
        return Finding("azureml-ai-monitoring", "failed", ("ncd",), found, fix, mended=True)
    return Finding("azureml-ai-monitoring", "ok", ("ncd",), "in conda.yaml")


def _pandas(model: LoggedModel) -> Finding:
    environment = environments.read(model.folder)
    requirement = environment.find("pandas")
    if environment.conda_pandas:
        found, fix = "pandas is asked of conda", "ask pip for `pandas<3` instead, and log the model again"
        return Finding("pandas below 3", "failed", ("ncd",), found, fix)
    if allows_pandas_3(requirement):
        found = f"the environment can get pandas 3 ({requirement or 'no bound on pandas'})"
        fix = "`azure register` holds it below 3 in the staged copy, `log ... --target azure` in the model itself"
        return Finding("pandas below 3", "failed", ("ncd",), found, fix, mended=True)
    return Finding("pandas below 3", "ok", ("ncd",), str(requirement))


def _weights(model: LoggedModel) -> Finding:
    reference = model.place.reference
    if reference is not None:
        found = f"the model refers to {reference.source} on the hub, and holds no weights"
        fix = f"`azure register` puts them in from the hub's cache (`{reference.command}`)"
        return Finding("weights", "failed", MODES, found, fix, mended=True)
    return Finding("weights", "ok", MODES, "in the model")


def _links(model: LoggedModel) -> Finding:
    broken = [path for path in sorted(model.folder.rglob("*")) if path.is_symlink() and not path.exists()]
    if broken:
        names = ", ".join(str(path.relative_to(model.folder)) for path in broken[:3])
        return Finding("links", "failed", MODES, f"links that lead nowhere: {names}", "restore the files, or log again")
    return Finding("links", "ok", MODES, "none is broken")


def _names(model: LoggedModel) -> Finding:
    names = [path.relative_to(model.folder).as_posix() for path in model.files()]
    bad = [name for name in names if _bad_name(name)]
    if bad:
        found = f"names that blob storage does not take: {', '.join(repr(name[:80]) for name in bad[:3])}"
        fix = "rename them: no part ends with a dot, no backslash or control character, at most 900 characters"
        return Finding("file names", "failed", MODES, found, fix)
    return Finding("file names", "ok", MODES, f"{len(names)} files")


def _bad_name(name: str) -> bool:
    parts = name.split("/")
    return (
        len(name) + _PREFIX_LENGTH > _LONGEST_BLOB_NAME
        or len(parts) + 4 > _MOST_SEGMENTS
        or any(part.endswith(".") for part in parts)
        or any(ord(letter) < 32 or ord(letter) == 127 or letter == "\\" for letter in name)
        or not name.isprintable()
    )


def _ignore_files(model: LoggedModel) -> Finding:
    found = [name for name in _IGNORE_FILES if (model.folder / name).exists()]
    if found:
        text = f"{' and '.join(found)}: azure-ai-ml drops the files it matches from an upload, in silence"
        return Finding("ignore files", "warning", (), text, "delete it; `azure register` leaves it out", mended=True)
    return Finding("ignore files", "ok", (), "none")


def _folder_name(model: LoggedModel) -> Finding:
    name = model.folder.resolve().name
    if "." in name:
        text = f"a dot in the folder name {name}: azure-ai-ml refuses it after the whole upload"
        fix = "rename the folder; `azure register` uses a name of its own"
        return Finding("folder name", "warning", (), text, fix, mended=True)
    return Finding("folder name", "ok", (), name)


def _size(model: LoggedModel, uplink: float) -> Finding:
    seconds = upload_seconds(model.size, uplink)
    found = f"{model.size / 1e6:,.1f} MB, {seconds / 60:,.0f} min at {uplink:g} Mbit/s"
    if seconds > TOKEN_SECONDS:
        fix = (
            "azure-ai-ml's upload token ends after one hour: `azure register` renews it and resumes; or upload with "
            "azcopy from a faster line and register with --remote-path"
        )
        return Finding("size", "warning", (), found, fix)
    return Finding("size", "ok", (), found)
