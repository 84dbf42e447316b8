"""From what a user calls a model to a directory on disk. Nothing here opens a connection."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cutp.errors import CheckpointError, UnsupportedModelError

_BUNDLED = Path(__file__).resolve().parent.parent / "bundled" / "tales"
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"
_REPOSITORY = re.compile(rf"(?P<id>{_PART}(?:/{_PART})?)(?:@(?P<revision>{_PART}(?:/{_PART})*))?")
_NO_DOWNLOAD = "cutp never downloads; use `hf download {id}` to fetch it first, or pass a directory"


def resolve_model(model: str | os.PathLike | None = None) -> Path:
    """The directory of `model`.

    None is the small model bundled with cutp; a directory is itself; anything else is a repository id ("org/name" or
    "name", optionally "@revision" with a branch, tag or full commit) looked up in the local Hugging Face cache.
    Raises CheckpointError when there is no such directory or it has no config.json, UnsupportedModelError for the
    path of a GGUF file.
    """
    if model is None:
        return _with_config(_BUNDLED, "the bundled model directory")
    text = os.fspath(model)
    if not isinstance(text, str) or not text or "\0" in text:
        raise CheckpointError(f"{text!r} is not the name of a model", hint="pass a directory or a repository id")
    path = Path(text).expanduser()
    if os.path.isdir(path):  # unlike Path.is_dir, False rather than an error for a name that is too long
        return _with_config(path, "the model directory")
    if os.path.exists(path):
        if path.suffix == ".gguf":
            raise UnsupportedModelError(f"{path} is a GGUF file", hint="cutp reads directories of safetensors files")
        raise CheckpointError(f"{path} is a file", hint=f"pass the directory that holds it: {path.parent}")
    match = _REPOSITORY.fullmatch(text)
    # A Path object, or a string that starts like a path, was never meant as a repository id.
    if match is None or isinstance(model, Path) or ".." in text:
        message = f"there is no directory {str(path)[:200]}"
        raise CheckpointError(message, hint="pass a directory with config.json and safetensors")
    return _in_cache(match["id"], match["revision"], path)


def cache_directory() -> Path:
    """The Hugging Face hub cache as the environment names it."""
    places = (
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    )
    for variable, below in places:
        value = os.environ.get(variable)
        if value:
            return Path(os.path.expandvars(value)).expanduser() / below
    return Path.home() / ".cache" / "huggingface" / "hub"


def is_within(path: Path, directory: Path) -> bool:
    """Whether the file that `path` leads to, links followed, belongs to the model `directory`.

    True inside the directory itself. In a Hugging Face cache, where snapshots/<commit>/ holds links, also in that
    repository's blobs/ and in the cache's store of blobs shared between repositories.
    """
    try:
        real, root = path.resolve(), directory.resolve()
    except (OSError, RuntimeError):  # links that form a loop
        return False
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        repository = root.parent.parent
        allowed += [repository / "blobs", repository.parent / "blobs"]
    return any(real.is_relative_to(place) for place in allowed)


def _with_config(directory: Path, what: str) -> Path:
    if not (directory / "config.json").is_file():
        try:
            held = sorted(os.listdir(directory))
        except OSError as e:
            raise CheckpointError(f"{what} {directory} cannot be read: {e.strerror or e}") from None
        state = f"holds {', '.join(held[:5])}{', ...' if len(held) > 5 else ''}" if held else "is empty"
        message = f"{what} {directory} has no config.json: it {state}"
        raise CheckpointError(message, hint="pass a directory in Hugging Face format")
    return directory


def _in_cache(repository: str, revision: str | None, path: Path) -> Path:
    folder = cache_directory() / f"models--{repository.replace('/', '--')}"
    hint = _NO_DOWNLOAD.format(id=repository)
    if not folder.is_dir():
        message = f"{repository!r} is not a directory and not in the Hugging Face cache (looked at {path}, {folder})"
        raise CheckpointError(message, hint=hint)
    looked = [folder / "refs" / (revision or "main")]
    commit = revision
    if looked[0].is_file():
        commit = looked[0].read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(_PART, commit):
            raise CheckpointError(f"{looked[0]} does not hold a commit name", hint=hint)
    if commit:
        snapshot = folder / "snapshots" / commit
        looked.append(snapshot)
        if snapshot.is_dir():
            return _with_config(snapshot, "the cached snapshot")
    places = ", ".join(str(p) for p in looked)
    message = f"revision {revision or 'main'!r} of {repository!r} is not in the Hugging Face cache (looked at {places})"
    raise CheckpointError(message, hint=hint)
