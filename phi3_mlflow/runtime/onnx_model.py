"""The ONNX model as MLflow's PythonModel, in models-from-code form: MLflow runs this file, and no pickle is made."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from phi3_mlflow.runtime.model import load


class Phi3OnnxModel(PythonModel):
    """Answers by the int4 ONNX weights through onnxruntime-genai."""

    def load_context(self, context: PythonModelContext) -> None:
        """Checks and loads the weights that were logged as the artifact `weights`."""
        # They lie in artifacts/weights of the model's folder.
        self._predictor = load(Path(context.artifacts["weights"]).parent.parent, context.model_config or {})
        # MLflow keeps what `set_model` was given until it loads another model. The weights must not live as long.
        mlflow.models.model.__mlflow_model__ = None

    # MLflow makes a signature of most type hints; for a DataFrame it keeps the logged one.
    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[Any]:
        """One completion for each row; see Predictor.predict."""
        return self._predictor.predict(model_input, params)

    def predict_stream(
        self, context: PythonModelContext, model_input: Any, params: dict[str, Any] | None = None
    ) -> Iterator[Any]:
        """One completion in chunks; see Predictor.predict_stream."""
        return self._predictor.predict_stream(model_input, params)


mlflow.models.set_model(Phi3OnnxModel())
