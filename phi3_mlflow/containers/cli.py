"""`phi3-mlflow containerize`: a logged model in, a folder out."""

import json
import sys
from pathlib import Path

import click

from phi3_mlflow.verbs import emit, parse_config


@click.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", default="phi3", show_default=True, help="Of the served model, and of all in the cluster.")
@click.option("--image", default="phi3-mlflow:latest", show_default=True, help="The image's reference.")
@click.option("--cpus", type=click.IntRange(1, 1024), default=4, show_default=True, help="Cores of each copy.")
@click.option("--parallel", type=click.IntRange(1, 64), help="Answers computed at once. Default: the model's, else 4.")
@click.option("-c", "--config", multiple=True, metavar="NAME=VALUE", help="A setting or default of the model.")
@click.option("--memory", metavar="SIZE", help="Of the loaded model, such as 3GiB; it is not loaded to measure it.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of the folder.")
def containerize(
    model: str,
    folder: Path,
    name: str,
    image: str,
    cpus: int,
    parallel: int | None,
    config: tuple[str, ...],
    memory: str | None,
    as_json: bool,
) -> None:
    """Write what runs `serve` for a model: Dockerfile, compose, Kubernetes, KServe.

    MODEL is any model URI of MLflow: models:/NAME@alias, models:/m-..., runs:/..., or a folder. FOLDER must not exist,
    or be empty. The model is copied into it, and loaded once to measure its memory; no image is built.

    \b
    Example:
      phi3-mlflow containerize models:/phi3@champion ./phi3-container --image registry.example/phi3:1
    """
    from phi3_mlflow.azure.model import opened
    from phi3_mlflow.runtime.sizes import Bytes

    from .plan import check_folder, plan
    from .write import write

    check_folder(folder)  # before anything is downloaded
    with opened(model) as found:
        planned = plan(
            found,
            folder,
            name=name,
            image=image,
            cpus=cpus,
            parallel=parallel,
            settings=parse_config(config),
            loaded=None if memory is None else Bytes().check("memory", memory),
            say=lambda line: click.echo(line, err=True),
            progress=not as_json and sys.stderr.isatty(),
        )
        write(planned, folder, progress=not as_json and sys.stderr.isatty())
    if as_json:
        size = {"request_mib": planned.memory.request, "limit_mib": planned.memory.limit, "kv_bytes": planned.memory.kv}
        emit(json.dumps({"folder": str(folder), "image": image, "name": name, "memory": size}, indent=2))
        return
    emit(str(folder))
    click.echo(f"Memory: {planned.memory.request} MiB, at most {planned.memory.limit} MiB", err=True)
    click.echo(f"Build it:  docker build --tag {image} {folder}", err=True)
