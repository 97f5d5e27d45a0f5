"""Azure's no-code image, as far as a served payload can tell: what it does at load, and what it makes of a request.

Written after the behaviour of the image's published scoring script and of inference-schema 1.8. It knows nothing of
the image's web server, its conda environment or its data collection.
"""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import yaml
from mlflow.models import Model
from mlflow.pyfunc.scoring_server import _get_jsonable_obj
from mlflow.types.schema import Schema
from packaging.requirements import Requirement


class LoadFailed(Exception):
    """The image's worker would not start."""


class NoCodeImage:
    """A model loaded the way the image loads it."""

    def __init__(self, folder: Path):
        self._environment(folder)
        model = Model.load(str(folder))
        self._transformers = "transformers" in model.flavors
        self._sample = self._example(folder, model)
        if model.signature is not None:
            if not self._transformers and self._sample is None:
                self._sample = self._dataframe(model.signature.inputs)
            elif self._transformers:
                self._scalars(model.signature.inputs)
                self._sample = {}
            if model.signature.outputs:
                self._dataframe(model.signature.outputs)
        if isinstance(self._sample, dict) and not self._transformers:
            for name, value in self._sample.items():
                if not isinstance(value, np.ndarray):
                    raise LoadFailed(f"NumpyParameterType takes no {type(value).__name__} ({name})")
        self._takes_params = bool(model.signature and model.signature.params)
        self._model = mlflow.pyfunc.load_model(str(folder))

    def score(self, body: dict[str, Any]) -> Any:
        """The answer to a request body; a KeyError, TypeError or ValueError where the image answers with an error."""
        unknown = set(body) - {"input_data", "params"}
        if unknown:
            raise TypeError(f"run() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        params = body.get("params")
        if params is not None and self._takes_params and not isinstance(params, dict):
            raise ValueError("Invalid input data type to parse")
        given = body["input_data"]
        if isinstance(self._sample, pd.DataFrame):
            data = pd.read_json(StringIO(json.dumps(given)), orient="split", dtype=False)
            kinds = self._sample.dtypes.to_dict()
            data = data.astype({name: kinds.get(name, object) for name in data.columns})
        elif isinstance(given, dict) and {"columns", "index", "data"} <= set(given):
            data = pd.read_json(StringIO(json.dumps(given)), orient="split", dtype=False)
        else:
            data = given
        return json.loads(json.dumps(_get_jsonable_obj(self._model.predict(data, params=params), "records")))

    def _environment(self, folder: Path) -> None:
        dependencies = yaml.safe_load((folder / "conda.yaml").read_text())["dependencies"]
        lines = next(item["pip"] for item in dependencies if isinstance(item, dict))
        found = {requirement.name: requirement for requirement in map(Requirement, lines)}
        if "azureml-ai-monitoring" not in found:
            raise LoadFailed("ModuleNotFoundError: No module named 'azureml'")
        if "pandas" not in found or found["pandas"].specifier.contains("3.1.1"):
            raise LoadFailed("FileNotFoundError: pandas 3 reads no JSON text")

    def _example(self, folder: Path, model: Model) -> Any:
        info = model.saved_input_example_info
        if not info:
            return None
        loaded = json.loads((folder / info["artifact_path"]).read_text())
        if info["type"] == "dataframe":
            orient = "split" if "columns" in loaded else "values"
            return pd.read_json(StringIO(json.dumps(loaded)), orient=orient, dtype=False)
        return loaded

    def _dataframe(self, schema: Schema) -> pd.DataFrame:
        try:
            types = dict(zip(schema.input_names(), schema.pandas_types(), strict=True))
            return pd.DataFrame(columns=list(types)).astype(types)
        except Exception as error:
            raise LoadFailed(f"no sample for {schema}: {error}") from error

    def _scalars(self, schema: Schema) -> None:
        for column in schema.inputs:
            if type(column.type).__name__ != "DataType":
                raise LoadFailed(f"Unhandled input type in dictionary value: {column.type}")
