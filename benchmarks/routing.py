"""What several copies of `serve` gain where a conversation stays with one of them: how much of its prompts is cached.

    python benchmarks/routing.py                                  the embedded model: about a minute

Two servers are behind nginx with the configuration that `containerize` writes, which hashes the header x-session-id,
and then with one that takes turns. The same conversations of several turns go through each, in an order drawn by
chance; each prompt is its conversation so far. The shares are cached tokens of all tokens of prompts, of first turns
and of all others. Each server has a slot for every conversation, so that nothing but the choice of a server decides
what is cached; at most 32 conversations. No times are measured. Needs nginx.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
from serve_soak import free_port, server

from phi3_mlflow.builders import onnx
from phi3_mlflow.containers.cli import containerize

CITIES = ("Spain", "France", "Italy", "Germany", "Japan", "Egypt", "Peru", "Norway", "Kenya", "India", "Chile", "Cuba")
HASH = "        hash $conversation consistent;\n"


@contextmanager
def nginx(text: str, room: Path, servers: Sequence[str]) -> Iterator[str]:
    """nginx with a configuration of `containerize`; its address.

    Args:
        text: the configuration; its port and its servers are replaced.
        room: a folder for what it writes.
        servers: addresses of those behind it.
    """
    port, lines = free_port(), "".join(f"server {address.removeprefix('http://')} max_fails=0; " for address in servers)
    text, replaced = re.subn(r"server serve:\S+ max_fails=0;", lines, text)
    assert replaced == 1
    text = text.replace("listen 8080", f"listen 127.0.0.1:{port}").replace("/tmp/", f"{room}/")
    text = text.replace("/dev/stderr", f"{room}/log").replace("worker_processes auto", "worker_processes 1")
    (room / "nginx.conf").write_text(("user root;\n" if os.geteuid() == 0 else "") + text)
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if program is None:
        raise SystemExit("nginx is not installed")
    process = subprocess.Popen([program, "-g", "daemon off;", "-p", str(room), "-c", str(room / "nginx.conf")])
    try:
        end = time.monotonic() + 30
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"nginx does not answer: {(room / 'log').read_text()[-2000:]}") from None
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def converse(address: str, names: Sequence[str], turns: int, draw: Random) -> dict[str, float]:
    """The shares of cached tokens, in conversations that all begin differently."""
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    tokens: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    order = [name for name in names for _ in range(turns)]
    draw.shuffle(order)
    with httpx.Client(base_url=address, timeout=600) as client:
        for name in order:
            messages = said[name]
            messages += [{"role": "user", "content": f"What is the capital of {draw.choice(CITIES)}? Ask {name}."}]
            body = {"messages": messages, "max_tokens": 24}
            answer = client.post("/v1/chat/completions", json=body, headers={"x-session-id": name})
            answer.raise_for_status()
            usage = answer.json()["usage"]
            place = tokens["first" if len(messages) == 1 else "others"]
            place[0] += usage["prompt_tokens_details"]["cached_tokens"]
            place[1] += usage["prompt_tokens"]
            messages += [{"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"]}]
    return {name: cached / prompts for name, (cached, prompts) in tokens.items()}


def measure(model: Path, text: str, room: Path, *, conversations: int, turns: int) -> dict[str, dict[str, float]]:
    """The shares with each way of choosing a server.

    Args:
        model: a saved model.
        text: the configuration that `containerize` wrote.
        room: a folder for nginx.
        conversations: how many, that go on by turns.
        turns: questions of each.
    """
    assert HASH in text
    shares = {}
    slots = ["--parallel", str(2 * conversations)]
    with server(str(model), *slots) as (one, _), server(str(model), *slots) as (other, _):
        for way, configuration in (("in turn", text.replace(HASH, "")), ("by conversation", text)):
            names = [f"{way.replace(' ', '-')}-{number}" for number in range(conversations)]
            with nginx(configuration, room, [one, other]) as address:
                shares[way] = converse(address, names, turns, Random(0))
    return shares


def main() -> None:
    """Measures what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model, folder = Path(temporary) / "model", Path(temporary) / "container"
        onnx.save_model(model)
        containerize.main([str(model), str(folder), "--memory", "1GiB"], standalone_mode=False)
        text = (folder / "nginx.conf").read_text("utf-8")
        shares = measure(model, text, Path(temporary), conversations=asked.conversations, turns=asked.turns)
    print(f"\n{asked.conversations} conversations of {asked.turns} turns, two servers\n")
    print("| cached tokens of prompts | first turns | later turns |\n|---|---:|---:|")
    for way, found in shares.items():
        print(f"| {way} | {found['first']:.0%} | {found['others']:.0%} |")


if __name__ == "__main__":
    main()
