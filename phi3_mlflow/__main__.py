"""`python -m phi3_mlflow` is the same as `phi3-mlflow`."""

from phi3_mlflow.cli import main

main()
