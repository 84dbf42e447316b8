"""The tensors of a model directory, whichever safetensors files they lie in."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from cutp.checkpoint.files import is_within
from cutp.checkpoint.json_file import read_json_object
from cutp.checkpoint.safetensors import SafetensorsFile, TensorInfo
from cutp.errors import CheckpointError, ClosedError, MissingTensorError, UnsafeCheckpointError, UnsupportedModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".bin.index.json")
_OTHERS = (".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz")


class Checkpoint:
    """Read-only access to the tensors of `directory`, with shards opened when first needed.

    `model.safetensors` is taken when present, else the shards of `model.safetensors.index.json`, else every
    *.safetensors file of the directory. Pickled weights are never opened: a directory that has nothing else raises
    UnsafeCheckpointError, one with only other formats UnsupportedModelError, any inconsistency CheckpointError.
    Reads from several threads are safe.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self._lock = threading.Lock()
        self._open: dict[str, SafetensorsFile] = {}
        self._closed = False
        try:
            names = sorted(os.listdir(self.directory))
        except OSError as e:
            message = f"the model directory {self.directory} cannot be read: {e.strerror or e}"
            raise CheckpointError(message) from None
        files = [name for name in names if name.endswith(".safetensors")]
        if _SINGLE in files:
            self._shard_of = dict.fromkeys(self._shard(_SINGLE).names(), _SINGLE)
        elif _INDEX in names:
            self._shard_of = self._read_index()
        elif files:
            self._shard_of = self._union(files)
        else:
            raise _no_safetensors(self.directory, names)

    def names(self) -> list[str]:
        return list(self._shard_of)

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of one tensor; raises MissingTensorError with the closest names there are."""
        return self._file_with(name).info(name)

    def read(
        self, name: str, axis: int | None = None, ranges: Sequence[tuple[int, int]] | None = None,
        item: int | None = None, *, rows: tuple[int, int] | None = None, buffer: np.ndarray | None = None,
    ) -> np.ndarray:
        """One tensor or one `item` of it, or only the `ranges` along `axis`; see `SafetensorsFile.read`."""
        return self._file_with(name).read(name, axis, ranges, item, rows=rows, buffer=buffer)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data fetched so far."""
        with self._lock:
            return sum(file.bytes_read for file in self._open.values())

    def close(self) -> None:
        """Closes all shards; a second call does nothing."""
        with self._lock:
            self._closed = True
            for file in self._open.values():
                file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _file_with(self, name: str) -> SafetensorsFile:
        shard = self._shard_of.get(name)
        if shard is None:
            close = difflib.get_close_matches(name, self._shard_of, n=3)
            hint = f"close names: {', '.join(close)}" if close else "the checkpoint is of another model"
            raise MissingTensorError(f"the checkpoint {self.directory} has no tensor {name!r}", hint=hint)
        file = self._shard(shard)
        if name not in file:
            message = f"{self.directory / _INDEX} places tensor {name!r} in {shard}, which does not hold it"
            raise MissingTensorError(message, hint="the download mixes two revisions; fetch the model again")
        return file

    def _shard(self, shard: str) -> SafetensorsFile:
        with self._lock:
            if self._closed:
                raise ClosedError(f"the checkpoint {self.directory} is closed")
            if shard not in self._open:
                path = self.directory / shard
                if not is_within(path, self.directory):
                    raise CheckpointError(
                        f"{path} is a link that leaves the model directory",
                        hint="pass the directory that holds the file itself, or copy the file",
                    )
                self._open[shard] = SafetensorsFile(path)
            return self._open[shard]

    def _union(self, files: list[str]) -> dict[str, str]:
        shard_of: dict[str, str] = {}
        for file in files:
            for name in self._shard(file).names():
                if name in shard_of:
                    message = f"tensor {name!r} is in both {shard_of[name]} and {file} of {self.directory}"
                    raise CheckpointError(message, hint=f"add {_INDEX}, or remove the file that does not belong")
                shard_of[name] = file
        return shard_of

    def _read_index(self) -> dict[str, str]:
        path = self.directory / _INDEX
        if not is_within(path, self.directory):
            raise CheckpointError(f"{path} is a link that leaves the model directory")
        weight_map = read_json_object(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path} has no weight_map object", hint="fetch the file again")
        checked: set[str] = set()
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                raise CheckpointError(f"{path} maps tensor {name!r} to {shard!r}, not to a file name")
            if shard in checked:
                continue
            checked.add(shard)
            parts = PurePosixPath(shard).parts
            if not parts or shard.startswith("/") or ".." in parts or "\\" in shard or "\0" in shard:
                raise CheckpointError(
                    f"{path} maps tensor {name!r} to {shard!r}, which is not a plain path inside the directory",
                    hint="do not use this checkpoint",
                )
            file = self.directory / shard
            if not is_within(file, self.directory):
                raise CheckpointError(
                    f"{path} maps tensor {name!r} to {shard!r}, a link that leaves the directory",
                    hint="pass the directory that holds the file itself, or copy the file",
                )
            if not shard.endswith(".safetensors"):
                raise UnsafeCheckpointError(f"{path} maps tensor {name!r} to {shard!r}, which is no safetensors file")
            if not os.path.isfile(file):
                raise CheckpointError(
                    f"shard {shard} of {self.directory} is missing (it should hold tensor {name!r})",
                    hint="the download is incomplete; fetch the model again",
                )
        return weight_map


def _no_safetensors(directory: Path, names: list[str]) -> CheckpointError:
    # training_args.bin and the like are pickles too, but not weights; naming them still tells what was found.
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return UnsafeCheckpointError(
            f"{directory} has no safetensors files, only pickles ({', '.join(pickles[:3])}); "
            "loading a pickle can run any program, so cutp never opens one",
            hint="use the repository's safetensors revision, or convert the weights with "
            "`from safetensors.torch import save_file` on a machine you can afford to lose",
        )
    others = [name for name in names if name.endswith(_OTHERS)]
    if others:
        return UnsupportedModelError(
            f"{directory} has no safetensors files, only {', '.join(others[:3])}",
            hint="cutp reads safetensors; fetch the original weights",
        )
    return CheckpointError(f"{directory} has no *.safetensors file", hint="the download is incomplete; fetch it again")
