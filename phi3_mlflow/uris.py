"""What a person may give as a model: a folder, or a URI that MLflow knows."""

from pathlib import Path

from phi3_mlflow.runtime.errors import Phi3Error, without_passwords

FORMS = "a folder, models:/NAME@ALIAS, models:/NAME/VERSION, models:/ID or runs:/RUN/NAME"


def check(given: str) -> None:
    """Refuses a path where there is no folder, a registered model without a version, and the address of a server.

    Raises:
        Phi3Error: says where it was looked for, and what may be given.
    """
    name = given.removeprefix("models:").strip("/")
    # MLflow takes a name alone for the id of a logged model, and those begin with m-.
    if given.startswith("models:/") and name and not name.startswith("m-") and not {"/", "@"} & set(name):
        raise Phi3Error(
            f"{given} says no version: give one, such as models:/{name}/1, or an alias, such as models:/{name}@champion"
        )
    if given.startswith(("http://", "https://")) and "/mlflow-artifacts/artifacts" not in given:
        problem = f"{without_passwords(given)} is no address of a model's files"
        raise Phi3Error(f"{problem}; a model is given as {FORMS} (`chat --url` talks to a server)")
    if ":/" in given or Path(given).is_dir():
        return
    path = Path(given).absolute()
    problem = f"{path} is a file, and a model is a folder" if path.exists() else f"there is no folder {path}"
    raise Phi3Error(f"{problem}; a model is given as {FORMS}")
