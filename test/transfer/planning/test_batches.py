"""Plans under a staging budget: thousands of random cases against the oracle."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.errors import ConfigError
from equipoise.topology import EpTopology
from equipoise.transfer.planning.plan import TransferPlan, plan_transfer
from helpers.placements import perturbed, random_map
from helpers.plan_simulator import execute_layer


def random_case(rng: np.random.Generator) -> tuple[EpTopology, int, np.ndarray, np.ndarray]:
    num_nodes, ranks_per_node = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    topology = EpTopology(num_nodes * ranks_per_node, num_nodes, int(rng.integers(1, 7)))
    # Half of the cases have little or no redundancy: that is where slots must change in cycles.
    least = 1 if rng.random() < 0.5 else max(1, topology.num_slots - 2)
    num_experts = int(rng.integers(least, topology.num_slots + 1))
    old = random_map(rng, num_experts, topology)
    new = perturbed(rng, old, num_experts) if rng.random() < 0.3 else random_map(rng, num_experts, topology)
    return topology, num_experts, old, new


def sets(row: np.ndarray, size: int) -> list[set[int]]:
    return [set(part.tolist()) for part in row.reshape(-1, size)]


def missing(before: np.ndarray, after: np.ndarray, size: int) -> list[int]:
    return [len(b - a) for a, b in zip(sets(before, size), sets(after, size), strict=True)]


@pytest.mark.parametrize("seed", range(8))
def test_every_plan_executed_equals_the_oracle_within_its_budget(seed):
    rng = np.random.default_rng(seed)
    several_batches = 0
    for _ in range(400):
        topology, num_experts, old, new = random_case(rng)
        budget = int(rng.integers(1, topology.slots_per_rank + 1))
        plan = plan_transfer(old, new, topology, num_logical_experts=num_experts, max_staged_experts=budget)
        if (old == new).all():
            assert plan.layers == ()
            continue
        (layer,) = plan.layers
        several_batches += len(layer.batches) > 1
        for batch in layer.batches:
            assert set(batch.new_map.tolist()) == set(range(num_experts)), "every batch leaves a complete placement"
        done = execute_layer(layer, old[0], topology)
        assert done.row.tolist() == new[0].tolist()
        assert done.peak_staged <= budget
        # Steps cost no extra byte: each expert still reaches each rank once, and each node once.
        assert done.transfers == sum(missing(old[0], new[0], topology.slots_per_rank))
        assert done.crossings == sum(missing(old[0], new[0], topology.slots_per_node))
        busiest = max(missing(old[0], new[0], topology.slots_per_rank))
        assert len(layer.batches) <= 2 * max(1, -(-busiest // budget))
    assert several_batches > 80


@pytest.mark.parametrize("budget", [1, 2, 4])
def test_deepseek_v3_moves_with_few_staged_experts_in_nearly_the_least_steps(budget):
    rng = np.random.default_rng(budget)
    topology = EpTopology(32, 4, 9)
    old, new = random_map(rng, 256, topology, 4), random_map(rng, 256, topology, 4)
    plan = plan_transfer(old, new, topology, num_logical_experts=256, max_staged_experts=budget)
    in_one_step = plan_transfer(old, new, topology, num_logical_experts=256)
    for layer, whole in zip(plan.layers, in_one_step.layers, strict=True):
        # A batch is also kept from sending more than it may receive, so the busiest sender counts as well.
        assert len(layer.batches) <= -(-whole.num_rounds // budget) + 2
        assert layer.num_rounds <= whole.num_rounds + 4, "small batches must not cost rounds"
        assert execute_layer(layer, old[layer.layer_id], topology).peak_staged <= budget


def test_a_rotation_without_redundancy_needs_one_staging_slot():
    """Each rank's whole content goes to the next rank: no slot is free at any time, so only cycles can move."""
    topology = EpTopology(4, 2, 3)
    old = np.arange(12)[None]
    new = np.roll(old, 3, axis=1)
    plan = plan_transfer(old, new, topology, max_staged_experts=1)
    (layer,) = plan.layers
    assert len(layer.batches) == 3
    assert execute_layer(layer, old[0], topology).peak_staged == 1


def test_plans_of_several_batches_survive_json():
    topology = EpTopology(4, 2, 3)
    old = np.arange(12)[None]
    plan = plan_transfer(old, np.roll(old, 3, axis=1), topology, max_staged_experts=1)
    assert TransferPlan.from_dict(plan.to_dict()).digest == plan.digest
    assert plan.digest != plan_transfer(old, np.roll(old, 3, axis=1), topology).digest


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="max_staged_experts must be at least 1, got 0"):
        plan_transfer([[0, 1]], [[1, 0]], EpTopology(2, 1, 1), max_staged_experts=0)
