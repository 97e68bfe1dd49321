"""Checks of a launch that look at files: the model's experts against the ranks, a given placement."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.hosts.sglang.launch.findings import Finding, Launch


def count_experts(model_path: str | None) -> int | None:
    """Logical experts of a layer, from the ``config.json`` of a local model directory; None if it does not say."""
    try:
        config: dict[str, Any] = json.loads((Path(model_path or "") / "config.json").read_text())
        config = {**config, **(config.get("text_config") or {})}
        names = ("n_routed_experts", "num_experts", "num_local_experts")
        return next((int(config[name]) for name in names if config.get(name)), None)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def check_slots(launch: Launch) -> Iterator[Finding]:
    experts, flags = launch.num_logical_experts, launch.flags
    if experts is None or flags.ep_size < 1 or not (flags.enable_eplb or flags.ep_num_redundant_experts):
        return
    slots = experts + flags.ep_num_redundant_experts
    if slots % flags.ep_size:
        fitting = flags.ep_num_redundant_experts + -slots % flags.ep_size
        yield Finding(
            "refused",
            "--ep-num-redundant-experts",
            f"is {flags.ep_num_redundant_experts}: {experts} + {flags.ep_num_redundant_experts} slots do not divide "
            f"over --ep-size {flags.ep_size}; give {fitting}",
        )
    elif flags.enable_eplb and not flags.ep_num_redundant_experts:
        yield Finding("note", "--ep-num-redundant-experts", "is 0: a hot expert cannot be split, only moved")


def check_given_map(launch: Launch) -> Iterator[Finding]:
    flags = launch.flags
    if flags.init_expert_location == "trivial" or flags.moe_a2a_backend == "none" or flags.ep_size < 1:
        return
    try:
        maps = _read_map(Path(flags.init_expert_location))
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Finding("note", "--init-expert-location", f"was not checked: {error}")
        return
    if maps is None or maps.shape[1] % flags.ep_size:
        return
    by_rank = np.sort(maps.reshape(len(maps), flags.ep_size, -1), axis=2)
    layers = np.flatnonzero((by_rank[:, :, 1:] == by_rank[:, :, :-1]).any((1, 2)))
    if len(layers):
        yield Finding(
            "trap",
            "--init-expert-location",
            f"holds two replicas of one expert on one rank in {len(layers)} layers, the first {layers[0]}: with an a2a "
            "backend SGLang loads the first alone, the second answers with whatever was in memory",
        )


def _read_map(path: Path) -> np.ndarray | None:
    if path.suffix == ".pt":
        import torch

        content = torch.load(path, weights_only=True, map_location="cpu")
    else:
        content = json.loads(path.read_text())
    if "physical_to_logical_map" not in content:
        return None
    maps = np.asarray(content["physical_to_logical_map"])
    if maps.ndim != 2:
        raise ValueError(f"physical_to_logical_map must be (layers, slots), got shape {maps.shape}")
    return maps
