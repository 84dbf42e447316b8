"""Model directories: shards, the index, and everything in them that must not be trusted."""

import json
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest

from cutp.checkpoint import Checkpoint, load_config, write_safetensors
from cutp.errors import (
    CheckpointError,
    ClosedError,
    MissingTensorError,
    TruncatedFileError,
    UnsafeCheckpointError,
    UnsupportedModelError,
)

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path):
    write_safetensors(tmp_path / ONE, {"a": np.arange(12.0).reshape(3, 4), "b": np.ones(2)})
    write_safetensors(tmp_path / TWO, {"c": np.zeros(5), "a": np.full(1, 9.0)})  # this `a` is not in the map
    write_index(tmp_path, {"a": ONE, "b": ONE, "c": TWO})
    return tmp_path


def test_single_file(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"a": np.arange(12.0).reshape(3, 4)})
    write_safetensors(tmp_path / "consolidated.safetensors", {"a": np.zeros(1)})  # ignored
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names() == ["a"] and "a" in checkpoint and "z" not in checkpoint
        assert checkpoint.info("a").shape == (3, 4)
        np.testing.assert_array_equal(checkpoint.read("a", 0, [(1, 2)]), [[4, 5, 6, 7]])
        assert checkpoint.bytes_read == 32


def test_shards_open_when_first_needed(sharded):
    with Checkpoint(sharded) as checkpoint:
        assert checkpoint.names() == ["a", "b", "c"]
        assert checkpoint.read("a").shape == (3, 4)
        assert list(checkpoint._open) == [ONE]
        (sharded / TWO).write_bytes(b"damaged")
        with pytest.raises(TruncatedFileError, match=TWO):
            checkpoint.read("c")
        np.testing.assert_array_equal(checkpoint.read("b"), [1, 1])
    with pytest.raises(ClosedError):
        checkpoint.read("a")


def test_missing_tensor_names_close_ones(sharded):
    write_safetensors(sharded / "model.safetensors", {"model.layers.0.q_proj.weight": np.zeros(1), "x": np.zeros(1)})
    with Checkpoint(sharded) as checkpoint, pytest.raises(MissingTensorError, match=r"model\.layers\.0\.q_proj") as e:
        checkpoint.read("model.layers.0.q_proj.weigth")
    assert str(sharded) in str(e.value)


def test_files_without_an_index(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(1)})
    assert Checkpoint(tmp_path).names() == ["a"]
    write_safetensors(tmp_path / "y.safetensors", {"b": np.ones(1)})
    assert Checkpoint(tmp_path).read("b") == 1
    write_safetensors(tmp_path / "z.safetensors", {"b": np.ones(1)})
    with pytest.raises(CheckpointError, match=r"'b' is in both y.safetensors and z.safetensors"):
        Checkpoint(tmp_path)


def test_missing_shard_and_misplaced_tensor(sharded):
    write_index(sharded, {"a": ONE, "c": ONE})
    with Checkpoint(sharded) as checkpoint, pytest.raises(MissingTensorError, match=f"places tensor 'c' in {ONE}"):
        checkpoint.read("c")
    write_index(sharded, {"a": ONE, "q": "model-00003-of-00003.safetensors"})
    with pytest.raises(CheckpointError, match="shard model-00003-of-00003.safetensors .* missing .*'q'"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "shard",
    ["/etc/passwd", "../secret.safetensors", "a/../../secret.safetensors", "..", "", ".", "a\\..\\b", "a\0b",
     "x" * 5000 + ".safetensors", 3, None, ["x"], {"x": 1}],
)  # fmt: skip
def test_hostile_shard_names(sharded, shard):
    write_safetensors(sharded.parent / "secret.safetensors", {"a": np.zeros(1)})
    write_index(sharded, {"a": shard})
    with pytest.raises(CheckpointError, match="'a'"):
        Checkpoint(sharded)


def test_dots_are_refused_even_where_they_lead_back_inside(sharded):
    (sharded / "sub").mkdir()
    write_index(sharded, {"a": f"sub/../{ONE}"})
    with pytest.raises(CheckpointError, match="not a plain path"):
        Checkpoint(sharded)
    os.rename(sharded / ONE, sharded / "sub" / ONE)
    write_index(sharded, {"a": f"sub/{ONE}"})  # a plain sub-directory is fine
    assert Checkpoint(sharded).read("a").shape == (3, 4)


def test_index_that_names_a_pickle(sharded):
    (sharded / "x.bin").write_bytes(b"")
    write_index(sharded, {"a": "x.bin"})
    with pytest.raises(UnsafeCheckpointError, match=r"x\.bin"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": "x"}', "{" * 100_000,
     '{"weight_map": {"a": "x", "a": "y"}}', '{"weight_map": {"a": NaN}}'],
)  # fmt: skip
def test_malformed_index(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="index.json"):
        Checkpoint(sharded)


def test_links_out_of_the_directory(tmp_path):
    inside, outside = tmp_path / "model", tmp_path / "outside"
    inside.mkdir(), outside.mkdir()
    write_safetensors(outside / "x.safetensors", {"a": np.zeros(1)})
    write_safetensors(inside / "real.safetensors", {"a": np.ones(1)})
    link = inside / "model.safetensors"
    link.symlink_to(outside / "x.safetensors")
    with pytest.raises(CheckpointError, match="leaves the model directory"):
        Checkpoint(inside)
    link.unlink()
    (inside / "shard.safetensors").symlink_to("../outside/x.safetensors")
    (inside / "sub").symlink_to(outside)
    (inside / "loop.safetensors").symlink_to("loop.safetensors")
    for shard in ("shard.safetensors", "sub/x.safetensors", "loop.safetensors"):
        write_index(inside, {"a": shard})
        with pytest.raises(CheckpointError, match="leaves the directory"):
            Checkpoint(inside)
    (inside / "ok.safetensors").symlink_to("real.safetensors")  # a link that stays inside is fine
    write_index(inside, {"a": "ok.safetensors"})
    assert Checkpoint(inside).read("a") == 1
    (tmp_path / "alias").symlink_to(inside)  # and so is a link to the whole directory
    assert Checkpoint(tmp_path / "alias").read("a") == 1


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(tmp_path, name):
    canary = tmp_path / "canary"
    model = tmp_path / "model"
    model.mkdir()
    with zipfile.ZipFile(model / name, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Canary(canary)))
    os.chmod(model / name, 0)
    with pytest.raises(UnsafeCheckpointError, match="pickle") as caught:
        Checkpoint(model)
    assert name in str(caught.value) and "save_file" in str(caught.value)
    assert not canary.exists()


def test_canary_would_work(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_other_formats_and_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="no \\*.safetensors file"):
        Checkpoint(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UnsupportedModelError, match="gguf"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(UnsafeCheckpointError):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint(tmp_path / "absent")


def test_code_of_the_checkpoint_is_never_imported(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    for name in ("modeling_canary", "configuration_canary", "tokenization_canary", "__init__", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')")
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(1)})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not load_config(tmp_path).has_remote_code  # stray .py files alone are ignored
    config["auto_map"] = {"AutoConfig": "configuration_canary.Config", "AutoModel": "modeling_canary.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsafeCheckpointError, match="modeling_canary.Model"):
        load_config(tmp_path)
    assert load_config(tmp_path, refuse_remote_code=False).has_remote_code
    Checkpoint(tmp_path).read("a")
    assert not canary.exists() and "modeling_canary" not in sys.modules
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize("architectures, auto_map, accepted", [
    (["XForCausalLM"], {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}, True),
    (["XForCausalLM"], {"AutoModelForCausalLM": "owner/code--modeling_x.XForCausalLM"}, True),
    (["XForCausalLM"], {"AutoModelForCausalLM": "modeling_x.YForCausalLM"}, False),
    (["XForCausalLM"], {"AutoModel": "modeling_x.XForCausalLM"}, False),
    (["XForCausalLM"], {"AutoModelForCausalLM": ["modeling_x.XForCausalLM"]}, False),
    (["XForCausalLM"], ["XForCausalLM"], False),
    (None, {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}, False)], ids=str)
def test_code_of_the_named_architecture_is_not_needed(tmp_path, architectures, auto_map, accepted):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures, "auto_map": auto_map}))
    if accepted:
        assert load_config(tmp_path).has_remote_code
    else:
        with pytest.raises(UnsafeCheckpointError, match="never runs such code"):
            load_config(tmp_path)


def test_tokenizer_code_is_reported(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "auto_map": {}}')
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y", null]}}')
    assert load_config(tmp_path).has_remote_code
