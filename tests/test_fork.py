"""A process that forks after it has loaded a model, whichever way: the child is told at once, and the parent goes on.

Run with: python -m pytest tests/test_fork.py
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import mlflow
import pytest

PATIENCE = 60.0  # seconds after which a child counts as one that hangs; it takes some milliseconds
QUESTION = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
MODELS = {
    "genai": ("onnx", {"engine": "genai"}),
    "onnxruntime": ("onnx", {"engine": "onnxruntime", "parallel": 2}),
    "transformers": ("transformers", {}),
}
SAYS = (
    "the model was loaded before this process was forked, and its thread did not come along: load the model in the "
    "new process"
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")

loaded: mlflow.pyfunc.PyFuncModel  # what a child finds in its memory


@pytest.fixture(scope="module", params=MODELS)
def model(saved, request):
    """A model that has answered before, so that all its threads run."""
    global loaded
    builder, config = MODELS[request.param]
    loaded = mlflow.pyfunc.load_model(str(saved[builder]), model_config={"threads": 1, **config})
    before = loaded.predict(QUESTION)[0]["choices"][0]["message"]["content"]
    assert "Madrid" in before
    return loaded


def in_child() -> list[str]:
    """What a child is told."""
    told = []
    for ask in (
        lambda: loaded.predict(QUESTION),
        lambda: list(loaded.predict_stream(QUESTION)),
        lambda: loaded.predict([QUESTION, QUESTION]),
    ):
        try:
            ask()
        except mlflow.MlflowException as error:
            told.append(error.message)
    return told


def by_fork() -> list[str]:
    """os.fork itself; what preloading servers do."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, "\n".join(in_child()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    limit = time.monotonic() + PATIENCE
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > limit:
            os.kill(child, 9)
            os.waitpid(child, 0)
            break
        time.sleep(0.01)
    with os.fdopen(reader) as told:
        return told.read().split("\n")


def put(queue) -> None:
    queue.put(in_child())


def by_process() -> list[str]:
    """multiprocessing.Process."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=put, args=(queue,))
    process.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
        return []
    return queue.get()


def by_pool() -> list[str]:
    """concurrent.futures."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
    try:
        return pool.submit(in_child).result(PATIENCE)
    except TimeoutError:
        for process in list(pool._processes.values()):
            process.kill()
        return []
    finally:
        pool.shutdown()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", [by_fork, by_process, by_pool])
def test_a_forked_child_is_told_in_one_line_at_once_and_the_parent_answers_on(model, way: Callable[[], list[str]]):
    assert way() == [SAYS] * 3
    assert "Madrid" in model.predict(QUESTION)[0]["choices"][0]["message"]["content"]
