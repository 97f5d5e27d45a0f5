"""Inside the container: starts its command, waits until it is ready, asks it, and ends it. Nothing beside Python.

Standard input is `{"entrypoint", "healthcheck", "port", "key", "path", "ready"}`; the last line of standard output says
what was found. Ends with status 1 where the command does, or where it is not ready in time.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

PATIENCE = 240  # seconds
SPAIN = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}


def ask(address: str, body: Any = None, key: str | None = None) -> tuple[int, str]:
    """The status and the text of an answer; 0 where there is none."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def can_write(folder: str) -> bool:
    """Whether a file can be made there."""
    try:
        with open(os.path.join(folder, "written"), "w"):
            return True
    except OSError:
        return False


def main() -> None:
    """Runs the command on standard input."""
    asked = json.load(sys.stdin)
    address, path, key = f"http://127.0.0.1:{asked['port']}", asked.get("path", "/v1/chat/completions"), asked["key"]
    server = subprocess.Popen(asked["entrypoint"], stdin=subprocess.DEVNULL, stdout=sys.stderr)
    began: list[int] = []
    end = time.monotonic() + PATIENCE
    while ask(address + asked.get("ready", "/ready"))[0] != 200:
        # Whoever watches over the container asks while the model is loaded, too.
        began.append(ask(f"{address}/health")[0])
        if server.poll() is not None or time.monotonic() > end:
            sys.exit(f"the command ended with {server.poll()}, or was not ready in {PATIENCE} s")
        time.sleep(0.2)
    check = asked["healthcheck"]
    found = {
        "user": [os.getuid(), os.getgid()],
        "written": [place for place in ("/", "/opt", "/model", "/tmp", "/usr") if can_write(place)],
        "starting": sorted(set(began) - {0}),
        "healthcheck": subprocess.run(check, check=False).returncode if check else None,
        "without key": ask(address + path, SPAIN)[0],
        "metrics without key": ask(f"{address}/metrics")[0],
        "answer": ask(address + path, SPAIN, key),
        "metrics": ask(f"{address}/metrics", key=key)[1],
    }
    server.terminate()
    found["ended"] = server.wait(60)
    found["healthcheck afterwards"] = subprocess.run(check, check=False).returncode if check else None
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
