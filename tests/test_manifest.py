"""The manifest of weight files. Run: pytest tests/test_manifest.py."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi3_mlflow.runtime import manifest
from phi3_mlflow.runtime.errors import FormatError, WeightsError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "sub" / "model.onnx.data").write_bytes(bytes(range(256)) * 4096)
    (tmp_path / "empty.txt").touch()
    return tmp_path


def content(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def rewrite(folder: Path, text: object) -> None:
    (folder / "manifest.json").write_text(text if isinstance(text, str) else json.dumps(text))


def test_the_manifest_lists_every_file_with_its_size_and_hash(folder):
    assert manifest.write(folder) == folder / "manifest.json"
    listed = content(folder)
    assert listed["algorithm"] == "sha256"
    assert list(listed["files"]) == ["empty.txt", "model.onnx", "sub/model.onnx.data"]
    assert listed["files"]["model.onnx"] == {"size": 5, "sha256": hashlib.sha256(b"graph").hexdigest()}
    manifest.verify(folder)


def test_writing_again_gives_the_same_bytes_and_does_not_list_the_manifest(folder):
    first = manifest.write(folder).read_bytes()
    assert manifest.write(folder).read_bytes() == first


def test_only_the_named_subfolders_are_listed_and_checked(folder):
    (folder / "code").mkdir()
    (folder / "code" / "model.py").write_text("1")
    manifest.write(folder, ("sub",))
    assert list(content(folder)["files"]) == ["sub/model.onnx.data"]
    (folder / "code" / "model.py").write_text("2")
    manifest.verify(folder, ("sub",))


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_writing_into_a_folder_of_links_leaves_the_manifest_they_point_to_alone(folder, tmp_path_factory, link):
    original = manifest.write(folder).read_bytes()
    copy = tmp_path_factory.mktemp("copy")
    link(folder / "manifest.json", copy / "manifest.json")
    link(folder / "model.onnx", copy / "model.onnx")
    manifest.write(copy)
    assert list(content(copy)["files"]) == ["model.onnx"]
    assert (folder / "manifest.json").read_bytes() == original


def test_a_file_named_manifest_in_a_subfolder_is_listed(folder):
    (folder / "sub" / "manifest.json").write_text("{}")
    manifest.write(folder)
    assert "sub/manifest.json" in content(folder)["files"]


def test_links_to_files_and_folders_are_followed_and_a_loop_ends(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("blobs")
    (outside / "tokenizer.json").write_text("{}")
    (folder / "linked.json").symlink_to(outside / "tokenizer.json")
    (folder / "linked").symlink_to(outside)
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "broken").symlink_to(folder / "nowhere")
    manifest.write(folder)
    assert set(content(folder)["files"]) == {
        "empty.txt",
        "linked.json",
        "linked/tokenizer.json",
        "model.onnx",
        "sub/model.onnx.data",
    }
    manifest.verify(folder)


@pytest.mark.parametrize("name", ["model.onnx", "sub/model.onnx.data"])
def test_one_changed_byte_is_refused_with_the_name_of_the_file(folder, name):
    manifest.write(folder)
    changed = bytearray((folder / name).read_bytes())
    changed[len(changed) // 2] ^= 1
    (folder / name).write_bytes(changed)
    with pytest.raises(WeightsError, match=rf"{name} is damaged or was changed"):
        manifest.verify(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(position=st.integers(0, 2**20 - 1), flip=st.integers(1, 255))
def test_a_change_of_any_byte_is_noticed(folder, position, flip):
    path = folder / "sub" / "model.onnx.data"
    original = path.read_bytes()
    manifest.write(folder)
    try:
        with path.open("r+b") as file:
            file.seek(position)
            file.write(bytes([original[position] ^ flip]))
        with pytest.raises(WeightsError, match=r"model\.onnx\.data"):
            manifest.verify(folder)
    finally:
        path.write_bytes(original)


def test_a_shorter_file_is_refused_with_both_sizes(folder):
    manifest.write(folder)
    (folder / "model.onnx").write_bytes(b"gra")
    with pytest.raises(WeightsError, match=r"model\.onnx has 3 bytes where manifest\.json lists 5"):
        manifest.verify(folder)


def test_sizes_are_checked_before_any_file_is_hashed(folder):
    manifest.write(folder)
    (folder / "model.onnx").write_bytes(b"GRAPH")
    (folder / "sub" / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(WeightsError, match=r"model\.onnx\.data has 5 bytes"):
        manifest.verify(folder)


def test_a_missing_file_is_named(folder):
    manifest.write(folder)
    (folder / "sub" / "model.onnx.data").unlink()
    with pytest.raises(WeightsError, match=r"sub/model\.onnx\.data is listed in manifest\.json .* it is not there"):
        manifest.verify(folder)


@pytest.mark.parametrize("name", ["extra.json", "sub/extra.onnx.data", ".hidden", "sub/manifest.json", "sub/model.sig"])
def test_a_file_that_is_not_listed_is_refused_by_name(folder, name):
    manifest.write(folder)
    (folder / name).write_text("more")
    with pytest.raises(WeightsError, match=rf"{re.escape(name)} is not listed in manifest\.json: .* remove it"):
        manifest.verify(folder)


def test_a_file_in_a_linked_folder_is_not_overlooked(folder, tmp_path_factory):
    manifest.write(folder)
    outside = tmp_path_factory.mktemp("outside")
    (outside / "more.json").write_text("{}")
    (folder / "linked").symlink_to(outside)
    with pytest.raises(WeightsError, match=r"linked/more\.json is not listed"):
        manifest.verify(folder)


def test_a_signature_beside_the_manifest_is_no_file_too_many(folder):
    manifest.write(folder)
    (folder / "model.sig").write_text("{}")
    manifest.verify(folder)


def model_of(folder: Path, text: str) -> Path:
    """Makes the folder the weights of a logged ONNX model with this MLmodel file."""
    weights = folder.parent / "model" / "artifacts" / "weights"
    weights.parent.mkdir(parents=True)
    folder.rename(weights)
    (weights.parent.parent / "MLmodel").write_text(text)
    return weights


def test_mlmodel_has_to_state_the_digest_of_these_weights(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    manifest.write(folder)
    stated = f"metadata:\n  weights:\n    sha256: {manifest.digest(folder)}\n"
    weights = model_of(folder, stated)
    manifest.verify(weights)
    (weights / "model.onnx").write_bytes(b"other")
    manifest.write(weights)  # by somebody who wants it to pass
    with pytest.raises(
        WeightsError, match=r"manifest\.json has the digest .* and metadata\.weights\.sha256 in .*MLmodel is"
    ):
        manifest.verify(weights)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("flavors: {}\n", "MLmodel has no metadata.weights.sha256"),
        ("metadata:\n  weights:\n    source: here\n", "MLmodel has no metadata.weights.sha256"),
        ("metadata:\n  weights:\n    sha256: '7'\n", "metadata.weights.sha256 in "),
        ("metadata:\n  weights:\n    sha256: 7\n", "MLmodel has metadata.weights.sha256 7: it must be a text"),
        ("metadata: text\n", "MLmodel has metadata 'text': it must be a mapping"),
        ("metadata: {}\n", "MLmodel has no metadata.weights.sha256"),
        ("metadata:\n  task: llm/v1/chat\n", "MLmodel has no metadata.weights.sha256"),
        ("text", "MLmodel holds 'text' and not a mapping"),
        ("{", "MLmodel is no YAML"),
    ],
)
def test_an_mlmodel_without_the_digest_is_refused_and_named(folder, text, reason):
    manifest.write(folder)
    (folder / "MLmodel").write_text(text)
    with pytest.raises((WeightsError, FormatError), match=re.escape(reason)):
        manifest.verify(folder, ("sub",))


def test_every_problem_is_told_and_every_good_file_named_once(folder):
    manifest.write(folder)
    (folder / "empty.txt").unlink()
    (folder / "model.onnx").write_bytes(b"GRAPH")
    (folder / "more").touch()
    read = []
    found = list(manifest.compare(folder, progress=read.append))
    assert [(name, problem is None) for name, problem in found] == [
        ("empty.txt", False),
        ("more", False),
        ("model.onnx", False),
        ("sub/model.onnx.data", True),
    ]
    assert sum(read) == 5 + 2**20


def test_a_folder_in_the_place_of_a_file_is_named(folder):
    manifest.write(folder)
    (folder / "empty.txt").unlink()
    (folder / "empty.txt").mkdir()
    listed = content(folder)
    listed["files"]["empty.txt"]["size"] = (folder / "empty.txt").stat().st_size
    rewrite(folder, listed)
    with pytest.raises(WeightsError, match=r"empty\.txt cannot be read: Is a directory"):
        manifest.verify(folder)


def test_a_missing_manifest_is_named(folder):
    with pytest.raises(WeightsError, match=r"manifest\.json cannot be read: it is not there"):
        manifest.verify(folder)


def test_a_manifest_that_cannot_be_opened_is_named(folder):
    (folder / "manifest.json").mkdir()
    with pytest.raises(WeightsError, match=r"manifest\.json cannot be read: Is a directory"):
        manifest.verify(folder)
    with pytest.raises(WeightsError, match=r"manifest\.json cannot be written: Is a directory"):
        manifest.write(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("\x00", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (" " * (16 * 2**20 + 1), "has 16777217 bytes, and at most 16777216 are read"),
        ("[]", "is not a manifest"),
        ({"files": {}}, "is not a manifest"),
        ({"algorithm": "md5", "files": {}}, "is not a manifest"),
        ({"algorithm": "sha256"}, "lists no files"),
        ({"algorithm": "sha256", "files": []}, "lists no files"),
        ({"algorithm": "sha256", "files": {}}, "lists no files"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(folder, text, reason):
    rewrite(folder, text)
    for check in (manifest.verify, manifest.digest):
        with pytest.raises(WeightsError, match=rf"manifest\.json {reason}"):
            check(folder)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        "0" * 64,
        {},
        {"size": 5},
        {"size": "5", "sha256": "0" * 64},
        {"size": True, "sha256": "0" * 64},
        {"size": -1, "sha256": "0" * 64},
        {"size": 5, "sha256": "0" * 63},
        {"size": 5, "sha256": "G" * 64},
        {"size": 5, "sha256": 0},
        {"size": 5, "sha256": "0" * 64, "mode": 7},
    ],
)
def test_a_malformed_entry_is_refused(folder, entry):
    rewrite(folder, {"algorithm": "sha256", "files": {"model.onnx": entry}})
    with pytest.raises(WeightsError, match=r"lists 'model\.onnx' with .* instead of its size and sha256"):
        manifest.verify(folder)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../secret",
        "sub/../../secret",
        "..\\secret",
        "C:\\secret",
        "C:secret",
        "\\\\host\\x",
        "a\0",
        "\ud800",
    ],
)
def test_a_path_that_leaves_the_folder_is_refused(folder, name):
    rewrite(folder, {"algorithm": "sha256", "files": {name: {"size": 0, "sha256": "0" * 64}}})
    with pytest.raises(WeightsError, match="not a path inside the folder"):
        manifest.verify(folder)


def test_an_empty_or_missing_folder_has_nothing_to_list(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(WeightsError, match="holds no files"):
            manifest.write(folder)


def test_the_digest_depends_on_the_content_and_not_on_the_layout(folder):
    manifest.write(folder)
    first = manifest.digest(folder)
    assert len(first) == 64
    rewrite(folder, json.dumps(dict(reversed(content(folder).items())), indent=8))
    assert manifest.digest(folder) == first
    (folder / "model.onnx").write_bytes(b"grape")
    assert manifest.digest(folder) == first
    manifest.write(folder)
    assert manifest.digest(folder) != first


def test_a_copy_in_another_place_has_the_same_digest_and_verifies(folder, tmp_path_factory):
    manifest.write(folder)
    before = manifest.digest(folder)
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    folder.rename(copy)
    os.utime(copy / "model.onnx", (0, 0))
    manifest.verify(copy)
    assert manifest.digest(copy) == before


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_what_may_never_end_is_not_read(folder, kind):
    manifest.write(folder)
    name = next(iter(json.loads((folder / manifest.NAME).read_text())["files"]))
    (folder / name).unlink()
    if kind == "a pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(WeightsError, match="is no file: do not use this copy"):
        manifest.verify(folder)


def test_a_manifest_that_is_a_pipe_is_not_read(folder):
    os.mkfifo(folder / manifest.NAME)
    with pytest.raises(WeightsError, match=r"manifest\.json is no file"):
        manifest.verify(folder)
