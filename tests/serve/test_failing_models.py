"""Models that fail again and again: how often they are loaded, and who is told what.

Run: pytest tests/serve/test_failing_models.py
"""

import asyncio
import logging
import re
import time

import httpx
import pytest
from logged import MADRID, SPAIN, ask, register

from phi3_mlflow.serve import memory
from phi3_mlflow.serve.app import Limits, Server
from phi3_mlflow.serve.errors import HttpError
from phi3_mlflow.serve.keys import Keys
from phi3_mlflow.serve.models import Models, Spec


@pytest.fixture(autouse=True)
def _leaves_the_environment(monkeypatch):
    """MLflow's scoring app notes in the environment that it serves."""
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "false")


def two(onnx_model):
    return Models([Spec("a", str(onnx_model)), Spec("b", str(onnx_model))])


def test_a_model_that_ends_at_each_request_rests_for_longer_and_longer_and_the_others_are_served(
    onnx_model, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "phi3_mlflow.serve")
    monkeypatch.setattr(memory, "RETRY_AFTER", 100.0)

    async def end(models):
        async with models.lease("a") as loaded:
            loaded.service.close()

    async def run():
        models = two(onnx_model)
        place = models._places["a"]
        transport = httpx.ASGITransport(app=Server(models, keys=Keys({}), limits=Limits()).app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            async def look():
                return [await client.get(path) for path in ("/health", "/ready")]

            seen = [await look()]
            await ask(models, "b")
            await end(models)
            seen.append(await look())
            await end(models)  # loaded again at once
            refused = [await client.post("/v1/chat/completions", json=SPAIN | {"model": "a"}) for _ in range(2)]
            seen.append(await look())
            other = await client.post("/v1/chat/completions", json=SPAIN | {"model": "b"})
            place.again = 0.0  # as if the time was over
            await end(models)
            with pytest.raises(HttpError, match="has failed 3 times in a row") as caught:
                await ask(models, "a")
            rests = place.again - time.monotonic()
            async with models.lease("b") as loaded:
                loaded.service.close()
            seen.append(await look())
            place.again = 0.0
            text = await ask(models, "a")
            seen.append(await look())
        await models.close(10)
        return seen, refused, other, caught.value, rests, text

    seen, refused, other, error, rests, text = asyncio.run(run())

    assert [[each.status_code for each in both] for both in seen] == [
        [200, 503], [200, 200], [200, 200], [503, 503], [200, 200],
    ]  # fmt: skip
    assert seen[0][1].json()["error"]["message"] == (
        "the server has no model in memory yet: each is loaded at its first request, or at the start with --preload"
    )
    assert [each.json() for each in seen[1]] == [
        {"failed": {"a": "has ended and is loaded again at the next request"}}
    ] * 2
    line = "has failed 2 times in a row while it answered; the server's log says why"
    assert re.fullmatch(
        rf"{line}; it is loaded again at the first request after \d\d+ seconds", seen[2][0].json()["failed"]["a"]
    )
    for each in seen[3]:
        assert "the model `a` has failed 3 times in a row" in each.json()["error"]["message"]
        assert "the model `b` has ended" in each.json()["error"]["message"]
    for each in refused:
        assert each.status_code == 503
        assert 0 < int(each.headers["retry-after"]) <= 100
        assert each.json()["error"]["message"] == f"the model `a` {line}"
    assert other.json()["choices"][0]["message"]["content"] == MADRID
    assert (error.status, text) == (503, MADRID)
    assert 100 < rests <= 200
    assert seen[4][0].json() == {"failed": {"b": "has ended and is loaded again at the next request"}}
    assert sum(each.getMessage().startswith("loading a (") for each in caplog.records) == 4


def test_what_a_model_failed_at_is_forgotten_when_it_has_gone_on_for_long_enough(onnx_model, monkeypatch):
    monkeypatch.setattr(memory, "STEADY", 0.0)

    async def run():
        models = two(onnx_model)
        for _ in range(3):
            async with models.lease("a") as loaded:
                loaded.service.close()
        text = await ask(models, "a")
        await models.close(10)
        return text

    assert asyncio.run(run()) == MADRID


def test_an_alias_that_is_unknown_is_told_with_the_models_name():
    register("unaliased")

    with pytest.raises(HttpError, match=r"`m` cannot be loaded: models:/unaliased@none means no version: .*none"):
        asyncio.run(ask(Models([Spec("m", "models:/unaliased@none")])))
