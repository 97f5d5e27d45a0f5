"""`phi3-mlflow compare`: options in, a table out."""

import json
from pathlib import Path

import click
from click.core import ParameterSource

from phi3_mlflow.progress import Progress
from phi3_mlflow.verbs import as_json_option, emit

_QUESTIONS = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL MODEL...")
@click.option("--questions", type=_QUESTIONS, metavar="FILE.jsonl", help="A question a line.  [default: embedded]")
@click.option("--gate", metavar="ALIAS", help="Move this alias to the second model where it is not worse; else exit 1.")
@click.option("--margin", type=float, default=0.05, show_default=True, help="Gate: share of the questions it may lose.")
@click.option("--drift", type=float, default=0.01, show_default=True, help="Gate: change of tokens' log odds, or inf.")
@click.option("--slowdown", type=float, help="Gate: times the first model's time, such as 1.2.  [default: any]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the resampling for intervals.")
@as_json_option
@click.pass_context
def compare(
    context: click.Context,
    models: tuple[str, ...],
    questions: Path | None,
    gate: str | None,
    margin: float,
    drift: float,
    slowdown: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Compare logged models: quality, speed, memory, size, and how alike they answer.

    MODEL is any model URI of MLflow: models:/NAME@alias, models:/m-..., runs:/..., or a folder. The first one is the
    reference. All are loaded in this process, and the numbers become an MLflow run with a table and plots.

    \b
    Examples:
      phi3-mlflow compare models:/phi3-transformers/1 models:/phi3-onnx/1 --questions mine.jsonl
      phi3-mlflow compare models:/phi3@champion models:/phi3/2 --gate champion
    """
    if gate is None:
        for name in ("margin", "drift", "slowdown"):
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                raise click.UsageError(f"--{name} needs --gate ALIAS: it is a bound for moving an alias")
    unfinished = None
    with Progress("compare", hidden=as_json) as progress:  # before what takes long to import
        from phi3_mlflow.bars import no_bars
        from phi3_mlflow.compare import comparison
        from phi3_mlflow.compare.gate import Bounds
        from phi3_mlflow.compare.report import table

        bounds = None if gate is None else Bounds(margin, drift, slowdown)
        try:
            with no_bars():
                result = comparison.compare(models, questions, gate=gate, bounds=bounds, seed=seed, progress=progress)
        except comparison.Unfinished as error:
            unfinished, result = error, error.result
    run_id = result["run_id"]
    text = json.dumps(result, indent=2, ensure_ascii=False) if as_json else f"{table(result)}\n\nrun {run_id}"
    emit(text, kept=f"the run {run_id} has the result" if unfinished is None else None)
    if unfinished is not None:
        raise unfinished
    if gate is not None and not result["gate"]["passed"]:
        context.exit(1)
