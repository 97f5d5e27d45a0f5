"""Run with: python -m pytest tests/test_hashes.py"""

import hashlib
import json
import os
import time

import pytest

from phi3_mlflow.runtime import hashes
from phi3_mlflow.runtime.errors import WeightsError
from phi3_mlflow.runtime.hashes import hash_file, hash_once

SIZE = 16 * 2**20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "phi3_mlflow" / "hashes"


@pytest.fixture
def large(tmp_path):
    """A file that nobody has touched for a while."""
    path = tmp_path / "model.onnx.data"
    path.write_bytes(os.urandom(SIZE))
    settle(path)
    return path


def settle(*paths):
    """Waits until files are old enough to be remembered: the time of change can't be set."""
    while time.time() - max(path.stat().st_ctime for path in paths) <= hashes._SETTLED:
        time.sleep(0.1)


def hashed(path, how=hash_once):
    """The hash, and whether the file was read for it."""
    counts = []
    return how(path, counts.append), sum(counts) == path.stat().st_size


def test_a_large_file_is_read_once(large, cache):
    expected = hashlib.sha256(large.read_bytes()).hexdigest()
    assert hashed(large) == (expected, True)
    assert hashed(large) == (expected, False)
    assert hashed(large, hash_file) == (expected, True)
    assert cache.stat().st_mode & 0o777 == 0o700
    (memory,) = cache.iterdir()
    assert memory.stat().st_mode & 0o777 == 0o600


def test_a_changed_file_is_read_again_also_where_its_size_and_time_were_put_back(large):
    first, _ = hashed(large)
    before = large.stat()
    with large.open("r+b") as file:
        file.write(bytes([large.read_bytes()[0] ^ 1]))
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    second, read = hashed(large)
    assert read
    assert second != first


def test_another_file_in_its_place_is_read(large, tmp_path):
    first, _ = hashed(large)
    other = tmp_path / "other"
    other.write_bytes(os.urandom(SIZE))
    os.utime(other, ns=(large.stat().st_atime_ns, large.stat().st_mtime_ns))
    os.replace(other, large)
    second, read = hashed(large)
    assert read
    assert second != first


def test_a_file_that_changed_a_moment_ago_or_while_it_was_read_is_not_remembered(large, cache, monkeypatch):
    os.utime(large)
    hash_once(large)
    assert not cache.exists()

    monkeypatch.setattr(hashes, "_SETTLED", -1)
    hash_once(large, lambda count: os.utime(large))
    assert not cache.exists()


def test_a_small_file_is_always_read(tmp_path, cache):
    path = tmp_path / "config.json"
    path.write_bytes(b"x" * (SIZE - 1))
    settle(path)
    assert hashed(path)[1]
    assert hashed(path)[1]
    assert not cache.exists()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"sha256": "0"}', b"\xff", b'{"size": 1}']
)
def test_a_memory_that_makes_no_sense_is_made_anew(large, cache, content):
    expected, _ = hashed(large)
    (memory,) = cache.iterdir()
    memory.write_bytes(content)
    assert hashed(large) == (expected, True)
    assert hashed(large) == (expected, False)


def test_a_memory_without_a_hash_is_made_anew(large, cache):
    expected, _ = hashed(large)
    (memory,) = cache.iterdir()
    memory.write_text(json.dumps(json.loads(memory.read_text()) | {"sha256": 5}))
    assert hashed(large) == (expected, True)


def test_a_memory_that_others_may_write_to_is_not_believed(large, cache):
    hash_once(large)
    cache.chmod(0o777)
    assert hashed(large)[1]


def test_without_a_place_for_the_memory_the_file_is_read(large, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert hashed(large)[1]
    assert hashed(large)[1]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"nothing\.data cannot be read: it is not there$"):
        hash_once(tmp_path / "nothing.data")
