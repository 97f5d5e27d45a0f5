"""The command line: one verb, one function. Results go to stdout, everything else to stderr."""

import json
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import click

import phi3_mlflow
from phi3_mlflow.runtime.errors import InvalidRequest, Phi3Error

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


# Verbs that have a package of their own, with a module `cli` in it.
_ELSEWHERE = {
    "azure": "azure",
    "chat": "chat",
    "compare": "compare",
    "containerize": "containers",
    "serve": "serve",
}


class _Group(click.Group):
    """A group whose commands end with one line and exit code 1 where an error is meant for the user."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *_ELSEWHERE])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in _ELSEWHERE:
            command: click.Command = getattr(import_module(f"phi3_mlflow.{_ELSEWHERE[name]}.cli"), name)
            return command
        return super().get_command(context, name)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except InvalidRequest as error:
            raise click.UsageError(str(error)) from error
        except BrokenPipeError:  # click ends quietly
            raise
        except (Phi3Error, OSError) as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            raise click.ClickException(f"the Python package {error.name} is needed and is not installed") from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            # MLflow and its database; imported here, so that --help is quick.
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError

            if isinstance(error, (MlflowException, SQLAlchemyError)):
                raise click.ClickException(f"{str(error).splitlines()[0]}{_searched(error)}") from error
            raise


def _searched(error: Exception) -> str:
    """Where something that is not there was looked for."""
    import mlflow

    if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
        return ""
    stores = " and ".join(dict.fromkeys([mlflow.get_tracking_uri(), mlflow.get_registry_uri()]))
    return f" (looked for in {stores}; MLFLOW_TRACKING_URI names another store)"


def main() -> None:
    """The entry point of `phi3-mlflow`."""
    # Nothing is reported that nobody asked to be; MLflow reads this when it is imported.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    cli(prog_name="phi3-mlflow")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(phi3_mlflow.__version__, prog_name="phi3-mlflow")
def cli() -> None:
    """Microsoft's Phi-3 as MLflow models: build, serve, talk to them, take them to Azure ML.

    Every command works at once with the small embedded model; --weights names the real ones.

    \b
    Example:
      phi3-mlflow chat -p "What is the capital of Spain?"
    """
    # MLflow reports each step of making its database.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)


@cli.command()
@click.argument("weights")
@click.option(
    "--form", type=click.Choice(["transformers", "onnx"]), help="Default: onnx for ONNX repositories and folders."
)
@click.option("--revision", help="A branch, tag or commit. Default: the pinned commit.")
def pull(weights: str, form: str | None, revision: str | None) -> None:
    """Download weights, print their folder.

    \b
    Example:
      phi3-mlflow pull microsoft/Phi-3-mini-4k-instruct-onnx
    """
    from phi3_mlflow.weights import resolve

    onnx = form == "onnx" or (form is None and ("-onnx" in weights or Path(weights, "genai_config.json").exists()))
    click.echo(resolve(weights, "onnx" if onnx else "transformers", revision=revision).folder)


@cli.command()
@click.argument("model")
@click.option("--public-key", type=_FILE, metavar="FILE", help="Check the signature with this key (PEM).")
@click.option("--certificate", type=_FILE, metavar="FILE", multiple=True, help="Or with this certificate. Repeatable.")
@click.option("--signature", type=_FILE, metavar="FILE", help="Where it is.  [default: model.sig in the model]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of the table.")
@click.pass_context
def verify(
    context: click.Context,
    model: str,
    public_key: Path | None,
    certificate: tuple[Path, ...],
    signature: Path | None,
    as_json: bool,
) -> None:
    """Check a model's files and its signature.

    MODEL is any model URI of MLflow, or a folder. Nothing of it is loaded or run.

    \b
    Examples:
      phi3-mlflow verify models:/phi3@champion
      phi3-mlflow verify models:/phi3@champion --public-key signer.pem
    """
    from phi3_mlflow.verify import run, table

    checks = run(model, public_key=public_key, certificates=certificate, signature=signature, progress=not as_json)
    failed = any(check.status == "failed" for check in checks)
    if as_json:
        listed = [{"name": check.name, "status": check.status, "detail": check.detail} for check in checks]
        click.echo(json.dumps({"model": model, "ok": not failed, "checks": listed}, indent=2))
    else:
        click.echo(table(checks))
    context.exit(1 if failed else 0)


@cli.command()
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--adapter", type=_FOLDER, metavar="FOLDER", help="A LoRA adapter to merge into the weights first.")
@click.option("--precision", type=click.Choice(["int4", "fp32"]), default="int4", show_default=True)
@click.option(
    "--method",
    type=click.Choice(["rtn", "k_quant", "k_quant_mixed"]),
    default="rtn",
    show_default=True,
    help="Round to nearest, or search each block's scale; mixed keeps the most sensitive matrices in 8 bits.",
)
@click.option("--block-size", type=int, default=32, show_default=True, help="Weights that share a scale, 16 to 256.")
@click.option("--accuracy-level", type=int, default=4, show_default=True, help="4 is fast, 1 is exact.")
@click.option(
    "--symmetric/--asymmetric", default=None, help="Blocks without or with a zero point.  [default: by method]"
)
@click.option("--output-bits", type=int, help="Bits of the output matrix, 4 or 8.  [default: by method]")
@click.option("--check/--no-check", default=True, show_default=True, help="Compare the result with transformers.")
@click.option("--text", type=_FILE, metavar="FILE", help="What both read for that.  [default: a text of the toolkit's]")
@click.option("--max-perplexity-rise", type=float, metavar="PERCENT", help="Exit with 1 where the check finds more.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of the table.")
@click.pass_context
def quantize(
    context: click.Context,
    source: str,
    destination: Path,
    check: bool,
    text: Path | None,
    max_perplexity_rise: float | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Turn a transformers model into int4 ONNX, and measure what that costs.

    SOURCE is a folder, a Hugging Face id, or the URI of a logged transformers model.

    \b
    Examples:
      phi3-mlflow quantize ./Phi-3-mini-4k-instruct ./phi3-int4
      phi3-mlflow quantize models:/tuned@champion ./tuned-int4 --method k_quant --max-perplexity-rise 5
    """
    if not check and (text or max_perplexity_rise is not None):
        raise click.UsageError("--text and --max-perplexity-rise belong to the check: leave --no-check out")
    from phi3_mlflow.quantize import Check, evidence, export, steps
    from phi3_mlflow.quantize.check import TEXT

    asked = Check(text or TEXT, max_perplexity_rise) if check else None
    with steps.bar(disable=as_json) as report:
        folder = export(source, destination, check=asked, report=report, **choices)
    found = evidence.read(folder)
    assert found is not None
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **found.to_dict()}, indent=2))
    else:
        if found.check:
            click.echo(evidence.table(found) + "\n")
        click.echo(folder)
    context.exit(0 if found.check is None or found.check.passed else 1)


@cli.group()
def log() -> None:
    """Log (and register) a model, print its URI."""


def _log_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.option("--revision", help="A branch, tag or commit of the hub repository. Default: the pinned one."),
            click.option(
                "--task",
                type=click.Choice(["llm/v1/chat", "llm/v1/completions", "flat"]),
                help="Default: llm/v1/chat; flat has text columns in and text out.",
            ),
            click.option(
                "--target",
                type=click.Choice(["mlflow", "azure"]),
                default="mlflow",
                show_default=True,
                help="azure: the flat task and what Azure ML's no-code image needs.",
            ),
            click.option("--reference", is_flag=True, help="Hold no weights: name the hub's commit and their hashes."),
            click.option("--raw", is_flag=True, help="Other tasks: take prompts as they are, without chat template."),
            click.option(
                "--chat-template",
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="A file with a Jinja template in place of the weights' own.",
            ),
            click.option(
                "-c",
                "--config",
                multiple=True,
                metavar="NAME=VALUE",
                help="A default of the model, such as temperature=0.7 or context_length=2048. Repeatable.",
            ),
            click.option("--name", default="", help="Name of the logged model."),
            click.option("--register", default="", metavar="NAME", help="Register a version under this name."),
            click.option("--alias", default="", help="Alias for that version; models:/NAME@ALIAS then finds it."),
            click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of the URI."),
        ]
    ):
        command = option(command)
    return command


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{file} cannot be read as text: {error}") from error


def _log(*asked: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Logs models: all of them are checked before the first download, and downloaded before the first is logged."""
    import mlflow

    from phi3_mlflow.builders import onnx, transformers
    from phi3_mlflow.builders import plan as build
    from phi3_mlflow.runtime.snapshots import Reference

    plans = []
    for builder, options in asked:
        if options["raw"] and options["task"] in (None, "llm/v1/chat") and options["target"] == "mlflow":
            raise click.UsageError("--raw needs --task llm/v1/completions or --task flat: a chat has its template")
        planned = (onnx if builder == "onnx" else transformers).plan(
            options["weights"],
            revision=options["revision"] or None,
            task=options["task"],
            target=options["target"],
            reference=options["reference"],
            template=not options["raw"],
            chat_template=options["chat_template"] and _text(options["chat_template"]),
            model_config=parse_config(options["config"]),
        )
        entry = build.Entry(
            name=options["name"] or f"phi3-{builder}",
            registered_model_name=options["register"] or None,
            alias=options["alias"] or None,
        )
        plans.append((planned, entry))
    build.check(*plans)
    for planned, _ in plans:
        planned.source.fetch()
    results = []
    for (builder, _), (planned, entry) in zip(asked, plans, strict=True):
        info = build.log(planned, entry)
        result: dict[str, Any] = {"builder": builder, "model_uri": info.model_uri, "run_id": info.run_id}
        result["tracking_uri"] = mlflow.get_tracking_uri()
        if planned.reference:
            found = planned.source.fetch()
            result["pull"] = Reference(found.source, str(found.revision), builder).command  # type: ignore[arg-type]
        if entry.registered_model_name:
            result["registered"] = f"models:/{entry.registered_model_name}/{info.registered_model_version}"
        results.append(result)
    return results


def _log_and_print(as_json: bool, *asked: tuple[str, dict[str, Any]]) -> None:
    from phi3_mlflow.bars import no_bars

    with no_bars() if as_json else nullcontext():
        results = _log(*asked)
    if as_json:
        click.echo(json.dumps(results[0] if len(results) == 1 else results, indent=2))
        return
    for result in results:
        click.echo(result["model_uri"])
        if "registered" in result:
            click.echo(f"Registered as {result['registered']}", err=True)
        click.echo(f"Logged to {result['tracking_uri']}", err=True)
        if "pull" in result:
            click.echo(f"It holds no weights; other machines need them first:  {result['pull']}", err=True)
        click.echo(f"Serve it:  mlflow models serve -m {result['model_uri']} -p 5000 --env-manager local", err=True)


@log.command("transformers")
@click.option("--weights", default="embedded", show_default=True, help="embedded, a folder, or a Hugging Face id.")
@_log_options
def log_transformers(as_json: bool, **options: Any) -> None:
    """Log a transformers pipeline.

    \b
    Example:
      phi3-mlflow log transformers --weights microsoft/Phi-3-mini-4k-instruct --register phi3 --alias champion
    """
    _log_and_print(as_json, ("transformers", options))


@log.command("onnx")
@click.option("--weights", default="embedded", show_default=True, help="embedded, a folder, or a Hugging Face id.")
@_log_options
def log_onnx(as_json: bool, **options: Any) -> None:
    """Log an int4 ONNX model; needs no torch.

    \b
    Example:
      phi3-mlflow log onnx --weights microsoft/Phi-3-mini-4k-instruct-onnx -c temperature=0.7
    """
    _log_and_print(as_json, ("onnx", options))


@log.command("both")
@click.option("--transformers-weights", default="embedded", show_default=True, help="For the transformers model.")
@click.option("--onnx-weights", default="embedded", show_default=True, help="For the ONNX model.")
@_log_options
def log_both(transformers_weights: str, onnx_weights: str, as_json: bool, **options: Any) -> None:
    """Log one model of each kind; --name and --register get -transformers and -onnx appended.

    \b
    Example:
      phi3-mlflow log both --register phi3
    """
    asked = []
    for builder, weights in (("transformers", transformers_weights), ("onnx", onnx_weights)):
        named = {key: f"{options[key]}-{builder}" if options[key] else "" for key in ("name", "register")}
        asked.append((builder, {**options, **named, "weights": weights}))
    _log_and_print(as_json, *asked)


@cli.command()
@click.argument("model", required=False)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Of each prompt.")
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Of each answer.")
@click.option("--concurrency", default="1,2,4,8", show_default=True, help="Requests at once; 1 is always measured.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="The table has their medians.")
@click.option("--prefix", type=click.IntRange(1), default=400, show_default=True, help="Tokens that two prompts share.")
@click.option("--parallel", type=click.IntRange(1, 64), help="Load the model with this setting in place of its own.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Draw the numbers.")
@click.option("--log", "logged", is_flag=True, help="Log an MLflow run with the numbers, the plot and the table.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of the table.")
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

    plan = benchmark.Plan(concurrency=benchmark.parse_concurrency(concurrency), **sizes)
    result = benchmark.run(model, plan, parallel=parallel, plot=plot, log=logged)
    click.echo(json.dumps(result, indent=2) if as_json else table(result))
    if logged and not as_json:
        click.echo(f"\nrun {result['run_id']}")


def parse_config(pairs: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is JSON where it can be, else text; an empty value means not given."""
    config = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise click.UsageError(f"{pair!r} is not of the form NAME=VALUE")
        if value:
            try:
                config[name] = json.loads(value)
            except ValueError:
                config[name] = value
    return config
