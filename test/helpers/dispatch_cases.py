"""Random placements, policies and batches for the tests of dispatch by the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from equipoise import EpTopology, ExpertLocationMetadata
from equipoise.dispatch.policy import DispatchPolicy


@dataclass(frozen=True)
class DispatchCase:
    """One layer, one policy, and a batch of a scope whose middle part is this rank's."""

    metadata: ExpertLocationMetadata
    policy: DispatchPolicy
    rank: int
    step: int
    ids: torch.Tensor  # (T, K), outside [0, E) for "none"
    first: int  # this rank's tokens: ids[first:last]
    last: int

    @property
    def num_experts(self) -> int:
        return self.metadata.num_logical_experts

    @property
    def controls(self) -> torch.Tensor:
        return torch.from_numpy(self.policy.controls(self.metadata.topology, self.rank, step=self.step))

    def count(self, ids: torch.Tensor) -> torch.Tensor:
        """(E,) int32."""
        valid = ids[(ids >= 0) & (ids < self.num_experts)].long()
        return torch.bincount(valid, minlength=self.num_experts).to(torch.int32)


def placement(topology: EpTopology, num_experts: int, rng: np.random.Generator) -> ExpertLocationMetadata:
    """One layer; some replicas share a rank, some have the weight 0."""
    extra = rng.integers(0, num_experts, topology.num_slots - num_experts)
    p2l = rng.permutation(np.concatenate([np.arange(num_experts), extra]))[None]
    weights = rng.random(p2l.shape) * (rng.random(p2l.shape) < 0.8) + 1e-9
    weights /= np.bincount(p2l[0], weights[0], minlength=num_experts)[p2l]
    return ExpertLocationMetadata.from_physical_to_logical(p2l, num_experts, topology, dispatch_weights=weights)


@st.composite
def dispatch_cases(
    draw: st.DrawFn, *, max_tokens: int = 200, costs: bool = True, scopes: tuple[str, ...] = ("rank", "node", "all")
) -> DispatchCase:
    """Cases of all scopes, costs and integer types, with empty batches, empty parts and padding."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_nodes = draw(st.integers(1, 3))
    topology = EpTopology(num_nodes * draw(st.integers(1, 4)), num_nodes, draw(st.integers(1, 5)))
    num_experts = draw(st.integers(1, topology.num_slots))
    scope = draw(st.sampled_from(scopes))
    policy = DispatchPolicy(
        "batch",
        scope,
        active_expert_cost=draw(st.sampled_from([0.0, 0.0, 0.3, 3.0, 1000.0])) if costs else 0.0,
        sweeps=draw(st.integers(0, 1)),
        cross_node_cost=draw(st.sampled_from([0.0, 0.2, 5.0])) if costs and scope != "all" else 0.0,
    )
    tokens = draw(st.sampled_from([0, 1, 3, 20, max_tokens]))
    popularity = rng.dirichlet(np.full(num_experts + 2, 0.5))
    ids = rng.choice(np.arange(-1, num_experts + 1), (tokens, draw(st.integers(1, 6))), p=popularity)
    first, last = sorted(draw(st.tuples(st.integers(0, tokens), st.integers(0, tokens))))
    return DispatchCase(
        placement(topology, num_experts, rng),
        policy,
        draw(st.integers(0, topology.num_ranks - 1)),
        draw(st.integers(0, 1000)),
        torch.from_numpy(ids).to(draw(st.sampled_from([torch.int32, torch.int64]))),
        first,
        last,
    )
