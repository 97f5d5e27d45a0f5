"""Which models a server has, which of them are in memory, and who waits for what.

Run: pytest tests/serve/test_models.py
"""

import asyncio
import logging
import threading
import time
from pathlib import Path

import httpx
import mlflow
import pytest
from logged import MADRID, SPAIN, Slow, answer, ask, damaged, register, until

from phi3_mlflow.builders import onnx
from phi3_mlflow.runtime.errors import Phi3Error, Unavailable
from phi3_mlflow.serve import memory
from phi3_mlflow.serve.errors import HttpError
from phi3_mlflow.serve.models import Models, Spec

LONG = SPAIN | {"response_format": {"type": "regex", "regex": "[a-z ]{3000}"}, "max_tokens": 3000}


@pytest.fixture(autouse=True)
def _leaves_the_environment(monkeypatch):
    """MLflow's scoring app notes in the environment that it serves."""
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "false")


@pytest.fixture
def slow(onnx_model, tmp_path):
    model = Slow(onnx_model, tmp_path / "slow")
    yield model
    model.finish()  # no thread is left behind where the test failed


def lines(caplog, start: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(start)]


def two(onnx_model: Path, **options) -> Models:
    return Models([Spec("a", str(onnx_model)), Spec("b", str(onnx_model))], **options)


def test_a_model_is_found_by_every_name_that_the_server_was_given():
    models = Models([Spec("mini", "models:/phi@champion"), Spec("old", "models:/other/3"), Spec("x", "runs:/1/m")])

    for name in (None, "mini", "phi", "phi@champion", "models:/phi@champion"):
        assert models.find(name).name == "mini", name
    for name in ("old", "other", "other:3", "models:/other/3"):
        assert models.find(name).name == "old", name
    assert models.find("runs:/1/m").name == "x"


@pytest.mark.parametrize(
    "name", ["phi:3", "phi@challenger", "other:4", "models:/phi/3", "models:/m-1", "/etc", "runs:/2/m", "", "m"]
)
def test_what_the_server_was_not_given_is_not_found_and_the_error_names_the_served_models(name):
    models = Models([Spec("mini", "models:/phi@champion"), Spec("old", "models:/other/3"), Spec("x", "runs:/1/m")])

    with pytest.raises(HttpError, match="mini, old, x") as caught:
        models.find(name)

    assert caught.value.status == 404
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_registered_name_that_several_models_have_means_none_of_them():
    models = Models([Spec("a", "models:/phi@champion"), Spec("b", "models:/phi/3"), Spec("c", "models:/other/1")])

    with pytest.raises(HttpError, match=r"several models; name one of a, b$"):
        models.find("phi")


def test_two_models_of_one_name_are_refused():
    with pytest.raises(Phi3Error, match="'a'"):
        Models([Spec("a", "models:/one/1"), Spec("a", "models:/two/1")])


def test_a_model_is_loaded_at_its_first_request_and_then_listed_with_its_context_length(onnx_model, caplog):
    caplog.set_level(logging.INFO, "phi3_mlflow.serve")

    async def run():
        models = two(onnx_model)
        await models.start(preload=False)
        before = models.list()
        text = await ask(models, "b")
        after = models.list()
        names = [each.name for each in models.loaded()]
        await models.close(10)
        return before, text, after, names

    before, text, after, names = asyncio.run(run())

    assert text == MADRID
    assert names == ["b"]
    assert [(each["loaded"], each["max_model_len"]) for each in before] == [(False, None)] * 2
    assert [(each["id"], each["loaded"], each["max_model_len"]) for each in after] == [
        ("a", False, None),
        ("b", True, 4096),
    ]
    assert [(each["object"], each["owned_by"], each["root"]) for each in after] == [
        ("model", "phi3_mlflow", name) for name in "ab"
    ]
    assert str(onnx_model) not in str(after)
    assert lines(caplog, "loading b (") == [f"loading b ({onnx_model}) ..."]
    assert len(lines(caplog, "loaded b in ")) == 1


def test_a_model_is_found_by_every_kind_of_uri_with_its_id_and_version_and_nothing_is_written():
    with mlflow.start_run() as run:
        info = onnx.log_model(name="kinds")
    version = register("kinds", info.model_uri, alias="champion")
    folder = Path(mlflow.artifacts.download_artifacts(info.model_uri))
    files = sorted(folder.rglob("*"))
    uris = {
        info.model_uri: None,
        f"models:/kinds/{version}": version,
        "models:/kinds@champion": version,
        "models:/kinds/latest": version,
        f"runs:/{run.info.run_id}/kinds": None,
        str(folder): None,
        folder.as_uri(): None,
    }

    async def look(uri):
        models = Models([Spec("m", uri)])
        async with models.lease("m") as loaded:
            found = loaded.model_id, loaded.version, loaded.folder.path, await answer(loaded)
        await models.close(10)
        return found

    for uri, number in uris.items():
        assert asyncio.run(look(uri)) == (info.model_id, number, folder, MADRID), uri
    assert sorted(folder.rglob("*")) == files


def test_an_onnx_model_answers_four_requests_at_once_where_nobody_says_otherwise(saved, onnx_model, tmp_path):
    own = tmp_path / "own"
    onnx.save_model(own, model_config={"parallel": 2})
    specs = [Spec("onnx", str(onnx_model)), Spec("own", str(own)), Spec("transformers", str(saved["transformers"]))]

    async def slots(**options):
        models = Models(specs, **options)
        await models.start(preload=True)
        found = {each.name: each.service.slots for each in models.loaded()}
        await models.close(10)
        return found

    assert asyncio.run(slots()) == {"onnx": 4, "own": 2, "transformers": 1}
    assert asyncio.run(slots(parallel=3)) == {"onnx": 3, "own": 3, "transformers": 1}


def test_settings_change_every_model_and_an_unknown_one_is_told(onnx_model):
    async def length(settings):
        models = two(onnx_model, settings=settings)
        try:
            async with models.lease("a") as loaded:
                return loaded.service.context_length, loaded.service.slots
        finally:
            await models.close(10)

    assert asyncio.run(length({"context_length": 256, "parallel": 1})) == (256, 1)
    with pytest.raises(HttpError, match=r"the model `a` cannot be loaded: `contxt` is not a setting"):
        asyncio.run(length({"contxt": 256}))


def test_requests_for_one_model_load_it_once_and_others_are_answered_meanwhile(onnx_model, slow, caplog):
    caplog.set_level(logging.INFO, "phi3_mlflow.serve")

    async def run():
        models = Models([Spec("slow", str(slow.folder)), Spec("quick", str(onnx_model))])
        waiting = [asyncio.create_task(ask(models, "slow")) for _ in range(5)]
        assert await ask(models, "quick") == MADRID
        assert not any(task.done() for task in waiting)
        slow.finish()
        texts = await asyncio.gather(*waiting)
        leases = [each.leases for each in models.loaded()]
        await models.close(10)
        return texts, leases

    texts, leases = asyncio.run(run())

    assert texts == [MADRID] * 5
    assert leases == [0, 0]
    assert len(lines(caplog, "loading slow")) == len(lines(caplog, "loaded slow")) == 1


def test_a_load_that_takes_too_long_is_told_to_those_who_wait_and_goes_on(slow):
    async def run():
        models = Models([Spec("slow", str(slow.folder))], load_timeout=0.3)
        outcomes = await asyncio.gather(*(ask(models) for _ in range(3)), return_exceptions=True)
        start = time.monotonic()
        with pytest.raises(HttpError) as late:  # the time is over already
            await ask(models)
        waited = time.monotonic() - start
        slow.finish()
        await until(models.loaded)
        text = await ask(models)
        await models.close(10)
        return [*outcomes, late.value], waited, text

    errors, waited, text = asyncio.run(run())

    for error in errors:
        assert isinstance(error, HttpError)
        assert error.status == 503
        assert error.retry_after
        assert "`slow` is not loaded after 0.3 seconds" in str(error)
    assert waited < 0.3
    assert text == MADRID


def test_a_load_that_fails_is_told_to_all_who_wait_and_tried_again_later(caplog, monkeypatch):
    monkeypatch.setattr(memory, "RETRY_AFTER", 0.5)
    caplog.set_level(logging.INFO, "phi3_mlflow.serve")
    uri = damaged()

    async def run():
        models = Models([Spec("broken", uri)])
        at_once = await asyncio.gather(*(ask(models) for _ in range(3)), return_exceptions=True)
        again = await asyncio.gather(ask(models), return_exceptions=True)
        loads = len(lines(caplog, "loading"))
        await asyncio.sleep(0.6)
        later = await asyncio.gather(ask(models), return_exceptions=True)
        await models.close(10)
        return at_once + again + later, loads

    errors, loads = asyncio.run(run())

    for error in errors:
        assert isinstance(error, HttpError)
        assert (error.status, error.retry_after) == (503, 1)
        assert str(error).startswith("the model `broken` cannot be loaded: ")
        assert "model.onnx.data is damaged" in str(error)
        assert "\n" not in str(error)
    assert loads == 1
    assert len(lines(caplog, "loading")) == 2
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("uri", ["models:/nobody/1", "models:/nobody@champion", "models:/m-0", "runs:/0/m", "/nowhere"])
def test_a_model_that_does_not_exist_is_a_503_in_one_line(uri):
    async def run():
        models = Models([Spec("gone", uri)])
        with pytest.raises(HttpError, match=r"the model `gone` cannot be loaded: .*(found|MLmodel)") as caught:
            await ask(models)
        await models.close(1)
        return caught.value

    error = asyncio.run(run())

    assert error.status == 503
    assert "\n" not in str(error)


def test_the_least_recently_used_idle_model_gives_its_place_to_another(onnx_model):
    async def run():
        specs = [Spec(name, str(onnx_model)) for name in "abc"]
        models = Models(specs, max_loaded=2)
        await models.start(preload=True)
        preloaded = [each.name for each in models.loaded()]
        async with models.lease("a"):
            pass
        (old,) = [each for each in models.loaded() if each.name == "b"]
        assert await ask(models, "c") == MADRID
        after = [each.name for each in models.loaded()]
        async with models.lease("a"):  # in use, though not used for longer than c
            assert await ask(models, "c") == MADRID
            assert await ask(models, "b") == MADRID
            with_a = [each.name for each in models.loaded()]
        await models.close(10)
        return preloaded, old.service.statistics().alive, after, with_a

    preloaded, alive, after, with_a = asyncio.run(run())

    assert preloaded == ["a", "b"]
    assert not alive
    assert after == ["a", "c"]
    assert with_a == ["a", "b"]


def test_a_load_waits_while_all_places_are_in_use_and_begins_when_one_is_given_back(onnx_model):
    async def run():
        models = two(onnx_model, max_loaded=1)
        async with models.lease("a") as loaded:
            waiting = asyncio.create_task(ask(models, "b"))
            assert await answer(loaded) == MADRID
            assert not waiting.done()
            assert [each.name for each in models.loaded()] == ["a"]
        text = await waiting
        names = [each.name for each in models.loaded()]
        await models.close(10)
        return text, names

    assert asyncio.run(run()) == (MADRID, ["b"])


def test_a_load_that_finds_no_place_in_time_is_a_503_and_leaves_nothing_behind(onnx_model, caplog):
    caplog.set_level(logging.INFO, "phi3_mlflow.serve")

    async def run():
        models = two(onnx_model, max_loaded=1, load_timeout=30)
        async with models.lease("a"):
            models._memory._load_timeout = 0.2
            with pytest.raises(HttpError, match="`b` waits for its place in memory") as caught:
                await ask(models, "b")
        await asyncio.sleep(0.2)
        names = [each.name for each in models.loaded()]
        await models.close(10)
        return caught.value, names

    error, names = asyncio.run(run())

    assert (error.status, error.retry_after) == (503, 10)
    assert names == ["a"]
    assert not lines(caplog, "loading b")


def test_a_model_that_is_always_in_use_does_not_keep_others_out_for_ever(onnx_model, monkeypatch):
    monkeypatch.setattr(memory, "FAIR", 0.3)

    async def run():
        models = two(onnx_model, max_loaded=1)
        ended = False

        async def use():
            while not ended:
                await ask(models, "a")

        users = [asyncio.create_task(use()) for _ in range(3)]
        await until(models.loaded)
        text = await ask(models, "b")
        ended = True
        await asyncio.gather(*users)  # those of a were answered too
        await models.close(10)
        return text

    assert asyncio.run(run()) == MADRID


@pytest.mark.parametrize("where", ["while it is loaded", "while all places are in use"])
def test_a_request_that_is_cancelled_while_it_waits_leaves_nothing_behind(where, onnx_model, slow):
    async def run():
        models = Models([Spec("slow", str(slow.folder)), Spec("a", str(onnx_model))], max_loaded=1)
        if where == "while it is loaded":
            waiting = asyncio.create_task(ask(models, "slow"))
            await asyncio.sleep(0.2)
            waiting.cancel()
            slow.finish()
            await until(models.loaded)
            (loaded,) = models.loaded()
            assert (loaded.name, loaded.leases) == ("slow", 0)
        else:
            async with models.lease("a") as loaded:
                waiting = asyncio.create_task(ask(models, "slow"))
                await asyncio.sleep(0.2)
                waiting.cancel()
                await asyncio.wait({waiting})
            await asyncio.sleep(0.2)
            assert [(each.name, each.leases) for each in models.loaded()] == [("a", 0)]
        assert waiting.cancelled()
        assert await ask(models, "a") == MADRID
        await models.close(10)

    asyncio.run(run())


def test_a_request_that_is_cancelled_as_its_model_comes_gives_its_lease_back(onnx_model):
    async def run():
        models = two(onnx_model)
        place = models._places["a"]
        waiting = asyncio.create_task(ask(models, "a"))
        await until(lambda: place.waiters)
        # What is called when the waiter is done is called before the waiting task goes on.
        place.waiters[0].add_done_callback(lambda _: waiting.cancel())
        await asyncio.wait({waiting})
        leases = [each.leases for each in models.loaded()]
        await models.close(10)
        return waiting.cancelled(), leases

    assert asyncio.run(run()) == (True, [0])


def test_a_model_whose_thread_died_is_loaded_again(onnx_model):
    async def run():
        models = two(onnx_model)
        async with models.lease("a") as first:
            first.service.close()
        async with models.lease("a") as second:
            text = await answer(second)
        await models.close(10)
        return first is second, text

    assert asyncio.run(run()) == (False, MADRID)


def test_close_lets_answers_finish_and_refuses_what_comes(onnx_model):
    async def run():
        models = two(onnx_model)
        async with models.lease("a") as loaded:
            closing = asyncio.create_task(models.close(60))
            await asyncio.sleep(0)
            with pytest.raises(HttpError, match="the server is ending") as caught:
                await ask(models, "a")
            text = await answer(loaded)
            assert not closing.done()
        await closing
        return caught.value.status, text, loaded.service.statistics().alive

    assert asyncio.run(run()) == (503, MADRID, False)


def test_close_cuts_what_does_not_end_in_time_and_a_second_call_ends_at_once(onnx_model):
    async def run():
        models = two(onnx_model)
        async with models.lease("a") as loaded:
            task = asyncio.create_task(answer(loaded, LONG))
            closing = asyncio.create_task(models.close(600))
            await asyncio.sleep(0.1)
            await models.close(0)
            await closing
            with pytest.raises(Unavailable):
                await task
        await models.close(0)

    asyncio.run(run())


def test_close_ends_those_who_wait_and_what_is_loaded_later_is_closed_at_once(slow):
    before = set(threading.enumerate())

    async def run():
        models = Models([Spec("slow", str(slow.folder))])
        waiting = asyncio.create_task(ask(models))
        await until(lambda: models._places["slow"].claimed)
        start = time.monotonic()
        await models.close(30)
        took = time.monotonic() - start
        with pytest.raises(HttpError, match="the server is ending"):
            await waiting
        assert "load slow" in {thread.name for thread in threading.enumerate()}
        return took

    took = asyncio.run(run())
    slow.finish()  # the loop is closed by now
    end = time.monotonic() + 60
    while any(thread.name == "load slow" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)

    assert took < 10
    assert not {thread for thread in threading.enumerate() if thread.name == "phi3-scheduler"} - before


def test_mlflows_scoring_app_answers_as_long_as_the_model_is_there(onnx_model):
    async def run():
        models = two(onnx_model)
        async with models.lease("a") as loaded:
            transport = httpx.ASGITransport(loaded.scoring)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                good = await client.post("/invocations", json=SPAIN)
                await models.close(0)
                closed = await client.post("/invocations", json=SPAIN)
        return good, closed

    good, closed = asyncio.run(run())

    assert good.json()[0]["choices"][0]["message"]["content"] == MADRID
    assert closed.status_code == 503
    assert "the model was closed" in closed.json()["message"]
