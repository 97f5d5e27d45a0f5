"""`phi3-mlflow serve` under clients that come, leave, read slowly and ask wrongly, for hours if need be.

    python benchmarks/serve_soak.py churn --clients 200 --requests 10000
    python benchmarks/serve_soak.py crowd --requests 70
    python benchmarks/serve_soak.py soak --minutes 30

`churn`: clients at once, two thirds of whom leave at a random moment; every answer that is read to its end must be the
one that the model gives alone. `crowd`: requests of some seconds each that all come at once to a server with a queue
limit; whoever gets a 429 comes back when it says. `soak`: two models, an alias that moves every minute, a tracking
server that is killed twice, and all of the above. What they find is printed as JSON; a number that leaks ends the
script with status 1.
"""

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

QUESTIONS = {
    "What is the capital of Spain?": "The capital of Spain is Madrid.",
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Italy?": "The capital of Italy is Rome.",
}
EXAMPLE_TOKENS = 8  # of the embedded model's answer to its input example
# Keeps the embedded model from ending its answer.
ENDLESS = {"logit_bias": {"2048": -100, "2049": -100, "2055": -100}, "repetition_guard": False}


def state(pid: int) -> dict[str, float]:
    """What a process holds: MiB of memory besides the pages of files, threads, open files and sockets."""
    process = psutil.Process(pid)
    # A library's pages would be the process's own from when no other process has them mapped any more.
    memory = process.memory_info()
    return {
        "memory": round((memory.rss - memory.shared) / 2**20, 1),
        "threads": process.num_threads(),
        "files": process.num_fds(),
    }


def churn(
    address: str, pid: int, *, clients: int, requests: int, seed: int = 0, seconds: float = 1e9, models: tuple = (None,)
) -> dict[str, Any]:
    """Clients that ask and mostly leave; what they saw, and what the server held before and after."""
    settle(address)
    asyncio.run(fill(address, clients))
    before = state(pid)
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    until = time.monotonic() + seconds

    async def one(client: httpx.AsyncClient, draw: random.Random) -> None:
        question, answer = draw.choice(list(QUESTIONS.items()))
        stream, stays = draw.random() < 0.7, draw.random() < 0.35
        body: dict[str, Any] = {"messages": [{"role": "user", "content": question}], "stream": stream}
        if (model := draw.choice(models)) is not None:
            body["model"] = model
        if not stays:
            body |= ENDLESS | {"max_tokens": 4000}
        path = draw.choice(["/v1/chat/completions"] * 3 + ["/invocations"])
        if path == "/invocations" and "logit_bias" in body:
            body["custom_inputs"] = {"logit_bias": body.pop("logit_bias")}
        patience = None if stays else draw.random() * 2

        async def ask() -> str:
            async with client.stream("POST", address + path, json=body) as response:
                text = (await response.aread()).decode()
            if response.status_code != 200:
                return f"{response.status_code} {text[:200]}"
            return said(text, stream)

        try:
            async with asyncio.timeout(patience):
                came = await ask()
        except TimeoutError:
            seen["left"] += 1
            return
        except httpx.HTTPError as error:
            wrong.append(f"{type(error).__name__}: {error}")
            return
        if stays:
            seen["answered"] += 1
            if came != answer:
                wrong.append(came[:300])
        else:
            seen["left"] += 1  # the answer was there before the client lost its patience

    async def worker(client: httpx.AsyncClient, numbers: Iterator[int]) -> None:
        for number in numbers:
            if time.monotonic() >= until:
                return
            await one(client, random.Random(seed * 1_000_003 + number))

    async def main() -> None:
        limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            numbers = iter(range(requests))
            await asyncio.gather(*(worker(client, numbers) for _ in range(clients)))

    start = time.monotonic()
    asyncio.run(main())
    took = time.monotonic() - start
    settle(address)
    after = state(pid)
    held = {name: (before[name], after[name]) for name in before}
    return {"answered": seen["answered"], "left": seen["left"], "wrong": wrong, "seconds": round(took, 1), **held}


async def fill(address: str, clients: int) -> None:
    """As many whole answers of MLflow's route at once as there are clients: each has a thread, and threads stay."""
    body = {"messages": [{"role": "user", "content": next(iter(QUESTIONS))}], "max_tokens": 1}
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(client.post(f"{address}/invocations", json=body) for _ in range(clients)))


def said(text: str, stream: bool) -> str:
    """What an answer says, whole or as events, of either route."""
    if not stream:
        answer = json.loads(text)
        answer = answer[0] if isinstance(answer, list) else answer
        return answer["choices"][0]["message"]["content"]
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if lines[-1:] != ["[DONE]"]:
        return f"not ended: {text[-200:]}"
    return "".join(choice["delta"].get("content", "") for line in lines[:-1] for choice in json.loads(line)["choices"])


def metrics(address: str) -> Counter[str]:
    """Every metric's samples, added up."""
    found: Counter[str] = Counter()
    for name, value in re.findall(
        r"^([\w:]+)(?:\{[^}]*\})? (\S+)$", httpx.get(f"{address}/metrics").text, re.MULTILINE
    ):
        found[name] += float(value)
    return found


def settle(address: str, seconds: float = 300.0) -> None:
    """Waits until nothing is under way."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        now = metrics(address)
        if not now["vllm:num_requests_running"] and not now["vllm:num_requests_waiting"]:
            time.sleep(0.5)  # connections that were closed go too
            return
        time.sleep(0.1)
    raise SystemExit(f"answers are still under way {seconds:g} s after the last client left")


def crowd(address: str, *, requests: int, tokens: int, attempts: int = 100) -> dict[str, Any]:
    """Requests that all come at once; whoever is refused comes back when told, once, to see how true that was."""
    health: list[float] = []
    refused: list[tuple[float, float]] = []  # when, and the seconds that it was told
    ready: list[float] = []
    seen: Counter[int] = Counter()
    body = {"messages": [{"role": "user", "content": next(iter(QUESTIONS))}], **ENDLESS, "max_tokens": tokens}

    async def one(client: httpx.AsyncClient) -> None:
        for _ in range(attempts):
            response = await client.post(f"{address}/v1/chat/completions", json=body)
            if response.status_code == 200:
                assert response.json()["usage"]["completion_tokens"] == tokens
            if response.status_code != 429:
                seen[response.status_code] += 1
                return
            seen[429] += 1
            told = float(response.headers["retry-after"])
            refused.append((time.monotonic(), told))
            await asyncio.sleep(told)

    async def watch(client: httpx.AsyncClient) -> None:
        while True:
            start = time.perf_counter()
            assert (await client.get(f"{address}/health")).status_code == 200
            health.append(time.perf_counter() - start)
            await asyncio.sleep(0.02)

    async def room(client: httpx.AsyncClient) -> None:
        """When the server would have taken another request."""
        while True:
            if (await client.get(f"{address}/ready")).status_code == 200:
                ready.append(time.monotonic())
            await asyncio.sleep(0.01)

    async def main() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client, httpx.AsyncClient(timeout=60) as other:
            watcher = asyncio.create_task(watch(other))
            finder = asyncio.create_task(room(other))
            # Who has answered nothing yet knows no time.
            await asyncio.gather(*(one(other) for _ in range(8)))
            await asyncio.gather(*(one(client) for _ in range(requests)))
            watcher.cancel()
            finder.cancel()

    start = time.monotonic()
    asyncio.run(main())
    waits = [(told, ready[at] - when) for when, told in refused if (at := bisect(ready, when)) < len(ready)]
    # A second is the least that can be told.
    others = [(told, round(was, 2)) for told, was in waits if not told / 2 <= max(was, 0.5) <= 2 * told]
    health.sort()
    return {
        "seconds": round(time.monotonic() - start, 1),
        "statuses": dict(seen),
        "health_ms": {
            p: round(1000 * health[min(len(health) - 1, int(len(health) * p / 100))], 1) for p in (50, 99, 100)
        },
        "retry_after": len(waits),
        "true_within_2": len(waits) - len(others),
        "others": others,
    }


@contextmanager
def server(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """`phi3-mlflow serve` on a free port: its address and its process."""
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "phi3_mlflow", "serve", "-p", "0", "--preload", "--access-log", "none"]
        process = subprocess.Popen(
            [*command, *arguments], stdout=log, stderr=log, env={**os.environ, **(environment or {})}
        )
        try:
            address = None
            while True:
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(log.read().decode()[-3000:])
                log.seek(0)
                found = re.search(rb"Serving .* at (http://\S+)", log.read())
                log.seek(0, os.SEEK_END)
                if found:
                    address = found[1].decode()
                    try:
                        if httpx.get(f"{address}/ready", timeout=5).status_code == 200:
                            break
                    except httpx.HTTPError:
                        pass
                time.sleep(0.1)
            yield address, process
        finally:
            process.terminate()
            process.wait(60)


def soak(minutes: float, folder: Path) -> dict[str, Any]:
    """Two models, an alias that moves, a tracking server that is killed twice, and clients of every kind."""
    import mlflow
    from mlflow.tracking import MlflowClient

    from phi3_mlflow.builders import onnx

    port = free_port()
    store = f"sqlite:///{folder / 'soak.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]

    def track() -> subprocess.Popen:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    return process
            except httpx.HTTPError:
                time.sleep(0.2)

    def kill(process: subprocess.Popen) -> None:
        os.killpg(process.pid, 9)
        process.wait()

    tracking = track()
    uri = f"http://127.0.0.1:{port}"
    mlflow.set_tracking_uri(uri)
    client = MlflowClient()
    versions = [onnx.log_model(name="soak", registered_model_name="soak") and str(n) for n in (1, 2)]
    client.set_registered_model_alias("soak", "champion", versions[0])
    arguments = ["--name=moving=models:/soak@champion", "--name=fixed=models:/soak/1", "--watch", "--watch-seconds=5"]
    rounds, wrong = [], []
    slow: Counter[str] = Counter()
    try:
        environment = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        with server(*arguments, "--trace=0.2", environment=environment) as (address, process):
            end = time.monotonic() + 60 * minutes
            seed = moved = 0
            kills = [end - 40 * minutes, end - 20 * minutes]
            move_at = time.monotonic()
            while time.monotonic() < end:
                seed += 1
                readers = [threading.Thread(target=read_slowly, args=(address, slow, stays)) for stays in (True, False)]
                for reader in readers:
                    reader.start()
                found = churn(
                    address, process.pid, clients=50, requests=10**6, seed=seed, seconds=20, models=("moving", "fixed")
                )
                for reader in readers:
                    reader.join()
                rounds.append({name: found[name] for name in ("answered", "left", "memory", "threads", "files")})
                wrong += found["wrong"]
                wrong += bad_requests(address)
                if kills and time.monotonic() > kills[0]:
                    kills.pop(0)
                    kill(tracking)
                    churn(address, process.pid, clients=20, requests=10**6, seed=-seed, seconds=10)
                    tracking = track()
                if time.monotonic() >= move_at:
                    moved += 1
                    move_at = time.monotonic() + 60
                    client.set_registered_model_alias("soak", "champion", versions[moved % 2])
                rest = round(end - time.monotonic())
                print(json.dumps({"seconds to go": rest, **rounds[-1]}), file=sys.stderr, flush=True)
            settle(address)
            told = metrics(address)
    finally:
        kill(tracking)
    return {
        "rounds": len(rounds),
        "alias moved": moved,
        "answered": sum(each["answered"] for each in rounds),
        "left": sum(each["left"] for each in rounds),
        "slow readers": dict(slow),
        "wrong": [*wrong[:20], *(each for each in slow if each not in ("answered", "left")), *unequal(told, moved)],
        "memory": [each["memory"][1] for each in rounds],
        "threads": [each["threads"][1] for each in rounds],
        "files": [each["files"][1] for each in rounds],
        "metrics": {name: told[name] for name in METRICS},
    }


# What engines did, and what requests were given.
METRICS = ENDED, FAILED, REQUESTED, GENERATED, GIVEN = (
    "phi3_mlflow_answers_ended_total",
    "phi3_mlflow_answers_failed_total",
    "vllm:request_success_total",
    "vllm:generation_tokens_total",
    "vllm:request_generation_tokens_sum",
)


def unequal(told: Counter[str], moved: int) -> list[str]:
    """Counts that do not add up. A new version answers its example, which is nobody's request."""
    # What a client left may be under way when the version before is closed: it fails, and the request counts as well.
    answers = told[ENDED] + told[FAILED] - told[REQUESTED]
    tokens = told[GENERATED] - told[GIVEN]
    if 0 <= answers <= moved and tokens == EXAMPLE_TOKENS * answers:
        return []
    return [", ".join(f"{name} is {told[name]:.0f}" for name in METRICS)]


def read_slowly(address: str, seen: Counter[str], stays: bool) -> None:
    """One client that takes a large stream in small bites for some seconds; then all the rest, or it leaves."""
    body = {"messages": [{"role": "user", "content": next(iter(QUESTIONS))}], **ENDLESS, "max_tokens": 2000}
    body |= {"stream": True, "logprobs": True, "top_logprobs": 20}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=600) as response:
        chunks, until, last = response.iter_raw(4096), time.monotonic() + 10, b""
        while time.monotonic() < until and (last := next(chunks, b"")):
            time.sleep(0.2)
        if not stays:
            seen["left"] += 1
            return
        last += b"".join(chunks)
    seen["answered" if last.endswith(b"data: [DONE]\n\n") else f"not ended: {last[-200:]!r}"] += 1


def bad_requests(address: str) -> list[str]:
    """What the server says to requests that it has to refuse, where it is not a refusal."""
    bodies = [
        b"{",
        b"[]",
        b'{"messages": []}',
        b'{"messages": 1, "stream": true}',
        b'{"model": "none"}',
        b"\xff" * 1000,
    ]
    url, kind = f"{address}/v1/chat/completions", {"content-type": "application/json"}
    answers = [httpx.post(url, content=body, headers=kind, timeout=60) for body in bodies]
    return [f"{each.status_code} {each.text[:200]}" for each in answers if each.status_code not in (400, 404)]


def leaked(memory: Sequence[float], threads: Sequence[float], files: Sequence[float]) -> bool:
    """Whether the last of each is above the first by more than its noise."""
    return memory[-1] > memory[0] + 100 or threads[-1] > threads[0] + 20 or files[-1] > files[0] + 5


def free_port() -> int:
    """A port that nobody listens at."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Runs one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["churn", "crowd", "soak"])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, help="10,000 for churn and 70 for crowd by default")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--model", help="a logged model's URI; the embedded one by default")
    arguments = parser.parse_args()
    model = [] if arguments.model is None else [f"--name=phi3={arguments.model}"]
    if arguments.what == "churn":
        # Those that left are counted until the server has seen it.
        with server(*model, "-c", f"queue_limit={2 * arguments.clients}") as (address, process):
            churn(address, process.pid, clients=arguments.clients, requests=500, seed=1)  # until all is warm
            found = churn(
                address,
                process.pid,
                clients=arguments.clients,
                requests=arguments.requests or 10_000,
                seconds=arguments.seconds,
            )
        leaks = leaked(found["memory"], found["threads"], found["files"])
    elif arguments.what == "crowd":
        with server(*model, "-c", "queue_limit=8") as (address, _):
            found = crowd(address, requests=arguments.requests or 70, tokens=arguments.tokens)
        leaks = False
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = soak(arguments.minutes, Path(folder))
        # From the first third on, until when all is warm.
        leaks = leaked(*(found[name][len(found[name]) // 3 :] for name in ("memory", "threads", "files")))
    print(json.dumps(found, indent=1))
    sys.exit(bool(leaks or found.get("wrong")))


if __name__ == "__main__":
    main()
