"""Where a logged model is meant to run, and what that place asks of its requirements.

It knows requirement lines; it installs nothing and knows nothing of signatures.
"""

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

# What the no-code image needs beside a flat signature. Its scoring script imports azureml.ai.monitoring before it
# does anything else, and hands JSON text to pandas.read_json, which pandas 3 takes for a file name
# (assets/inference/environments/mlflow-py312-inference/context/mlflow_score_script.py of Azure/azureml-assets).
NO_CODE_REQUIREMENTS = ("azureml-ai-monitoring", "pandas<3")
MONITORING, PANDAS = (Requirement(line) for line in NO_CODE_REQUIREMENTS)
_FIRST_BAD_PANDAS = ("3.0.0", "3.1.0", "3.99.0", "4.0.0", "99.0.0")


# The task whose columns that image can load.
AZURE_TASK = "flat"


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
        if found and same(found.name, "pandas") and allows_pandas_3(found):
            kept = [part for part in map(str, found.specifier) if part and not _needs_3(part)]
            line = "pandas" + ",".join(sorted([*kept, "<3"], reverse=True))
        result.append(line)
    if "pandas" not in names:
        result.append(NO_CODE_REQUIREMENTS[1])
    if MONITORING.name not in names:
        result.append(NO_CODE_REQUIREMENTS[0])
    return result


def same(one: str, other: str) -> bool:
    """Whether two names mean the same package."""
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
