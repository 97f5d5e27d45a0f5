"""`phi3-mlflow log`: options in, models logged and registered, their URIs out."""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import click

from phi3_mlflow.progress import Progress
from phi3_mlflow.verbs import emit, parse_config


@click.group()
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
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{file} cannot be read as text: {error}") from error
    if not text:
        raise click.UsageError(f"{file} is empty, and --chat-template needs a Jinja template")
    return text


# What is no setting of a model, and what to use in its place.
_OTHERS = {
    "task": "--task chooses it",
    "template": "--raw leaves it out",
    "name": "it follows from the weights",
    "format": "it is the runtime's own",
}


def _check(options: Mapping[str, Any]) -> None:
    """Refuses options that do not go together, in the command line's words; the builders would in Python's."""
    if options["raw"] and options["task"] in (None, "llm/v1/chat") and options["target"] == "mlflow":
        raise click.UsageError("--raw needs --task llm/v1/completions or --task flat: a chat has its template")
    if options["raw"] and options["chat_template"]:
        raise click.UsageError("--raw takes prompts as they are, and --chat-template does not: leave one out")
    if options["reference"] and options["chat_template"]:
        raise click.UsageError("--reference and --chat-template: the template is a part of the weights, leave one out")
    if options["alias"] and not options["register"]:
        raise click.UsageError("--alias needs --register: it is an alias of a registered version")
    for name in parse_config(options["config"]):
        if name in _OTHERS:
            raise click.UsageError(f"-c {name}: it is no setting of a model; {_OTHERS[name]}")


def _log(results: list[dict[str, Any]], say: Callable[[str], Any], *asked: tuple[str, dict[str, Any]]) -> None:
    """Logs models, then registers them.

    All of them are checked before the first download, downloaded before the first is logged, and logged before the
    first is registered.

    Args:
        results: gets what stands, as it comes to stand.
        say: is told of each step.
        asked: builders, and the options for each.
    """
    import mlflow

    from phi3_mlflow.builders import onnx, transformers
    from phi3_mlflow.builders import plan as build
    from phi3_mlflow.runtime.snapshots import Reference

    say("checking weights and stores")
    plans = []
    for builder, options in asked:
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
    say("fetching weights")
    for planned, _ in plans:
        planned.source.fetch()
    stored = []
    for (builder, _), (planned, entry) in zip(asked, plans, strict=True):
        say(f"writing the {builder} model")
        logged = build.store(planned, entry)
        stored.append(logged)
        result: dict[str, Any] = {"builder": builder, "model_uri": logged.info.model_uri}
        result |= {"run_id": logged.info.run_id, "tracking_uri": mlflow.get_tracking_uri()}
        if planned.reference:
            found = planned.source.fetch()
            result["pull"] = Reference(found.source, str(found.revision), builder).command  # type: ignore[arg-type]
        results.append(result)
    for result, logged, (_, entry) in zip(results, stored, plans, strict=True):
        if entry.registered_model_name is not None:
            say(f"registering the {result['builder']} model")
        with redirect_stderr(io.StringIO()):  # MLflow says the same in more lines
            info = build.register(logged, entry)
        if (name := entry.registered_model_name) is not None:
            result["registered"] = f"models:/{name}/{info.registered_model_version}"
            if entry.alias is not None:
                result["alias"] = f"models:/{name}@{entry.alias}"


@contextmanager
def _told(results: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Tells in one line what stands when the block fails, or is interrupted."""
    try:
        yield
    except BaseException as error:
        if results or isinstance(error, KeyboardInterrupt):
            click.echo(f"What stands: {_standing(results) or 'nothing was logged or registered'}", err=True)
        if isinstance(error, KeyboardInterrupt):
            raise click.Abort from error
        raise


def _standing(results: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{result['model_uri']} ({result['builder']}, "
        + (f"registered as {_names(result)})" if "registered" in result else "logged and not registered)")
        for result in results
    )


def _names(result: Mapping[str, Any]) -> str:
    return result["registered"] + (f", which is {result['alias']}" if "alias" in result else "")


def _log_and_print(as_json: bool, *asked: tuple[str, dict[str, Any]]) -> None:
    for _, options in asked:
        _check(options)
    results: list[dict[str, Any]] = []
    with _told(results), Progress("log", hidden=as_json) as progress:  # before what takes long to import
        from phi3_mlflow.bars import no_bars

        with no_bars() if as_json else nullcontext():
            _log(results, progress.say, *asked)
    if as_json:
        emit(json.dumps(results[0] if len(results) == 1 else results, indent=2))
        return
    for result in results:
        emit(result["model_uri"], kept=_standing(results))
        if "registered" in result:
            click.echo(f"Registered as {_names(result)}", err=True)
        click.echo(f"Logged to {result['tracking_uri']}", err=True)
        if "pull" in result:
            click.echo(f"It holds no weights; other machines need them first:  {result['pull']}", err=True)
        uri = result.get("alias") or result.get("registered") or result["model_uri"]
        click.echo(f"Serve it:  mlflow models serve -m {uri} -p 5000 --env-manager local", err=True)


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
