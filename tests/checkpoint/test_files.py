"""Names of models to directories, without a network."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest

from cutp.checkpoint import Checkpoint, resolve_model, write_safetensors
from cutp.errors import CheckpointError, UnsupportedModelError

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fill(hub, folder="models--org--name", shared=False):
    repository = hub / folder
    snapshot = repository / "snapshots" / SHA
    for directory in (snapshot, repository / "blobs", repository / "refs" / "refs" / "pr", hub / "blobs" / "ab"):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    (repository / "refs" / "refs" / "pr" / "1").write_text(SHA)
    (repository / "blobs" / "c0").write_text('{"model_type": "llama"}')
    real = hub / "blobs" / "ab" / "abcd" if shared else repository / "blobs" / "w0"
    write_safetensors(real, {"a": np.arange(3.0)})
    if shared:
        (repository / "blobs" / "w0").symlink_to("../../blobs/ab/abcd")
    (snapshot / "config.json").symlink_to("../../blobs/c0")
    (snapshot / "model.safetensors").symlink_to("../../blobs/w0")
    return snapshot


def test_bundled_model():
    path = resolve_model(None)
    assert path.name == "tales" and (path / "config.json").is_file()
    assert Checkpoint(path).names()


def test_directory(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert resolve_model(tmp_path / "m") == tmp_path / "m"
    monkeypatch.chdir(tmp_path)
    assert resolve_model("m") == Path("m")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/m") == tmp_path / "m"


def test_directory_without_config(tmp_path):
    with pytest.raises(CheckpointError, match="no config.json: it is empty"):
        resolve_model(tmp_path)
    (tmp_path / "weights.txt").touch()
    with pytest.raises(CheckpointError, match=r"holds weights\.txt"):
        resolve_model(tmp_path)


def test_path_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=f"pass the directory that holds it: {tmp_path}"):
        resolve_model(tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="GGUF"):
        resolve_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("model", ["/no/such/place", "./x", "../x", "a/b/c", "a/..", "", "a b", "org/name@", "x" * 5000,
                                   Path("org/name"), b"x", "a\0b", "org/name@../../x", "http://x/y"])  # fmt: skip
def test_what_is_no_model_name(cache, model):
    with pytest.raises(CheckpointError) as caught:
        resolve_model(model)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("shared", [False, True])
def test_cache_layout(cache, shared):
    snapshot = fill(cache, shared=shared)
    for name in ("org/name", "org/name@main", f"org/name@{SHA}", "org/name@refs/pr/1"):
        assert resolve_model(name) == snapshot
    np.testing.assert_array_equal(Checkpoint(snapshot).read("a"), [0, 1, 2])


def test_name_without_organisation(cache):
    snapshot = fill(cache, "models--gpt2")
    assert resolve_model("gpt2") == snapshot


def test_snapshot_links_may_not_leave_the_cache(cache, tmp_path):
    snapshot = fill(cache)
    write_safetensors(tmp_path / "w", {"a": np.zeros(1)})
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "w")
    with pytest.raises(CheckpointError, match="leaves"):
        Checkpoint(snapshot)


def test_blobs_are_special_only_in_a_cache(tmp_path):
    model = tmp_path / "models" / "snapshots" / "m"
    model.mkdir(parents=True)
    (tmp_path / "models" / "blobs").mkdir()
    write_safetensors(tmp_path / "models" / "blobs" / "w", {"a": np.zeros(1)})
    (model / "model.safetensors").symlink_to("../../blobs/w")
    with pytest.raises(CheckpointError, match="leaves"):
        Checkpoint(model)


def test_not_in_the_cache(cache):
    with pytest.raises(CheckpointError, match="never downloads") as caught:
        resolve_model("org/name")
    assert "hf download org/name" in str(caught.value) and str(cache / "models--org--name") in str(caught.value)
    snapshot = fill(cache)
    with pytest.raises(CheckpointError, match="revision 'v2' of 'org/name'"):
        resolve_model("org/name@v2")
    os.unlink(snapshot / "config.json")
    with pytest.raises(CheckpointError, match="no config.json"):
        resolve_model("org/name")
    (cache / "models--org--name" / "refs" / "main").write_text("../../../x")
    with pytest.raises(CheckpointError, match="commit name"):
        resolve_model("org/name")


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"),
     ("HOME", ".cache/huggingface/hub")],
)  # fmt: skip
def test_cache_places_in_order(cache, tmp_path, monkeypatch, variable, below):
    order = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"]
    for name in order[: order.index(variable)]:
        monkeypatch.delenv(name, raising=False)
    for name in order[order.index(variable) + 1 :]:
        monkeypatch.setenv(name, str(tmp_path / "wrong"))
    monkeypatch.setenv(variable, str(tmp_path / "right"))
    snapshot = fill(tmp_path / "right" / below)
    assert resolve_model("org/name") == snapshot
