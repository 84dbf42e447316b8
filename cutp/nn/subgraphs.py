"""Groups of layers that share one captured body, and the runs of layers a forward pass executes as a unit.

On a GPU a run is what one CUDA graph captures. On the CPU a run is executed layer by layer, so groups change nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from cutp.errors import ConfigError
from cutp.nn.module import Module


@dataclass(frozen=True)
class LayerRun:
    """Layers start .. stop - 1; `group` is their group's number, None for layers that are in no group."""

    start: int
    stop: int
    group: int | None


def plan_layer_runs(layers: Sequence[Module], use_subgraphs: bool = False,
                    groups: Sequence[Sequence[int]] | None = None) -> list[LayerRun]:
    """The runs, in layer order, that cover all layers once: neighbours of the same group form one run.

    Without `groups`, `use_subgraphs` puts layers that are alike into one group each. Raises ConfigError, also when
    `use_subgraphs` is off, for an empty group, an index out of range, a layer in two groups, or a group whose layers
    differ in shape or settings; the message names the group and the layers.
    """
    if groups is not None:
        _check(layers, groups)
    if not use_subgraphs:
        groups = []
    elif groups is None:
        groups = _alike(layers)
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    runs: list[LayerRun] = []
    for index in range(len(layers)):
        group = group_of.get(index)
        if runs and runs[-1].group == group:
            runs[-1] = LayerRun(runs[-1].start, index + 1, group)
        else:
            runs.append(LayerRun(index, index + 1, group))
    return runs


def _alike(layers: Sequence[Module]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(tuple(layer.signature().items()), []).append(index)
    return list(groups.values())


def _check(layers: Sequence[Module], groups: Sequence[Sequence[int]]) -> None:
    owner: dict[int, int] = {}
    for number, group in enumerate(groups):
        if not isinstance(group, Sequence):
            raise ConfigError(f"subgraph group {number} is {group!r}, not a list of layers")
        if not len(group):
            raise ConfigError(f"subgraph group {number} is empty")
        for index in group:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(layers):
                raise ConfigError(f"subgraph group {number} names layer {index!r}; the layers are 0 .. "
                                  f"{len(layers) - 1}")
            if index in owner:
                raise ConfigError(f"layer {index} is in subgraph groups {owner[index]} and {number}")
            owner[index] = number
        first = layers[group[0]].signature()
        for index in group[1:]:
            _check_alike(number, group[0], first, index, layers[index].signature())


def _check_alike(number: int, first_index: int, first: dict, index: int, other: dict) -> None:
    for name in [*first, *other]:
        if first.get(name) != other.get(name):
            raise ConfigError(f"subgraph group {number} mixes layers: {name} is {first.get(name)} in layer "
                              f"{first_index} and {other.get(name)} in layer {index}",
                              hint="put them into different groups")
