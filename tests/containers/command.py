"""`phi3-mlflow containerize` in this process, and what the tests of it need of the machine."""

import os
import shutil
from pathlib import Path

from click.testing import CliRunner, Result

from phi3_mlflow.cli import cli

ROOT = Path(__file__).resolve().parents[2]
NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")


def containerize(model: Path | str, folder: Path | str, *more: str) -> Result:
    """Runs the command."""
    return CliRunner().invoke(cli, ["containerize", str(model), str(folder), *more])
