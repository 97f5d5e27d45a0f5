"""Small MLflow models for the tests: what Azure's no-code image takes, and what it does not."""

from pathlib import Path

import mlflow
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

WEIGHTS = {"source": "embedded", "revision": "main", "license": "MIT", "sha256": "ab" * 32}
FLAT = """
import mlflow

class Echo(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.greeting = "echo"

    def predict(self, context, model_input, params=None):
        tokens = (params or {}).get("max_tokens")
        return [f"{self.greeting} {tokens}: {text}" for text in model_input["prompt"]]

mlflow.models.set_model(Echo())
"""
CHAT = """
import mlflow

class Chat(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        text = model_input["messages"].iloc[0][-1]["content"]
        message = {"role": "assistant", "content": "echo " + text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return [{"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}]

mlflow.models.set_model(Chat())
"""


def flat_signature(columns: tuple[ColSpec, ...] = (), params: tuple[ParamSpec, ...] = ()) -> ModelSignature:
    inputs = [ColSpec("string", "prompt"), ColSpec("string", "messages", required=False), *columns]
    options = [ParamSpec("max_tokens", "long", None), ParamSpec("temperature", "double", None), *params]
    return ModelSignature(Schema(inputs), Schema([ColSpec("string")]), ParamSchema(options))


def save(folder: Path, code: str, signature: ModelSignature | None, **options: object) -> Path:
    """Saves a small model with a weight file of 3 MB in it."""
    work = folder.parent / f"{folder.name}-source"
    work.mkdir(parents=True)
    (work / "code.py").write_text(code)
    (work / "weights.bin").write_bytes(bytes(range(256)) * 12_000)
    task = "llm/v1/chat" if code is CHAT else "flat"
    settings = {
        "pip_requirements": ["mlflow==3.17.2", "pandas==3.1.1"],
        "metadata": {"task": task, "format": 1, "weights": WEIGHTS},
        "artifacts": {"weights": str(work / "weights.bin")},
        **options,
    }
    mlflow.pyfunc.save_model(str(folder), python_model=str(work / "code.py"), signature=signature, **settings)
    return folder
