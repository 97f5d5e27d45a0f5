"""Does what a Dockerfile says where there is no container engine, then runs its command as a container would.

    phi3-mlflow containerize MODEL FOLDER && python scripts/container_steps.py FOLDER       some minutes, 1 to 5 GB

RUN and COPY are carried out in a root of their own by bubblewrap (Debian's `bubblewrap`), with this machine's /usr and
this Python as the base image; pip uses this machine's configuration. Then the command is started as the image's user,
over the root read-only and without a network, and `container_probe.py` asks it. No image comes of it: the base image,
its libraries, and the builder's own checks are not tested. What the probe found is printed as JSON.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PYTHON = Path(sys.base_prefix)
PROBE = Path(__file__).with_name("container_probe.py")
# Directories of the machine that stand for the base image.
_BASE = [name for name in ("usr", "bin", "sbin", "lib", "lib64", "etc") if Path("/", name).is_dir()]
_PLACES = [*_BASE, "proc", "dev", "tmp", "probe"]


@dataclass
class Image:
    """What a stage of a Dockerfile comes to.

    Attributes:
        root: its files, without the base image's.
        environment: variables.
        user: uid and gid.
        virtualenv: this machine's, in place of the one that RUN would make; None where it did.
    """

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    healthcheck: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    virtualenv: Path | None = None


def steps(text: str) -> Iterator[tuple[str, str]]:
    """The instructions of a Dockerfile with their values."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        name, _, value = line.strip().partition(" ")
        yield name.upper(), value.strip()


def build(context: Path, room: Path, *, virtualenv: Path | None = None, run: bool = True) -> Image:
    """The last stage of FOLDER/Dockerfile.

    Args:
        context: the folder.
        room: an empty folder for the stages.
        virtualenv: stands for /opt/venv, in place of what RUN makes.
        run: whether RUN is carried out.
    """
    stages: dict[str, Image] = {}
    arguments: dict[str, str] = {}
    image = Image(room)
    for name, value in steps((context / "Dockerfile").read_text("utf-8")):
        if name == "ARG":
            key, _, default = value.partition("=")
            arguments[key] = os.environ.get(key, default)
        elif name == "FROM":
            base, _, alias = re.sub(r" as ", " AS ", value, flags=re.IGNORECASE).partition(" AS ")
            image = stages.get(base) or _based(room / str(len(stages)), virtualenv)
            stages[alias or f" {len(stages)}"] = image
        elif name == "ENV":
            pairs = dict(pair.split("=", 1) for pair in shlex.split(value))
            image.environment |= pairs
        elif name == "RUN":
            if run:
                inside(image, ["/bin/sh", "-c", value], variables=arguments, build=True).check_returncode()
        elif name == "COPY":
            _copy(value, context, image, stages)
        elif name == "WORKDIR":
            image.workdir = value
            (image.root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            image.user = value
        elif name == "HEALTHCHECK":
            image.healthcheck = json.loads(value.partition("CMD ")[2])
        elif name == "ENTRYPOINT":
            image.entrypoint = json.loads(value)
        elif name != "EXPOSE":
            raise SystemExit(f"the Dockerfile has {name}, which this script does not know")
    return image


def _based(root: Path, virtualenv: Path | None) -> Image:
    for place in [*_PLACES, PYTHON, *([virtualenv, "opt/venv"] if virtualenv else [])]:
        (root / str(place).lstrip("/")).mkdir(parents=True, exist_ok=True)
    return Image(root, virtualenv=virtualenv)


def _copy(value: str, context: Path, image: Image, stages: Mapping[str, Image]) -> None:
    source = context
    if found := re.match(r"--from=(\S+) ", value):
        source, value = stages[found[1]].root, value[found.end() :]
        if image.virtualenv:
            return
    *names, target = json.loads(value) if value.startswith("[") else shlex.split(value)
    for name in names:
        path, to = source / name.lstrip("/"), image.root / target.lstrip("/")
        if path.is_dir():
            shutil.copytree(path, to, symlinks=True, dirs_exist_ok=True)
        else:
            to = to / path.name if target.endswith("/") else to
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)


def inside(
    image: Image,
    command: Sequence[str],
    *,
    variables: Mapping[str, str] | None = None,
    build: bool = False,
    text: str = "",
    seconds: float = 1800.0,
) -> "subprocess.CompletedProcess[str]":
    """Runs a command in the image.

    Args:
        image: from `build`.
        command: the command and its arguments.
        variables: for the environment, beside the image's.
        build: as root, with a network, and the root may be written; else as the image's user, over it read-only.
        text: its standard input.
        seconds: that it may take.
    """
    arguments = ["bwrap", "--die-with-parent", "--unshare-pid", "--clearenv"]
    arguments += ["--bind" if build else "--ro-bind", str(image.root), "/"]
    for name in _BASE:
        arguments += ["--ro-bind", f"/{name}", f"/{name}"]
    arguments += ["--perms", "1777", "--tmpfs", "/tmp"]  # as engines mount it; what follows may lie below it
    if Path("/usr") != PYTHON:
        arguments += ["--ro-bind", str(PYTHON), str(PYTHON)]
    if image.virtualenv:
        own = str(image.virtualenv)  # programs in it begin with its path
        for parent in reversed(image.virtualenv.parents):
            if Path("/tmp") in parent.parents:  # bwrap would make it for root alone
                arguments += ["--perms", "0755", "--dir", str(parent)]
        arguments += ["--ro-bind", own, own, "--ro-bind", own, "/opt/venv"]
    arguments += ["--ro-bind", str(PROBE.parent), "/probe", "--proc", "/proc", "--dev", "/dev"]
    environment = {"PATH": f"{PYTHON}/bin:/usr/bin:/bin", **image.environment, **(variables or {})}
    for key, value in environment.items():
        arguments += ["--setenv", key, value]
    uid, gid = ("0", "0") if build else image.user.split(":")
    if not build:
        arguments += ["--unshare-net", "--chdir", image.workdir]
    if os.geteuid():
        arguments += ["--unshare-user", "--uid", uid, "--gid", gid]
    elif not build:
        command = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs", *command]
    arguments += ["--", *command]
    output = {} if build else {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(arguments, input=text, text=True, timeout=seconds, check=False, **output)


def probe(image: Image, *, variables: Mapping[str, str] | None = None, **asked: Any) -> dict[str, Any]:
    """Starts the image's command, asks its probes and ends it; see container_probe.py.

    Raises:
        SystemExit: the probe failed; has its output.
    """
    asked |= {"entrypoint": image.entrypoint, "healthcheck": image.healthcheck}
    done = inside(
        image, ["python3", "/probe/container_probe.py"], variables=variables, text=json.dumps(asked), seconds=600
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Builds and probes the folder on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    lines = (folder / "kubernetes" / "settings.env").read_text("utf-8").splitlines()
    variables = {"PHI3_MLFLOW_API_KEYS": "probe=key-of-the-probe", **dict(line.split("=", 1) for line in lines)}
    with tempfile.TemporaryDirectory() as room:
        image = build(folder, Path(room))
        print(json.dumps(probe(image, variables=variables, port=8000, key="key-of-the-probe"), indent=2))


if __name__ == "__main__":
    main()
