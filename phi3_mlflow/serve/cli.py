"""`phi3-mlflow serve`: options in, a running server out."""

import asyncio
import logging
import os
import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from phi3_mlflow import uris as model_uris
from phi3_mlflow.verbs import Number, parse_config

if TYPE_CHECKING:
    from .served import Spec


def _names(given: tuple[str, ...], uris: tuple[str, ...]) -> list[tuple[str, str]]:
    """(served name, URI) of each model, in the order of the command line."""
    from .folders import registered

    named = []
    for pair in given:
        name, separator, uri = pair.partition("=")
        if not (name and separator and uri):
            raise click.UsageError(f"--name {pair!r} is not of the form NAME=URI")
        named.append((name, uri))
    named += [((registered(uri) or [Path(uri).name])[0], uri) for uri in uris]
    names = [name for name, _ in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise click.UsageError(f"two models would be called {twice[0]!r}: give them names with --name NAME=URI")
    return named


def _look_up(spec: "Spec") -> None:
    """Tells at once what is nowhere, and not at its first request."""
    import mlflow
    from mlflow.models import get_model_info

    from phi3_mlflow import tracking
    from phi3_mlflow.runtime import mlmodel
    from phi3_mlflow.runtime.errors import Phi3Error

    from .folders import locate
    from .server import ServeError

    place = ""
    try:
        model_uris.check(spec.uri)
        if Path(spec.uri).is_dir():
            mlmodel.load(Path(spec.uri))
        else:
            place = f" ({tracking.searched()})"
            get_model_info(locate(spec.uri)[0])
    except (Phi3Error, mlflow.MlflowException, OSError, ValueError) as error:
        raise ServeError(f"the model `{spec.name}` cannot be loaded: {str(error).splitlines()[0]}{place}") from error


def _lines(access_log: str) -> AbstractContextManager[TextIO]:
    """Where the access log goes."""
    if access_log == "-":
        return nullcontext(sys.stderr)
    try:
        return Path(access_log).open("a", encoding="utf-8")
    except OSError as error:
        problem = f"--access-log: {access_log} cannot be written ({error.strerror})"
        raise click.ClickException(f"{problem}; name a file in a folder that can, - for stderr, or none") from error


@click.command(context_settings={"auto_envvar_prefix": "PHI3_MLFLOW_SERVE"})
@click.argument("uris", nargs=-1, metavar="[MODEL_URI]...")
@click.option("--name", "named", multiple=True, metavar="NAME=URI", help="Serve a model under this name. Repeatable.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("-p", "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option("--preload", is_flag=True, help="Load models at the start, not at their first request.")
@click.option("--max-loaded", type=click.IntRange(1), help="Models in memory; the least recently used one goes.")
@click.option("--load-timeout", type=Number(1), default=300.0, show_default=True, help="Seconds for a load.")
@click.option("--watch", is_flag=True, help="Follow aliases: when @champion moves, the new version takes over.")
@click.option("--watch-seconds", type=Number(0.1), default=10.0, show_default=True, help="Between two looks.")
@click.option("--keys", type=click.Path(path_type=Path), help="A file with API keys, NAME=KEY a line.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Let pages of this origin call. Repeatable.")
@click.option("--trusted-proxy", multiple=True, metavar="ADDRESS", help="Take its X-Forwarded-For. Repeatable.")
@click.option("--max-body", type=click.IntRange(1024), default=4 * 2**20, show_default=True, help="Bytes of a request.")
@click.option("--timeout", type=Number(0.1), default=600.0, show_default=True, help="Seconds for an answer.")
@click.option("--max-concurrent", type=click.IntRange(1), help="Requests at once, those that wait included.")
@click.option("--drain", type=Number(0), default=30.0, show_default=True, help="Seconds to finish in.")
@click.option("--parallel", type=click.IntRange(1, 64), help="Answers computed at once. Default: the model's, else 4.")
@click.option("-c", "--config", multiple=True, metavar="NAME=VALUE", help="A setting or default of the models.")
@click.option("--trace", type=Number(0, 1), help="Trace this share of requests to MLflow, such as 1 or 0.1.")
@click.option(
    "--access-log", default="-", metavar="FILE", help="JSON lines, or none.  [default: stderr, plain on a terminal]"
)
@click.option("--log-prompts", is_flag=True, help="Let the access log have prompts and answers.")
def serve(
    uris: tuple[str, ...],
    named: tuple[str, ...],
    host: str,
    port: int,
    preload: bool,
    max_loaded: int | None,
    load_timeout: float,
    watch: bool,
    watch_seconds: float,
    keys: Path | None,
    cors: tuple[str, ...],
    trusted_proxy: tuple[str, ...],
    max_body: int,
    timeout: float,
    max_concurrent: int | None,
    drain: float,
    parallel: int | None,
    config: tuple[str, ...],
    trace: float | None,
    access_log: str,
    log_prompts: bool,
) -> None:
    """Serve logged models, or the embedded one: OpenAI's API, MLflow's, a chat page.

    MODEL_URI is any model URI of MLflow: models:/NAME@alias, models:/m-..., runs:/..., or a folder. API keys may also
    stand in the environment variable PHI3_MLFLOW_API_KEYS, as NAME=KEY,NAME=KEY.

    \b
    Examples:
      phi3-mlflow serve
      phi3-mlflow serve models:/phi3@champion --watch --preload
      phi3-mlflow serve --name fast=models:/phi3-onnx/1 --name exact=models:/phi3-transformers/1
    """
    from phi3_mlflow.logged import given_or_embedded
    from phi3_mlflow.runtime.settings import check_values

    from . import page
    from .access import AccessLog
    from .app import Limits, Server
    from .background import Background
    from .keys import read
    from .metrics import Metrics
    from .models import Models
    from .records import Observer
    from .served import Spec
    from .server import Process, is_public, listen
    from .server import serve as run
    from .traces import Traces

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # between the lines of the log
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("uvicorn", "uvicorn.error", "httpx", "alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    settings: dict[str, Any] = parse_config(config)
    check_values(settings)
    known = read(keys)
    process = Process(host, port, drain, preload, trusted_proxy)
    with ExitStack() as stack:
        lines = None if access_log == "none" else stack.enter_context(_lines(access_log))
        listening = stack.enter_context(listen(process))  # before any work
        specs = [Spec(*each) for each in _names(named, uris)]
        if not specs:
            specs = [Spec("phi3", stack.enter_context(given_or_embedded(None)))]
        for spec in specs:
            _look_up(spec)
        models = Models(
            specs,
            max_loaded=max_loaded,
            parallel=parallel,
            load_timeout=load_timeout,
            watch=watch,
            watch_seconds=watch_seconds,
            settings=settings,
        )
        observers: list[Observer] = []
        backgrounds: dict[str, Background] = {}
        traces = None
        if trace is not None:
            traces = Traces(trace)
            stack.callback(traces.close)
            observers.append(traces)
            backgrounds["traces"] = traces.queue
        if lines is not None:
            log = AccessLog(lines, prompts=log_prompts, plain=lines.isatty())
            stack.callback(log.close)
            observers.append(log)
            backgrounds["access log"] = log.lines
        metrics = Metrics(**backgrounds)
        observers.append(metrics)
        limits = Limits(body=max_body, seconds=timeout, concurrent=max_concurrent)
        server = Server(
            models,
            keys=known,
            limits=limits,
            observers=observers,
            metrics=metrics.render,
            feedback=None if traces is None else traces.feedback,
            page=page.routes(),
            origins=cors,
            hosts=None if known or is_public(host) else {"localhost", "127.0.0.1", "::1", host},
        )
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        click.echo(f"Serving {', '.join(spec.name for spec in specs)} at {address}", err=True)
        click.echo(f"Chat page: {address}/   OpenAI base URL: {address}/v1   Ctrl-C ends", err=True)
        if is_public(host) and not known:
            click.echo("Warning: other machines can reach this address, and no API key is asked for (--keys)", err=True)
        asyncio.run(run(server, process, listening))
