"""vLLM-Ascend: expert maps (JSON) and load views.

Expert map: ``{"moe_layer_count", "layer_list": [{"layer_id", "device_count", "device_list": [{"device_id",
"device_expert": [...]}]}]}``; the index in a device's list is the local slot.

Load view: ``moe_load``, tokens per slot as the engine gathers them, (L, ranks, slots a rank) or with one more axis of
windows in front, beside ``expert_maps``: either the experts of each slot in the same shape, or, as the engine holds it,
(L, ranks, E) with the local slot of each expert and -1 where the rank does not hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from equipoise.errors import TraceError
from equipoise.formats.archive import MAX_EXPERTS, read_array
from equipoise.formats.container import Container
from equipoise.formats.numbers import as_counts, as_numbers, require_integer, to_logical_count
from equipoise.formats.raw_trace import RawTrace, ReadOptions

_LOAD_NAMES = ("moe_load", "expert_load_view")
_MAP_NAMES = ("expert_maps", "expert_map", "placement")


def is_expert_map(content: Any) -> bool:
    return isinstance(content, dict) and "layer_list" in content


def read_expert_map(content: dict[str, Any]) -> tuple[np.ndarray, int]:
    """The placement of an expert map, (L, P) int64, and its number of devices.

    Raises:
        TraceError: layers of different size, or something that is no expert.
    """
    layers = content["layer_list"]
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, dict) for layer in layers):
        raise TraceError("layer_list must be a list of layers")
    layers = sorted(layers, key=lambda layer: require_integer(layer.get("layer_id", 0), "layer_id"))
    if "moe_layer_count" in content and content["moe_layer_count"] != len(layers):
        raise TraceError(f"moe_layer_count is {content['moe_layer_count']!r}, layer_list has {len(layers)} layers")
    rows = [_layer(layer) for layer in layers]
    shapes = {(len(row), tuple(map(len, row))) for row in rows}
    if len(shapes) > 1 or len(set(next(iter(shapes))[1])) != 1:
        raise TraceError("every device of every layer must list the same number of experts")
    array = np.array(rows, dtype=np.int64)
    return array.reshape(len(rows), -1), array.shape[1]


def _layer(layer: dict[str, Any]) -> list[list[int]]:
    name = f"layer {layer.get('layer_id')}"
    devices = layer.get("device_list")
    if not isinstance(devices, list) or not devices or not all(isinstance(device, dict) for device in devices):
        raise TraceError(f"{name}: device_list must be a list of devices")
    if layer.get("device_count", len(devices)) != len(devices):
        raise TraceError(f"{name}: device_count is {layer['device_count']!r}, device_list has {len(devices)}")
    devices = sorted(devices, key=lambda device: require_integer(device.get("device_id", 0), "device_id"))
    experts = [device.get("device_expert") for device in devices]
    if not all(isinstance(each, list) and each for each in experts):
        raise TraceError(f"{name}: device_expert must be a list of experts")
    return [[require_integer(e, f"{name}: device_expert", 0, MAX_EXPERTS - 1) for e in each] for each in experts]


def write_expert_map(physical_to_logical_map: np.ndarray, num_ranks: int, layer_ids: Sequence[int]) -> dict[str, Any]:
    """The JSON value that ``expert_map_path`` names."""
    num_layers, num_slots = physical_to_logical_map.shape
    by_device = physical_to_logical_map.reshape(num_layers, num_ranks, num_slots // num_ranks)
    return {
        "moe_layer_count": num_layers,
        "layer_list": [
            {
                "layer_id": int(layer_id),
                "device_count": num_ranks,
                "device_list": [
                    {"device_id": device, "device_expert": experts.tolist()} for device, experts in enumerate(layer)
                ],
            }
            for layer_id, layer in zip(layer_ids, by_device, strict=True)
        ],
    }


def is_load_view(container: Container) -> bool:
    return container.kind in ("torch", "npz", "json") and any(name in container.names for name in _LOAD_NAMES)


def read_load_view(container: Container, _options: ReadOptions) -> RawTrace:
    """A load view with the map that says which expert each slot holds.

    Raises:
        TraceError: no map, or shapes that do not fit together.
    """
    load = as_counts(_array(container, _LOAD_NAMES, (3, 4)), "moe_load")
    load = load[None] if load.ndim == 3 else load
    if not any(name in container.names for name in _MAP_NAMES):
        raise TraceError(f"moe_load counts slots: one of {', '.join(_MAP_NAMES)} must say which expert each slot holds")
    placed = _array(container, _MAP_NAMES, (3,)).astype(np.int64)
    p2l = _slots(placed, load.shape)
    physical = load.reshape(load.shape[0], load.shape[1], -1)
    return RawTrace(
        to_logical_count(physical, p2l, int(p2l.max()) + 1),
        physical_count=physical,
        physical_to_logical_map=p2l,
        metadata={"source": "vllm_ascend load view", "num_ranks": load.shape[2]},
        found=f"vLLM-Ascend load view of {load.shape[2]} ranks",
    )


def _array(container: Container, names: tuple[str, ...], dims: tuple[int, ...]) -> np.ndarray:
    name = next(name for name in names if name in container.names)
    value = read_array(container.content, name) if container.kind == "npz" else container.content[name]
    return as_numbers(value, name, dims)


def _slots(placed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(L, P) experts of slots, from either form of the map."""
    _, num_layers, num_ranks, num_slots = shape
    if placed.shape[:2] != (num_layers, num_ranks):
        raise TraceError(f"moe_load is of (layers, ranks) = {(num_layers, num_ranks)}, its map of {placed.shape[:2]}")
    if placed.max() >= MAX_EXPERTS or placed.min() < -1:
        raise TraceError(f"the map of moe_load must hold ids in [-1, {MAX_EXPERTS})")
    if placed.shape[2] == num_slots and placed.min() >= 0:
        return placed.reshape(num_layers, -1)
    p2l = np.full((num_layers, num_ranks, num_slots), -1, dtype=np.int64)
    layer, rank, expert = np.nonzero(placed >= 0)
    local = placed[layer, rank, expert]
    if local.max(initial=0) >= num_slots:
        raise TraceError(f"the map of moe_load names local slot {local.max()}, a rank has {num_slots}")
    p2l[layer, rank, local] = expert
    if (p2l < 0).any():
        raise TraceError("the map of moe_load leaves slots without an expert")
    return p2l.reshape(num_layers, -1)
