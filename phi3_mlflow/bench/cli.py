"""`phi3-mlflow bench`: options in, a table out."""

import json
from pathlib import Path

import click

from phi3_mlflow.verbs import as_json_option, emit


@click.command()
@click.argument("model", required=False)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Of each prompt.")
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Of each answer.")
@click.option("--concurrency", default="1,2,4,8", show_default=True, help="Requests at once; 1 is always measured.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="The table has their medians.")
@click.option("--prefix", type=click.IntRange(1), default=400, show_default=True, help="Tokens that two prompts share.")
@click.option("--parallel", type=click.IntRange(1, 64), help="Load the model with this setting in place of its own.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Draw the numbers.")
@click.option("--log", "logged", is_flag=True, help="Log an MLflow run with the numbers, the plot and the table.")
@as_json_option
def bench(
    model: str | None,
    concurrency: str,
    parallel: int | None,
    plot: Path | None,
    logged: bool,
    as_json: bool,
    **sizes: int,
) -> None:
    """Measure a logged model, or the embedded one: first token, tokens/s, memory.

    MODEL is any model URI of MLflow: models:/NAME@alias, models:/m-..., runs:/..., or a folder.
    It is loaded in this process; nothing else should run meanwhile.

    \b
    Examples:
      phi3-mlflow bench
      phi3-mlflow bench models:/phi3@champion --parallel 8 --plot phi3.png --log
    """
    from phi3_mlflow.bench import measure as benchmark
    from phi3_mlflow.bench.report import table
    from phi3_mlflow.unfinished import Unfinished

    plan = benchmark.Plan(concurrency=benchmark.parse_concurrency(concurrency), **sizes)
    unfinished = None
    try:
        result = benchmark.run(model, plan, parallel=parallel, plot=plot, log=logged)
    except Unfinished as error:
        unfinished, result = error, error.result
    run_id = result.get("run_id")
    text = table(result) + (f"\n\nrun {run_id}" if run_id else "")
    emit(json.dumps(result, indent=2) if as_json else text, kept=f"the run {run_id} has the result" if run_id else None)
    if unfinished is not None:
        raise unfinished
