"""A model's own environment files, conda.yaml and requirements.txt: what Azure's no-code image asks of them.

It reads and adapts requirement lines; it installs nothing and knows nothing of signatures.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

# What the no-code image needs beside a flat signature. Its scoring script imports azureml.ai.monitoring before it
# does anything else, and hands JSON text to pandas.read_json, which pandas 3 takes for a file name
# (assets/inference/environments/mlflow-py312-inference/context/mlflow_score_script.py of Azure/azureml-assets).
NO_CODE_REQUIREMENTS = ("azureml-ai-monitoring", "pandas<3")
MONITORING, PANDAS = (Requirement(line) for line in NO_CODE_REQUIREMENTS)
_FIRST_BAD_PANDAS = ("3.0.0", "3.1.0", "3.99.0", "4.0.0", "99.0.0")


@dataclass(frozen=True)
class Environment:
    """What conda.yaml says.

    Args:
        data: the file's content, empty where the file is missing or no mapping.
        problem: why the file cannot be used, or "".
    """

    data: dict[str, Any]
    problem: str = ""

    @property
    def pip(self) -> list[str]:
        """The requirement lines of the pip section."""
        sections = [item["pip"] for item in self.data.get("dependencies") or [] if isinstance(item, dict)]
        return [str(line).strip() for section in sections for line in section or []]

    def find(self, name: str) -> Requirement | None:
        """The pip requirement on a package, or None."""
        return next((found for line in self.pip if (found := parse(line)) and _same(found.name, name)), None)

    @property
    def conda_pandas(self) -> bool:
        """Whether pandas is asked of conda rather than of pip."""
        names = [item for item in self.data.get("dependencies") or [] if isinstance(item, str)]
        return any(name.split("=")[0].split("<")[0].split(">")[0].strip() == "pandas" for name in names)


def read(folder: Path) -> Environment:
    """Reads conda.yaml of a model folder; a file that cannot be used is told in `problem`."""
    path = folder / "conda.yaml"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Environment({}, "conda.yaml is missing")
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return Environment({}, f"conda.yaml cannot be read: {str(error).splitlines()[0]}")
    if not isinstance(data, dict) or not isinstance(data.get("dependencies"), list):
        return Environment({}, "conda.yaml has no list of dependencies")
    environment = Environment(data)
    return environment if environment.pip else Environment(data, "conda.yaml has no pip section")


def parse(line: str) -> Requirement | None:
    """A requirement line as pip reads it, or None for an option, a path or a comment."""
    try:
        return Requirement(line.split(" #")[0].strip())
    except InvalidRequirement:
        return None


def allows_pandas_3(requirement: Requirement | None) -> bool:
    """Whether the installer may pick pandas 3 or later (an absent requirement leaves it free to)."""
    return requirement is None or any(requirement.specifier.contains(version) for version in _candidates(requirement))


def adapted(lines: list[str]) -> list[str]:
    """The requirement lines with `azureml-ai-monitoring` added and pandas held below 3.

    A pin on pandas 3 gives way to `pandas<3`; any other pandas requirement keeps its bounds and gets `<3` added.
    Applied twice it changes nothing.
    """
    result, names = [], set()
    for line in lines:
        found = parse(line)
        if found:
            names.add(canonicalize_name(found.name))
        if found and _same(found.name, "pandas") and allows_pandas_3(found):
            kept = [part for part in map(str, found.specifier) if part and not _needs_3(part)]
            line = "pandas" + ",".join(sorted([*kept, "<3"], reverse=True))
        result.append(line)
    if "pandas" not in names:
        result.append(NO_CODE_REQUIREMENTS[1])
    if MONITORING.name not in names:
        result.append(NO_CODE_REQUIREMENTS[0])
    return result


def adapt(folder: Path) -> None:
    """Rewrites conda.yaml and requirements.txt of a staged folder so that the no-code image can use them.

    Each file is written anew rather than in place: in a staging folder it may be a link to the model's own file.
    """
    environment = read(folder)
    if environment.problem:
        return
    data = dict(environment.data)
    others = [item for item in data["dependencies"] if not isinstance(item, dict)]
    data["dependencies"] = [*others, {"pip": adapted(environment.pip)}]
    if data != environment.data:
        _replace(folder / "conda.yaml", yaml.safe_dump(data, sort_keys=False))
    path = folder / "requirements.txt"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        if adapted(lines) != lines:
            _replace(path, "\n".join(adapted(lines)) + "\n")


def _replace(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text, encoding="utf-8")


def _same(one: str, other: str) -> bool:
    return canonicalize_name(one) == canonicalize_name(other)


def _candidates(requirement: Requirement) -> list[str]:
    named = [spec.version for spec in requirement.specifier if spec.operator in ("==", "===", ">=", "~=", "<=")]
    exact = [version.removesuffix(".*") for version in named]
    return [*_FIRST_BAD_PANDAS, *(version for version in exact if int(version.split(".")[0]) >= 3)]


def _needs_3(part: str) -> bool:
    """Whether a single bound can only be met by pandas 3 or later, or says no more than `<3` will."""
    if part.startswith(("==", "~=", ">=", "===")) and not part.startswith("!="):
        return int(part.lstrip("=~>").split(".")[0]) >= 3
    return part.startswith(("<", ">"))
