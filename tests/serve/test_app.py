"""The routes over a service that does what it is told to, without a socket.

Run: pytest tests/serve/test_app.py
"""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import httpx
from fakes import TOKENS, FakeDecoder, spell

from phi3_mlflow.runtime.service import Service
from phi3_mlflow.serve.app import Limits, Server
from phi3_mlflow.serve.keys import Keys
from phi3_mlflow.serve.served import Spec


class OneModel:
    """In the place of `Models`, which loads real ones: a service that is there."""

    def __init__(self, service):
        self._loaded = SimpleNamespace(name="phi3", model_id=None, service=service)

    def find(self, name):
        return Spec("phi3", "models:/phi3/1")

    @asynccontextmanager
    async def lease(self, name):
        yield self._loaded


class Records(list):
    def begun(self, record):
        pass

    def ended(self, record):
        self.append(record)


def test_a_stream_that_fails_in_its_middle_is_a_failure_to_those_who_log_and_trace_it():
    steps = []

    def second_fails(name, slot, ids):
        steps.append(name)
        if steps.count("decode") == 2:
            raise RuntimeError("a secret")

    async def post():
        transport = httpx.ASGITransport(app=server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://phi3") as client:
            return await client.post("/v1/chat/completions", json=body)

    service = Service(TOKENS, FakeDecoder(lambda prompt: spell("one two"), on_call=second_fails))
    records = Records()
    server = Server(OneModel(service), keys=Keys({}), limits=Limits(), observers=[records])
    body = {"messages": [{"role": "user", "content": "one"}], "stream": True}
    try:
        answer = asyncio.run(post())
    finally:
        service.close()

    assert "the model failed while it answered" in answer.text
    assert [(record.status, record.error) for record in records] == [
        (200, "the model failed while it answered; the server's log says why")
    ]
