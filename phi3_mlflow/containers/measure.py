"""Loads a model as `serve` does, has it answer once, and prints how much memory the process held.

    python -m phi3_mlflow.containers.measure FOLDER < settings.json

A process of its own, so that nothing else is in the number. Standard input is `{"parallel", "settings"}`; the answer is
`{"resident", "peak"}` in bytes, null where the system does not tell.
"""

import json
import sys

from phi3_mlflow import machine
from phi3_mlflow.runtime.errors import Phi3Error
from phi3_mlflow.serve import app, server, traces  # noqa: F401  they are in the server's memory too
from phi3_mlflow.serve.served import Spec, load

# Seconds for one short answer.
_ANSWER = 300.0


def main() -> None:
    """Measures the model whose folder is on the command line."""
    asked = json.load(sys.stdin)
    try:
        loaded = load(Spec("phi3", sys.argv[1]), parallel=asked["parallel"], settings=asked["settings"])
        try:
            loaded.ask(_ANSWER)
            json.dump({"resident": machine.resident(), "peak": machine.peak()}, sys.stdout)
        finally:
            loaded.close()
    except Phi3Error as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
