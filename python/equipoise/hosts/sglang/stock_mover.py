"""Level ``manager``: SGLang's own mover brings some layers to the placement that we planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from equipoise.hosts.sglang.share_table import even_table
from equipoise.manager.host import MakeMigration
from equipoise.manager.migration import HostMigration
from equipoise.placement.metadata import ExpertLocationMetadata


class StockMover:
    """Calls what SGLang's own rebalance calls, with the collaborators that its manager was given.

    Args:
        collaborators: the keyword arguments of SGLang's ``EPLBManager``.
        layer_ids: SGLang's number of each row of a placement.
    """

    def __init__(self, collaborators: Mapping[str, Any], layer_ids: Sequence[int]) -> None:
        self._row_of = {layer_id: row for row, layer_id in enumerate(layer_ids)}
        self._get_model = collaborators["get_model"]
        self._get_updater = collaborators["get_expert_location_updater"]
        self._get_backup = collaborators["get_expert_backup_client"]
        self._get_weight_updater = collaborators["get_weight_updater"]

    def move(self, target: ExpertLocationMetadata, layer_ids: list[int]) -> None:
        """Collective, and waited for: the weights and SGLang's maps of these layers follow ``target``."""
        from sglang.srt.eplb.eplb_manager import update_expert_location_with_recovery
        from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
        from sglang.srt.runtime_context import get_exec, get_parallel

        rows = [self._row_of[layer_id] for layer_id in layer_ids]
        update_expert_location_with_recovery(
            expert_location_updater=self._get_updater(),
            model=self._get_model(),
            new_expert_location_metadata=_with_layers(get_global_expert_location_metadata(), target, rows, layer_ids),
            update_layer_ids=layer_ids,
            tp_rank=get_parallel().tp_rank,
            expert_backup_client=self._get_backup(),
            update_weights_from_disk_callable=self._get_weight_updater().update_weights_from_disk,
            ep_dispatch_algorithm=get_exec().moe.ep_dispatch_algorithm,
            init_lplb_solvers_callable=lambda: None,
        )


def stock_migration(
    collaborators: Mapping[str, Any], layer_ids: Sequence[int], *, layers_per_tick: int | None
) -> MakeMigration:
    """What an :class:`~equipoise.manager.manager.EplbManager` moves by; arguments are those of :class:`StockMover`.

    ``layers_per_tick``: layers between two passes; None: all.
    """
    mover = StockMover(collaborators, layer_ids)
    return lambda placement, failures: HostMigration(placement, mover.move, failures, layers_per_tick=layers_per_tick)


def _with_layers(live: Any, target: ExpertLocationMetadata, rows: list[int], layer_ids: list[int]) -> Any:
    """A copy of SGLang's metadata with some layers of ``target``; the others as they are."""
    p2l = live.physical_to_logical_map_cpu.clone()
    l2p = live.logical_to_all_physical_map_cpu.clone()
    for row, layer_id in zip(rows, layer_ids, strict=True):
        p2l[layer_id] = target.physical_to_logical_map[row]
        table = torch.from_numpy(even_table(target.physical_to_logical_map[row].numpy(), target.num_logical_experts))
        l2p[layer_id] = -1
        l2p[layer_id, :, : table.shape[1]] = table
    device = live.physical_to_logical_map.device
    return type(live)._init_raw(
        ep_size=live.ep_size, physical_to_logical_map=p2l.to(device), logical_to_all_physical_map=l2p.to(device)
    )
