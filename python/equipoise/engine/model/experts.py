"""Finds a model's experts modules, and spreads them over ranks (EpExperts)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from einops import rearrange
from torch.profiler import record_function

from equipoise.engine.model.token_exchange import make_exchange
from equipoise.errors import ModelError
from equipoise.topology import EpTopology

Route = Callable[[int, torch.Tensor, Sequence[int] | None], torch.Tensor]


def find_experts(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The experts modules of a model with their names, in the order of its layers.

    An experts module stores each of its weights for all experts in one parameter, first dimension ``num_experts``,
    and is called as ``experts(hidden_states, top_k_index, top_k_weights)``.

    Raises:
        ModelError: none found, some that do not follow the interface, or layers with different numbers of experts.
    """
    found = [(name, module) for name, module in model.named_modules() if _stores_experts(module)]
    family = type(model).__name__
    if not found:
        raise ModelError(f"{family} has no experts stored as transformers 5 stores them", field="model_path")
    for name, module in found:
        parameters = list(inspect.signature(type(module).forward).parameters.values())
        plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        own = {id(p) for p in module.parameters(recurse=False)}
        if len(plain) != 4 or any(id(p) not in own for p in module.parameters()):
            raise ModelError(
                f"{family}: {name} ({type(module).__name__}) is not called as "
                "experts(hidden_states, top_k_index, top_k_weights) on stacked weights",
                field="model_path",
            )
    counts = {num_experts_of(module) for _, module in found}
    if len(counts) > 1:
        raise ModelError(f"{family} has layers with different numbers of experts: {sorted(counts)}", field="model_path")
    return found


def experts_are_replaceable(experts: Sequence[tuple[str, torch.nn.Module]]) -> bool:
    """Whether the experts modules take an implementation of ours (transformers' ``use_experts_implementation``)."""
    return all(hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") for _, module in experts)


def num_experts_of(module: torch.nn.Module) -> int:
    count = module.num_experts
    assert isinstance(count, int)
    return count


def _stores_experts(module: torch.nn.Module) -> bool:
    count = getattr(module, "num_experts", None)
    if not isinstance(count, int) or count < 1:
        return False
    own = list(module.parameters(recurse=False))
    return any(p.ndim == 3 for p in own) and all(p.shape[0] == count for p in own)


@dataclass(frozen=True)
class EpContext:
    """What the experts of all layers of a rank share."""

    topology: EpTopology
    rank: int
    group: dist.ProcessGroup | None  # None: one rank
    route: Route  # (layer id, (T, K) int64 logical ids of all ranks, bounds of ranks) -> int64 slots of this rank's


class EpExperts(torch.nn.Module):
    """Stands in for a model's experts module: same call, same result, experts on all ranks.

    Every rank is called with the same tokens. It takes its part of them, sends one copy per (token, choice) to the
    rank that holds the chosen slot, runs what it receives through its own slots, gets its results back, sums them with
    the routing weights, and gathers the results of all ranks. ``inner`` is the model's own module with as many
    experts as a rank has slots, so gating, biases and activation stay the model's; or with as many as a pool has rows,
    and then ``row_of_slot``, (slots_per_rank,) int64, says which of them serve this layer's slots.
    """

    def __init__(
        self, inner: torch.nn.Module, layer_id: int, context: EpContext, row_of_slot: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.inner = inner
        self.layer_id = layer_id
        self._context = context
        self._row_of_slot = row_of_slot

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(..., H) tokens with (T, K) experts and weights to (..., H)."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        index = top_k_index.reshape(tokens.shape[0], -1).long()
        weights = top_k_weights.reshape(index.shape)
        context = self._context
        if context.group is None:
            slots = context.route(self.layer_id, index, None)
            return self._inner(tokens, slots, weights).reshape(hidden_states.shape)
        bounds = token_bounds(tokens.shape[0], context.topology.num_ranks)
        mine = slice(bounds[context.rank], bounds[context.rank + 1])
        slots = context.route(self.layer_id, index, bounds)
        result = self._through_experts(tokens[mine], slots, weights[mine], bounds[1], context.group)
        return self._gather(result, bounds, context.group).reshape(hidden_states.shape)

    def _through_experts(
        self,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        weights: torch.Tensor,
        max_tokens: int,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        """This rank's (n, H) tokens to their (n, H) results; ``max_tokens``: the maximum n of any rank."""
        topology = self._context.topology
        num_tokens, choices = slots.shape
        # Sorted by slot, what goes to one rank lies together, in the order of its slots.
        sorted_slots, order = slots.flatten().sort(stable=True)
        routed = _with_slots(tokens[order // choices], sorted_slots % topology.slots_per_rank)
        exchange = make_exchange(
            sorted_slots // topology.slots_per_rank, max_tokens * choices, routed.shape[1] * routed.itemsize, group
        )
        with record_function("equipoise.engine.send_tokens"):
            received = exchange.there(routed)
        with record_function("equipoise.engine.run_experts"):
            computed = self._run_slots(received, tokens.shape[1])
        with record_function("equipoise.engine.return_tokens"):
            returned = exchange.back(computed)
        results = torch.empty_like(returned)
        results[order] = returned
        # Weighting at home, in the precision of the weights, is what the model does after its down projection.
        results = rearrange(results, "(t k) h -> t k h", t=num_tokens, k=choices) * weights.unsqueeze(-1)
        return results.sum(dim=1).to(tokens.dtype)

    def _run_slots(self, received: torch.Tensor, width: int) -> torch.Tensor:
        """Run (M, width + slot) routed tokens through this rank's slots: (M, width); padding gives anything."""
        slots = received[:, width:].contiguous().view(torch.int32).flatten().long()
        tokens = received[:, :width]
        if received.device.type != "cpu":
            # Computing padding is cheaper than a sync that would tell the host which it is.
            padding = (slots < 0).unsqueeze(1)
            return self._run(tokens.masked_fill(padding, 0), slots.clamp(min=0))
        real = (slots >= 0).nonzero().flatten()
        if len(real) == len(slots):
            return self._run(tokens, slots)
        results = received.new_zeros(len(received), width)
        results[real] = self._run(tokens[real], slots[real])
        return results

    def _run(self, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        if not len(tokens):
            return tokens.new_empty(tokens.shape)
        return self._inner(tokens, slots.unsqueeze(1), tokens.new_ones(len(tokens), 1))

    def _inner(self, tokens: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``slots``: local ones, (T, K)."""
        results: torch.Tensor = self.inner(
            tokens, slots if self._row_of_slot is None else self._row_of_slot[slots], weights
        )
        return results

    def _gather(self, result: torch.Tensor, bounds: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        """Gather all ranks' results, in the order of the tokens."""
        num_ranks = self._context.topology.num_ranks
        capacity = bounds[1] - bounds[0]
        padded = result.new_zeros(capacity, result.shape[1])
        padded[: len(result)] = result
        gathered = result.new_empty(num_ranks * capacity, result.shape[1])
        if group.name() == "gloo":
            # Its all_gather passes blocks on from rank to rank; sent directly they arrive in half the time.
            dist.all_to_all_single(gathered, padded.repeat(num_ranks, 1), group=group)
        else:
            dist.all_gather_into_tensor(gathered, padded, group=group)
        if bounds[-1] == len(gathered):
            return gathered
        parts = [gathered[r * capacity : r * capacity + bounds[r + 1] - bounds[r]] for r in range(num_ranks)]
        return torch.cat(parts)


def token_bounds(num_tokens: int, num_ranks: int) -> list[int]:
    """Split a step's tokens over the ranks: (num_ranks + 1,) bounds; sizes fall and differ by at most one."""
    size, rest = divmod(num_tokens, num_ranks)
    return [rank * size + min(rank, rest) for rank in range(num_ranks + 1)]


def _with_slots(tokens: torch.Tensor, local_slots: torch.Tensor) -> torch.Tensor:
    """Append each token's slot to it as 4 bytes, so that both cross in one message."""
    return torch.cat([tokens, local_slots.to(torch.int32)[:, None].view(tokens.dtype)], dim=1)
