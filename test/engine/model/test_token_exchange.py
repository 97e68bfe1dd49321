"""Rows reach the rank they are sent to and their results come back in order, padded or not."""

from __future__ import annotations

import torch
import torch.distributed as dist

from equipoise.engine.model.token_exchange import make_exchange
from helpers.run_ranks import run_ranks


def _round_trips(rank: int, world_size: int) -> int:
    group = dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(rank)
    trips = 0
    for count, dtype in [(0, torch.float32), (1, torch.float32), (5, torch.bfloat16), (40, torch.float32)]:
        mine = max(count - rank, 0)  # ranks send different numbers of rows
        destinations = torch.randint(world_size, (mine,), generator=generator).sort().values
        rows = torch.stack(
            [torch.full((mine,), float(rank)), torch.arange(mine).float(), destinations.float()], dim=1
        ).to(dtype)
        outcomes = []
        for row_bytes in (rows.shape[1] * rows.itemsize, 1 << 30):
            exchange = make_exchange(destinations, max(count, 1), row_bytes, group)
            received = exchange.there(rows)
            real = ~received.isnan().any(1)
            assert (received[real, 2] == rank).all()
            outcomes.append(received[real])
            returned = exchange.back(received * 2)
            assert torch.equal(returned, rows * 2)
            trips += 1
        assert torch.equal(*outcomes)
        assert bool(real.all()), "nothing is padded when counts are told"
    return trips


def test_round_trips_padded_and_exact() -> None:
    assert run_ranks(_round_trips, 3) == [8, 8, 8]
