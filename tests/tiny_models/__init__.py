"""Tiny random checkpoints of every model family but Llama, equal on every machine.

One file a family. A family file defines `FAMILY`, a `TinyFamily`; it is found by being here, and its name is that of
its golden file tests/golden/NAME.npz. The golden script computes expected outputs with transformers; the tests rebuild
the same files without torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from tests.tiny_models.checkpoint import Case, TinyFamily, make_prompts, save

FAMILIES: dict[str, TinyFamily] = {
    info.name: importlib.import_module(f"{__name__}.{info.name}").FAMILY
    for info in pkgutil.iter_modules(__path__)
    if info.name != "checkpoint"
}
# Case name -> family name. A case's name starts with its family's, so that it is unique.
CASES: dict[str, str] = {case: name for name, family in FAMILIES.items() for case in family.cases}


def case(name: str) -> Case:
    return FAMILIES[CASES[name]].cases[name]


def config(name: str) -> dict:
    """The complete content of config.json."""
    return FAMILIES[CASES[name]].config(name)


def prompts(name: str) -> list[list[int]]:
    """The token ids of the case's prompts."""
    return make_prompts(name, case(name), config(name)["vocab_size"])


def write_checkpoint(name: str, directory: str | Path, seed: int | None = None) -> Path:
    """Writes config.json and model.safetensors into `directory`, made if needed. seed: another than the case's own."""
    family = FAMILIES[CASES[name]]
    seed = family.cases[name].seed if seed is None else seed
    return save(family.config(name), family.tensors(name, seed), directory)
