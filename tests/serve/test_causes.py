"""What clients and the log are told of an error.

Run: pytest tests/serve/test_causes.py
"""

import pytest
from mlflow.exceptions import MlflowException

from phi3_mlflow.runtime.errors import Phi3Error
from phi3_mlflow.serve.causes import logged, told


@pytest.mark.parametrize(
    ("error", "client"),
    [
        (Phi3Error("/srv/phi3/model.onnx.data is damaged"), "model.onnx.data is damaged"),
        (Phi3Error("the file '/srv/phi3/MLmodel' is no YAML"), "the file 'MLmodel' is no YAML"),
        (Phi3Error("models:/phi3@champion means no version"), "models:/phi3@champion means no version"),
        (Phi3Error("http://me:p@ss@host/x does not answer"), "http://host/x does not answer"),
        (MlflowException("a secret"), "MlflowException; the server's log says why"),
        (ValueError("a secret"), "ValueError; the server's log says why"),
    ],
)
def test_a_client_is_told_no_folder_no_password_and_nothing_of_libraries(error, client):
    assert told(error) == client


def test_the_log_is_told_the_folder_and_no_password():
    assert logged(Phi3Error("/srv/phi3 at\nhttp://me:p@ss@host/x")) == "/srv/phi3 at http://host/x"
    assert logged(ValueError("postgresql://me:secret@host/db")) == "ValueError: postgresql://host/db"
