"""manifest.json: what a job is, so that a resumed job continues the same one."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import cutp
from cutp.batch.journal import write_atomically
from cutp.errors import ConfigError, OutputError

FORMAT = 1
# Blocks of every weight file that go into the digest, and their bytes: all of 100 GB would take minutes at each start.
_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Manifest:
    """inputs: see `Scan.files`. model, tokenizer: digests. parameters: what shapes every text. created: Unix time.

    changes: differences that were accepted, [{"attempt", "what"}].
    """

    inputs: list[dict[str, Any]]
    model: str
    tokenizer: str
    parameters: dict[str, Any]
    seed: int
    created: int
    versions: dict[str, str] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    format: int = FORMAT

    @property
    def records(self) -> int:
        return sum(file["records"] for file in self.inputs)

    def differences(self, other: Manifest) -> list[str]:
        """What `other` would do in another way, in words."""
        found = []
        if _contents(self.inputs) != _contents(other.inputs):
            found.append("the input has changed")
        found += [f"the {name} is another one" for name in ("model", "tokenizer")
                  if getattr(self, name) != getattr(other, name)]
        for name in sorted(self.parameters.keys() | other.parameters.keys()):
            old, new = self.parameters.get(name), other.parameters.get(name)
            if old != new:
                found.append(f"{name} was {json.dumps(old)} and is {json.dumps(new)}")
        if self.seed != other.seed:
            found.append(f"seed was {self.seed} and is {other.seed}")
        return found

    def changed_to(self, other: Manifest, attempt: int) -> Manifest:
        """`other` as the continuation of this job from `attempt` on."""
        change = {"attempt": attempt, "what": self.differences(other)}
        return replace(other, created=self.created, changes=[*self.changes, change])

    @property
    def last_change(self) -> int:
        """The first attempt that ran with what the manifest says now."""
        return self.changes[-1]["attempt"] if self.changes else 1

    def write(self, path: Path) -> None:
        write_atomically(path, (json.dumps(asdict(self), indent=1, ensure_ascii=True) + "\n").encode())


def read_manifest(path: Path) -> Manifest | None:
    """The manifest, None when there is none. Raises OutputError for one that cannot be read or understood."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        value = json.loads(text)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError("it is of another format")
        manifest = Manifest(**value)
        _ = manifest.records, manifest.last_change, manifest.differences(manifest)
        return manifest
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputError(f"{path} is damaged: {error}", hint="restore it, or choose another directory") from None


def _contents(inputs: list[dict[str, Any]]) -> list[tuple]:
    """What makes two inputs the same. Files may move; the name counts where ids are made from it."""
    return [(file["records"], file["sha256"], file["text"] and file["name"]) for file in inputs]


def now() -> int:
    return int(time.time())


def versions() -> dict[str, str]:
    return {"cutp": cutp.__version__, "python": platform.python_version(), "numpy": np.__version__}


def model_digest(directory: Path) -> str:
    """A digest of config.json, generation_config.json and the weights.

    Of the weights it takes the sizes, the headers and blocks spread over every file, which tells apart models of the
    same shape, but not weights changed in a few places.
    """
    digest = hashlib.sha256()
    names = [name for name in ("config.json", "generation_config.json") if (directory / name).exists()]
    _add_files(digest, directory, names)
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(f"{path.name} {size}\n".encode())
                for index in range(_SAMPLES):
                    file.seek(size * index // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def tokenizer_digest(directory: Path) -> str:
    """A digest of the tokenizer and the chat template."""
    digest = hashlib.sha256()
    _add_files(digest, directory, [name for name in _TEXT_FILES if (directory / name).exists()])
    return digest.hexdigest()


def _add_files(digest: Any, directory: Path, names: list[str]) -> None:
    for name in names:
        try:
            data = (directory / name).read_bytes()
        except OSError as error:
            raise ConfigError(f"{directory / name} cannot be read: {error.strerror or error}") from None
        digest.update(f"{name} {len(data)}\n".encode() + data)
