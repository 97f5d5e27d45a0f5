"""The command line: one verb, one function. Results go to stdout, everything else to stderr."""

import io
import json
import logging
import os
import shlex
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

import phi3_mlflow
from phi3_mlflow.runtime.errors import InvalidRequest, Phi3Error, shown, without_passwords
from phi3_mlflow.verbs import as_json_option, emit, untaken

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


# Verbs that have a package of their own, with a module `cli` in it.
_ELSEWHERE = {
    "azure": "azure",
    "bench": "bench",
    "chat": "chat",
    "compare": "compare",
    "containerize": "containers",
    "log": "builders",
    "serve": "serve",
}

# Whose errors come through MLflow as they are, such as that there are no credentials.
_CLOUDS = ("azure", "boto3", "botocore", "google")


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
        except KeyboardInterrupt as error:
            if sys.stderr.isatty():  # click ends the line on which the terminal shows ^C
                raise
            raise click.Abort from error
        except (Phi3Error, OSError) as error:
            raise click.ClickException(without_passwords(str(error))) from error
        except ModuleNotFoundError as error:
            raise click.ClickException(f"the Python package {error.name} is needed and is not installed") from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            # MLflow and its database; imported here, so that --help is quick.
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError

            if isinstance(error, (MlflowException, SQLAlchemyError)):
                told = shown(f"{str(error).splitlines()[0]}{_searched(error)}")
                raise click.ClickException(without_passwords(told)) from error
            if type(error).__module__.partition(".")[0] in _CLOUDS:
                from phi3_mlflow.chat.texts import line

                told = f"the store of the files was not reached: {line(str(error))}"
                raise click.ClickException(without_passwords(told)) from error
            raise


def _searched(error: Exception) -> str:
    """Where something that is not there was looked for."""
    if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
        return ""
    from phi3_mlflow.tracking import searched

    return f" ({searched()})"


def main() -> None:
    """The entry point of `phi3-mlflow`."""
    # Nothing is reported that nobody asked to be, and MLflow tells no steps; it reads these when it is imported.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")  # a folder's name, which need not be text, comes out as it is
    try:
        cli(prog_name="phi3-mlflow")
    except OSError as error:  # help, or the version; commands have told of theirs
        told = untaken(error)
        told.show()
        sys.exit(told.exit_code)
    finally:
        # All is said. The end of the interpreter takes seconds with torch, and each of its parts would tell of Ctrl-C.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


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
    emit(str(resolve(weights, "onnx" if onnx else "transformers", revision=revision).folder))


@cli.command()
@click.argument("model")
@click.option("--public-key", type=_FILE, metavar="FILE", help="Check the signature with this key (PEM).")
@click.option("--certificate", type=_FILE, metavar="FILE", multiple=True, help="Or with this certificate. Repeatable.")
@click.option("--signature", type=_FILE, metavar="FILE", help="Where it is.  [default: model.sig in the model]")
@as_json_option
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
        emit(json.dumps({"model": model, "ok": not failed, "checks": listed}, indent=2))
    else:
        emit(shown(table(checks)))
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
@click.option("--accuracy-level", type=int, default=4, show_default=True, help="4 is fast, 1 computes in fp32.")
@click.option(
    "--symmetric/--asymmetric", default=None, help="Blocks without or with a zero point.  [default: by method]"
)
@click.option("--output-bits", type=int, help="Bits of the output matrix, 4 or 8.  [default: by method]")
@click.option("--check/--no-check", default=True, show_default=True, help="Compare the result with transformers.")
@click.option("--text", type=_FILE, metavar="FILE", help="What both read for that.  [default: a text of the toolkit's]")
@click.option("--max-perplexity-rise", type=float, metavar="PERCENT", help="Exit with 1 where the check finds more.")
@as_json_option
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
    passed = found.check is None or found.check.passed
    if as_json:
        emit(json.dumps({"folder": str(folder), **found.to_dict()}, indent=2))
    else:
        emit(f"{evidence.table(found)}\n\n{folder}" if found.check else str(folder))
        if passed:
            click.echo(f"Log it:  phi3-mlflow log onnx --weights {shlex.quote(str(folder))}", err=True)
    context.exit(0 if passed else 1)
