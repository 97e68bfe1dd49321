"""The placement that an engine starts with."""

from __future__ import annotations

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.config import ServeConfig
from equipoise.errors import ConfigError, PlacementError
from equipoise.formats.expert_location import LoadStart, MapStart
from equipoise.formats.readers.placements import read_init_expert_location
from equipoise.manager.host import HostTraits
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology


def first_placement(
    config: ServeConfig, num_layers: int, num_logical_experts: int, num_groups: int | None
) -> ExpertLocationMetadata:
    """What ``--init-expert-location`` asks for, on the CPU, with room for any replicas a later placement may have.

    Raises:
        ConfigError: the slots do not divide evenly over the ranks, or the file cannot be read.
        PlacementError: the file does not fit the model.
    """
    redundant = config.eplb.ep_num_redundant_experts
    topology = _topology(config, num_logical_experts)
    start = read_init_expert_location(config.eplb.init_expert_location)
    if isinstance(start, MapStart):
        return start.to_metadata(num_layers, num_logical_experts, topology, max_replicas=redundant + 1)
    if not isinstance(start, LoadStart):
        return ExpertLocationMetadata.trivial(num_layers, num_logical_experts, topology, max_replicas=redundant + 1)
    if start.logical_count.shape[1:] != (num_layers, num_logical_experts):
        raise PlacementError(
            f"logical_count must be for {num_layers} MoE layers of {num_logical_experts} experts, "
            f"got shape {start.logical_count.shape}",
            field="init_expert_location",
        )
    # One thread: this runs before the ranks are forked, and a thread pool would not survive that.
    planned = rebalance_experts(
        start.logical_count,
        topology,
        algorithm=config.eplb.eplb_algorithm,
        num_groups=num_groups,
        dispatch=HostTraits().planned_dispatch(config.eplb),
        num_threads=1,
    )
    return ExpertLocationMetadata.from_physical_to_logical(
        planned.physical_to_logical_map,
        num_logical_experts,
        topology,
        dispatch_weights=planned.dispatch_weights,
        max_replicas=redundant + 1,
    )


def _topology(config: ServeConfig, num_logical_experts: int) -> EpTopology:
    redundant, num_ranks = config.eplb.ep_num_redundant_experts, config.engine.ep_size
    try:
        return EpTopology.for_experts(num_logical_experts, redundant, num_ranks, config.engine.nnodes)
    except ConfigError as error:
        # In the names of the options.
        message = str(error).replace("num_redundant_experts=", "ep_num_redundant_experts=")
        field = {"num_redundant_experts": "ep_num_redundant_experts", "num_ranks": "ep_size", "num_nodes": "nnodes"}
        raise ConfigError(message.replace("num_ranks=", "ep_size="), field=field.get(str(error.field))) from None
