"""Aliases that move in a real registry, and what a server makes of it.

Run: pytest tests/serve/test_watch.py
"""

import asyncio
import json
import logging
import signal
from pathlib import Path

import mlflow
import pytest
from logged import MADRID, SPAIN, Slow, answer, ask, damaged, logged, point, register, until
from mlflow.tracking import MlflowClient
from stores import server

from phi3_mlflow.builders import onnx
from phi3_mlflow.serve import watch as watch_module
from phi3_mlflow.serve.models import Models, Spec

# Seconds between two questions to the registry.
OFTEN = 0.05


@pytest.fixture(autouse=True)
def _leaves_the_environment(monkeypatch):
    """MLflow's scoring app notes in the environment that it serves."""
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "false")


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO, "phi3_mlflow.serve")


def watching(name: str, **options) -> Models:
    return Models([Spec("m", f"models:/{name}@champion")], watch=True, watch_seconds=OFTEN, **options)


def version(models: Models) -> str | None:
    return next((each.version for each in models.loaded()), None)


def lines(caplog, text: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


@pytest.mark.parametrize("max_loaded", [None, 1])
def test_the_new_version_takes_over_and_the_old_one_is_closed_when_its_answers_are_done(max_loaded):
    name = f"moves-{max_loaded}"
    register(name, alias="champion")
    register(name)

    async def run():
        models = watching(name, max_loaded=max_loaded)
        await models.start(preload=True)
        async with models.lease("m") as old:
            point(name, "champion", 2)
            await until(lambda: version(models) == "2")
            async with models.lease("m") as new:
                assert new is not old
                assert await answer(new) == MADRID
            assert old.service.statistics().alive
            assert await answer(old) == MADRID
        await until(lambda: not old.service.statistics().alive)
        point(name, "champion", 1)
        await until(lambda: version(models) == "1")
        text = await ask(models)
        await models.close(10)
        return text

    assert asyncio.run(run()) == MADRID


def test_no_request_fails_while_the_alias_moves_to_and_fro():
    register("busy", alias="champion")
    register("busy")

    async def run():
        models = watching("busy")
        await models.start(preload=True)
        ended, texts = False, []

        async def use():
            while not ended:
                texts.append(await ask(models))

        users = [asyncio.create_task(use()) for _ in range(4)]
        for number in ("2", "1", "2"):
            point("busy", "champion", number)
            await until(lambda number=number: version(models) == number)
        ended = True
        await asyncio.gather(*users)
        await models.close(10)
        return texts

    texts = asyncio.run(run())

    assert len(texts) > 3
    assert set(texts) == {MADRID}


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_and_is_told_once(caplog):
    register("breaks", alias="champion")
    register("breaks", damaged())
    register("breaks")

    async def run():
        models = watching("breaks")
        await models.start(preload=True)
        (old,) = models.loaded()
        point("breaks", "champion", 2)
        await until(lambda: lines(caplog, "stays with version 1"))
        await asyncio.sleep(10 * OFTEN)
        stays = models.loaded() == [old]
        text = await ask(models)
        point("breaks", "champion", 3)
        await until(lambda: version(models) == "3")
        await models.close(10)
        return stays, text

    assert asyncio.run(run()) == (True, MADRID)
    (line,) = lines(caplog, "stays with")
    assert line.startswith("m stays with version 1, because version 2 failed: ")
    assert "model.onnx.data is damaged" in line


def test_a_version_that_failed_is_tried_again_after_some_time(caplog, monkeypatch):
    monkeypatch.setattr(watch_module, "AGAIN", 0.3)
    register("mended", alias="champion")
    uri = damaged()
    register("mended", uri)
    file = Path(mlflow.artifacts.download_artifacts(uri)) / "artifacts" / "weights" / "model.onnx.data"
    whole = Path(mlflow.artifacts.download_artifacts(logged())) / "artifacts" / "weights" / "model.onnx.data"

    async def run():
        models = watching("mended")
        await models.start(preload=True)
        point("mended", "champion", 2)
        await until(lambda: len(lines(caplog, "loading what")) >= 2)
        file.write_bytes(whole.read_bytes())
        await until(lambda: version(models) == "2")
        await models.close(10)

    asyncio.run(run())

    assert len(lines(caplog, "stays with")) == 1


@pytest.mark.parametrize(
    ("example", "why"),
    [
        ({"messages": []}, "`messages`"),
        (SPAIN | {"stop": ["The"]}, "its answer to its input example is empty"),
    ],
)
def test_a_version_that_cannot_answer_its_own_example_does_not_take_over(example, why, caplog):
    name = f"mute-{why}".replace("`", "").replace(" ", "-")
    register(name, alias="champion")
    uri = onnx.log_model(name="mute").model_uri
    folder = Path(mlflow.artifacts.download_artifacts(uri))
    (folder / "input_example.json").write_text(json.dumps(example), "utf-8")
    register(name, uri)

    async def run():
        models = watching(name)
        await models.start(preload=True)
        point(name, "champion", 2)
        await until(lambda: lines(caplog, "stays with version 1, because version 2 failed"))
        text, present = await ask(models), version(models)
        await models.close(10)
        return text, present

    assert asyncio.run(run()) == (MADRID, "1")
    assert why in lines(caplog, "stays with")[0]


def test_a_version_that_does_not_load_in_time_is_given_up(caplog, onnx_model, tmp_path):
    slow = Slow(onnx_model, tmp_path / "slow")
    register("slow-version", alias="champion")
    MlflowClient().create_model_version("slow-version", slow.folder.as_uri())

    async def run():
        models = watching("slow-version", load_timeout=30)
        await models.start(preload=True)
        models._memory._load_timeout = 0.3
        point("slow-version", "champion", 2)
        await until(lambda: lines(caplog, "version 2 failed: it was not loaded within 0.3 seconds"))
        text = await ask(models)
        slow.finish()
        await asyncio.sleep(0.5)
        present = version(models)
        await models.close(10)
        return text, present

    assert asyncio.run(run()) == (MADRID, "1")


def test_close_abandons_a_change_under_way(onnx_model, tmp_path, caplog):
    slow = Slow(onnx_model, tmp_path / "slow")
    register("closing", alias="champion")
    MlflowClient().create_model_version("closing", slow.folder.as_uri())

    async def run():
        models = watching("closing")
        await models.start(preload=True)
        point("closing", "champion", 2)
        await until(lambda: lines(caplog, "loading what"))
        await models.close(10)
        slow.finish()
        await asyncio.sleep(0.5)
        return models.loaded()

    assert asyncio.run(run()) == []


def test_a_model_that_is_not_in_memory_is_loaded_as_what_the_alias_means_then(caplog):
    register("later", alias="champion")
    register("later")

    async def run():
        models = watching("later")
        await models.start(preload=False)
        point("later", "champion", 2)
        await asyncio.sleep(5 * OFTEN)
        before = models.loaded()
        async with models.lease("m") as loaded:
            found = loaded.version
        await models.close(10)
        return before, found

    assert asyncio.run(run()) == ([], "2")


def test_without_watching_the_version_stays():
    register("still", alias="champion")
    register("still")

    async def run():
        models = Models([Spec("m", "models:/still@champion")], watch=False, watch_seconds=OFTEN)
        await models.start(preload=True)
        point("still", "champion", 2)
        await asyncio.sleep(5 * OFTEN)
        found = version(models)
        await models.close(10)
        return found

    assert asyncio.run(run()) == "1"


def test_an_alias_that_is_gone_for_a_while_is_told_once_and_disturbs_nobody(caplog):
    register("gone", alias="champion")
    register("gone")

    async def run():
        models = watching("gone")
        await models.start(preload=True)
        MlflowClient().delete_registered_model_alias("gone", "champion")
        await until(lambda: lines(caplog, "nobody says"))
        await asyncio.sleep(10 * OFTEN)
        text, present = await ask(models), version(models)
        point("gone", "champion", 2)
        await until(lambda: version(models) == "2")
        await models.close(10)
        return text, present

    assert asyncio.run(run()) == (MADRID, "1")
    (line,) = lines(caplog, "nobody says")
    assert line.startswith("m stays as it is: nobody says what models:/gone@champion means: ")
    assert len(lines(caplog, "answers again")) == 1


def test_a_registry_that_does_not_answer_is_told_once_and_disturbs_nobody(tmp_path, monkeypatch, caplog, tracking):
    monkeypatch.setattr(watch_module, "SLOW", 5)
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def run(process):
        models = watching("remote")
        await models.start(preload=True)
        downloads = list(tmp_path.glob("phi3-mlflow-*"))
        process.send_signal(signal.SIGSTOP)
        await until(lambda: lines(caplog, "nobody says"))
        text = await ask(models)
        process.send_signal(signal.SIGCONT)
        await until(lambda: lines(caplog, "answers again"))
        point("remote", "champion", 2)
        await until(lambda: version(models) == "2")
        await models.close(10)
        return len(downloads), text

    with server(tmp_path, f"sqlite:///{tmp_path / 'server.db'}") as (address, process):
        try:
            mlflow.set_tracking_uri(address)
            mlflow.set_experiment("Default")
            uri = onnx.log_model(name="remote").model_uri
            register("remote", uri, alias="champion")
            register("remote", uri)
            found = asyncio.run(run(process))
        finally:
            mlflow.set_tracking_uri(tracking)
            mlflow.set_experiment("tests")

    assert found == (1, MADRID)
    (line,) = lines(caplog, "nobody says")
    assert line.endswith("the registry has not answered for 5 seconds")
    assert not list(tmp_path.glob("phi3-mlflow-*"))  # what was downloaded
