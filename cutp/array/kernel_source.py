"""The kernel files of `cutp/ops` and what each declares about itself.

A .cu file says in comment lines which architectures it is written for and in which variants it is compiled:

    // archs: sm_80 sm_90a sm_100
    // variants: DTYPE=BF16,F16,F32 HEAD_DIM=64,128
    // variants: DTYPE=BF16 HEAD_DIM=256 WINDOW
    // variants[sm_90a]: DTYPE=BF16 HEAD_DIM=128 TMA

One `variants` line stands for every combination of its values; a bare word is a definition without a value.
Several lines add up. An architecture in brackets limits a line to it; others hold for all architectures. Without
any `variants` line there is one variant, with no definitions. What is not declared is not tested, and therefore
cannot be launched.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from cutp.array.compile import canonical_defines, parse_arch
from cutp.errors import ConfigError, DeviceError

OPS_DIRECTORY = Path(__file__).resolve().parent.parent / "ops"

_DECLARATION = re.compile(r"^\s*//\s*(archs|variants)\s*(?:\[([^\]]*)\])?\s*:(.*)$", re.MULTILINE)
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class KernelSource:
    """One .cu file: its text, the text of the headers it includes from its own folder, and its declarations.

    `variants[arch]` are the declared variants for that architecture, each a sorted tuple of definitions.
    """

    name: str
    text: str
    headers: dict[str, str] = field(repr=False)
    variants: dict[str, tuple[tuple[str, ...], ...]]

    @property
    def archs(self) -> tuple[str, ...]:
        return tuple(self.variants)

    def builds(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Every declared (arch, defines)."""
        for arch, variants in self.variants.items():
            for defines in variants:
                yield arch, defines

    def check_variant(self, arch: str, defines: tuple[str, ...]) -> None:
        """Raise ConfigError unless the file declares this variant for this architecture."""
        if canonical_defines(defines) not in self.variants.get(arch, ()):
            wanted = " ".join(defines) or "no definitions"
            raise ConfigError(f"{self.name} declares no variant with {wanted} for {arch}",
                              hint="add it to the '// variants:' lines of the file, so that it gets tested")

    def arch_for(self, capability: tuple[int, int]) -> str:
        """The declared architecture to run on a GPU of this compute capability; DeviceError if none fits."""
        chosen = choose_arch(capability, self.archs)
        if chosen is None:
            raise DeviceError(
                f"{self.name} has no code for a GPU of compute capability {capability[0]}.{capability[1]}: "
                f"it is written for {', '.join(self.archs)}",
                hint="use another GPU, or --device cpu",
            )
        return chosen


def choose_arch(capability: tuple[int, int], archs: tuple[str, ...]) -> str | None:
    """The best of `archs` whose cubins run on a GPU of this compute capability (major, minor), or None.

    A plain sm_XY runs on capability X.Z for every Z >= Y; sm_XYf, too; sm_XYa runs on X.Y only. A larger Y is
    better, and of the same Y the special kind, which may use all instructions.
    """
    usable = []
    for arch in archs:
        number, kind = parse_arch(arch)
        major, minor = divmod(number, 10)
        if major == capability[0] and (minor == capability[1] if kind == "a" else minor <= capability[1]):
            usable.append((minor, ("", "f", "a").index(kind), arch))
    return max(usable)[2] if usable else None


def kernel_sources(directory: Path = OPS_DIRECTORY) -> list[KernelSource]:
    """Every .cu file of the folder, by name."""
    return [read_source(str(path)) for path in sorted(directory.glob("*.cu"))]


@lru_cache(maxsize=256)
def read_source(name: str) -> KernelSource:
    """The kernel file `name`, of `cutp/ops` unless it is an absolute path. Read once per process.

    Raises ConfigError if there is no such file or a declaration in it is malformed.
    """
    path = OPS_DIRECTORY / name
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"kernel file {path} cannot be read: {error}") from error
    return KernelSource(path.name, text, _headers(path.parent, text), parse_declarations(text, path.name))


def parse_declarations(text: str, label: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The declared variants of each architecture. ConfigError, with the line, if something is wrong."""
    archs: list[str] = []
    lines: list[tuple[str, str | None, list[tuple[str, ...]]]] = []
    for found in _DECLARATION.finditer(text):
        kind, only, words = found.group(1), found.group(2), found.group(3).split()
        where = f"{label}:{text.count(chr(10), 0, found.start(1)) + 1}"
        try:
            if not words:
                raise ConfigError(f"'// {kind}:' lists nothing")
            if kind == "archs":
                if only is not None:
                    raise ConfigError("'// archs' takes no brackets")
                for arch in words:
                    parse_arch(arch)
                archs += words
            else:
                lines.append((where, only, _combinations(words)))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.message}") from error
    if not archs:
        raise ConfigError(f"{label}: no line '// archs: sm_80 sm_90a ...' says what it is written for")
    if len(set(archs)) < len(archs):
        raise ConfigError(f"{label}: an architecture is listed twice: {' '.join(archs)}")
    for where, only, _ in lines:
        if only is not None and only not in archs:
            raise ConfigError(f"{where}: variants[{only}]: the file's archs are {' '.join(archs)}")
    return {arch: _for_arch(arch, lines, label) for arch in archs}


def _combinations(words: list[str]) -> list[tuple[str, ...]]:
    """["A=1,2", "B"] -> [("A=1", "B"), ("A=2", "B")]"""
    choices = []
    for word in words:
        name, equals, values = word.partition("=")
        choices.append([f"{name}={value}" for value in values.split(",")] if equals else [name])
    return [canonical_defines(combination) for combination in itertools.product(*choices)]


def _for_arch(arch: str, lines: list[tuple[str, str | None, list[tuple[str, ...]]]], label: str):
    if not lines:
        return ((),)
    seen: dict[tuple[str, ...], str] = {}
    for where, only, variants in lines:
        for defines in variants if only in (None, arch) else ():
            if defines in seen:
                raise ConfigError(f"{where}: {' '.join(defines)} for {arch} is declared at {seen[defines]} already")
            seen[defines] = where
    if not seen:
        raise ConfigError(f"{label}: no variant is declared for {arch}")
    return tuple(seen)


def _headers(folder: Path, text: str) -> dict[str, str]:
    """The headers that `text` includes from its folder, directly or not. Others are left to the compiler."""
    found: dict[str, str] = {}
    waiting = [text]
    while waiting:
        for name in _INCLUDE.findall(waiting.pop()):
            if name not in found and (folder / name).is_file():
                found[name] = (folder / name).read_text(encoding="utf-8")
                waiting.append(found[name])
    return found
