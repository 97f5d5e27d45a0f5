"""Weights that are cloned where the file system can, and copied once where it cannot.

Run with: python -m pytest tests/test_copying.py
"""

import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.models import Model

from phi3_mlflow import copying
from phi3_mlflow.builders import onnx, transformers
from phi3_mlflow.copying import clone, move, put

ROOT = Path(__file__).resolve().parent.parent
SIZE = 32 * 2**20


@pytest.fixture(scope="module")
def btrfs(tmp_path_factory) -> Iterator[Path]:
    """A file system that can clone files, in a file."""
    make = shutil.which("mkfs.btrfs", path=f"{os.environ['PATH']}:/usr/sbin")
    if make is None or os.geteuid():
        pytest.skip("needs mkfs.btrfs (make programs), and root to mount what that makes")
    folder = tmp_path_factory.mktemp("btrfs")
    image, mounted = folder / "image", folder / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(512 * 2**20)
    subprocess.run([make, "-q", image], check=True, capture_output=True)
    done = subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr}")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)


def random_file(path: Path) -> Path:
    path.write_bytes(os.urandom(SIZE))
    return path


def used(folder: Path) -> int:
    os.sync()
    return shutil.disk_usage(folder).used


def test_a_copy_has_the_bytes_and_their_hash_and_tells_how_far_it_is(tmp_path):
    source = random_file(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    steps = []
    sha256 = put(tmp_path / "link", tmp_path / "target", steps.append)
    assert sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert sum(steps) == SIZE
    assert not (tmp_path / "target").is_symlink()
    assert (tmp_path / "target").stat().st_ino != source.stat().st_ino


def test_where_the_kernel_does_not_copy_python_goes_on_from_there(tmp_path, monkeypatch):
    source, once = random_file(tmp_path / "source"), os.sendfile
    calls = []

    def sendfile(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return once(*arguments)

    monkeypatch.setattr(os, "sendfile", sendfile)
    put(source, tmp_path / "target")
    assert len(calls) == 2
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_a_full_disk_is_told(tmp_path, btrfs):
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(600 * 2**20)
    with pytest.raises(OSError, match="No space left"):
        put(source, btrfs / "target")
    (btrfs / "target").unlink()


def test_copying_ends_with_what_waits_for_it(tmp_path, monkeypatch):
    source, stopped = random_file(tmp_path / "source"), []

    def endless(read, written, stop):
        stopped.append(stop.wait(60))

    def interrupt(count):
        raise KeyboardInterrupt

    monkeypatch.setattr(copying, "_copy", endless)
    with pytest.raises(KeyboardInterrupt):
        put(source, tmp_path / "target", interrupt)
    assert stopped == [True]


def test_nothing_is_written_over(tmp_path):
    source = random_file(tmp_path / "source")
    (tmp_path / "target").write_text("mine")
    with pytest.raises(FileExistsError):
        put(source, tmp_path / "target")
    assert (tmp_path / "target").read_text() == "mine"


def test_between_two_file_systems_a_file_is_copied_and_not_moved(tmp_path, btrfs):
    source = random_file(tmp_path / "source")
    with source.open("rb") as read, (btrfs / "cannot").open("wb") as written:
        assert not clone(read.fileno(), written.fileno())
    put(source, btrfs / "copied")
    assert (btrfs / "copied").read_bytes() == source.read_bytes()
    assert not move(source, btrfs / "moved")
    assert source.exists()
    for path in btrfs.iterdir():
        path.unlink()


def test_a_clone_takes_no_space_and_changes_alone(btrfs):
    source = random_file(btrfs / "source")
    content, before = source.read_bytes(), used(btrfs)
    sha256 = put(source, btrfs / "target")
    assert sha256 == hashlib.sha256(content).hexdigest()
    assert used(btrfs) - before < SIZE // 8
    with source.open("r+b") as file:
        file.write(b"changed")
    assert (btrfs / "target").read_bytes() == content
    for path in btrfs.iterdir():
        path.unlink()


@pytest.fixture
def experiment(tmp_path, btrfs) -> Iterator[Path]:
    """The artifact folder of an experiment on that file system, which is set."""
    store = btrfs / tmp_path.name
    mlflow.create_experiment(tmp_path.name, artifact_location=store.as_uri())
    mlflow.set_experiment(tmp_path.name)
    yield store
    mlflow.set_experiment("tests")
    shutil.rmtree(store, ignore_errors=True)


def test_logged_weights_share_their_blocks_with_the_folder_that_they_come_from(experiment, btrfs):
    weights = Path(shutil.copytree(ROOT / "artifacts" / "onnx", btrfs / "weights"))
    with (weights / "README.md").open("wb") as file:  # a file of the size of real ones, which goes into the model too
        file.write(b"---\nlicense: mit\n---\n" + os.urandom(SIZE))
    before = used(btrfs)
    info = onnx.log_model(weights)
    assert used(btrfs) - before < SIZE // 4
    folder = Path(mlflow.artifacts.download_artifacts(info.model_uri))
    assert folder.is_relative_to(experiment)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert Model.load(folder).model_size_bytes == pytest.approx(size, abs=4096)  # MLmodel is written last
    (found,) = mlflow.pyfunc.load_model(info.model_uri).predict({"messages": [{"role": "user", "content": "Hello"}]})
    assert found["usage"]["completion_tokens"]
    shutil.rmtree(weights)


def test_what_is_written_on_the_stores_own_disk_is_moved_there(tmp_path, btrfs, experiment, monkeypatch):
    (btrfs / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(btrfs / "temporary"))
    moved = []
    monkeypatch.setattr("phi3_mlflow.builders.common.move", lambda *paths: moved.append((paths[0].name, move(*paths))))
    info = transformers.log_model()
    assert ("model.safetensors", True) in moved
    (found,) = mlflow.pyfunc.load_model(info.model_uri).predict({"messages": [{"role": "user", "content": "Hello"}]})
    assert found["usage"]["completion_tokens"]
    assert list((btrfs / "temporary").glob("*/model")) == []
