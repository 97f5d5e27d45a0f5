"""A model's own environment files, conda.yaml and requirements.txt: what Azure's no-code image asks of them.

It reads and adapts requirement lines; it installs nothing and knows nothing of signatures.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

from phi3_mlflow.targets import adapted, parse, same


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
        return next((found for line in self.pip if (found := parse(line)) and same(found.name, name)), None)

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
