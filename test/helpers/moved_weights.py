"""Carries out the way from one placement to another on one rank, and checks every slot against the oracle."""

from __future__ import annotations

from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.planning.plan import plan_transfer
from helpers.migrate import bytes_over_ranks, migrate_layer
from helpers.placements import live_weights, rank_weights, same_bytes


def migrate(communicator, topology, old, new, weights, **options):
    return list(migrate_layers(communicator, topology, old, new, weights, **options))


def migrate_layers(communicator, topology, old, new, weights, **options):
    updater = ExpertLocationUpdater(communicator, topology, weights, **options)
    plan = plan_transfer(old, new, topology, max_staged_experts=updater.max_staged_experts)
    updater.agree_on(plan)
    for layer in plan.layers:
        yield Moved(layer, migrate_layer(updater, layer), topology)


class Moved:
    """What one layer's migration reports."""

    def __init__(self, layer, profiles, topology):
        self.bytes_received = sum(profile.bytes_received for profile in profiles)
        self.bytes_over_ranks = bytes_over_ranks(layer, profiles, topology)


def assert_weights(weights, p2l, rank, topology):
    expected = rank_weights(p2l, rank, topology)
    for layer, tensors in enumerate(live_weights(weights)):
        for index, tensor in enumerate(tensors):
            assert same_bytes(tensor, expected[layer][index]), f"{layer=} {rank=} {index=} {p2l[layer].tolist()=}"
