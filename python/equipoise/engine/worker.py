"""One rank: sets itself up, then steps in lockstep with the others until a step input says stop."""

from __future__ import annotations

import logging
import os
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from equipoise.config import ServeConfig
from equipoise.engine.frontend import Frontend
from equipoise.engine.groups import make_groups
from equipoise.engine.model.blueprint import ModelBlueprint
from equipoise.engine.model.experts import EpContext, token_bounds
from equipoise.engine.model.runner import ModelRunner
from equipoise.engine.model.self_check import check_against_transformers
from equipoise.engine.model.step_batch import Segment, StepBatch
from equipoise.engine.step_channel import StepChannel, StepInput
from equipoise.errors import ConfigError, EquipoiseError, ModelError
from equipoise.jit.threads import available_cpus
from equipoise.manager.host import HostTraits
from equipoise.manager.manager import EplbManager

_log = logging.getLogger("equipoise.engine")


class RankWorker:
    """A rank of the engine.

    Args:
        rendezvous: a directory that is empty at first, shared by the ranks.
        requests: rank 0's pipe to the launcher; None on the other ranks.
    """

    def __init__(
        self,
        config: ServeConfig,
        blueprint: ModelBlueprint,
        rank: int,
        rendezvous: Path,
        requests: Connection | None,
    ) -> None:
        num_ranks = config.engine.ep_size
        self._rank, self._num_ranks = rank, num_ranks
        device = torch.device("cuda", rank) if blueprint.device_type == "cuda" else torch.device("cpu")
        torch.set_num_threads(max(1, available_cpus() // num_ranks))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        groups = make_groups(rank, num_ranks, rendezvous, device, config.eplb.eplb_transport, os.environ)
        self._runner = ModelRunner(blueprint, rank, device, config)
        # Also waits, as long as it takes, for ranks that load more slowly: what follows is collective and has timeouts.
        weight_bytes: list[int] = [0] * num_ranks
        dist.all_gather_object(weight_bytes, self._runner.load_report.bytes_read, group=groups.control)
        self._manager = EplbManager(
            config.eplb,
            self._runner.expert_weights(),
            blueprint.metadata.clone(device),
            groups.serving,
            transfer_communicator=groups.transfers,
            host=HostTraits(num_groups=blueprint.num_groups, tells_phases=True),
        )
        self._manager.warm_up()
        if rank == 0:
            transport = "NCCL" if groups.transfers.knows_streams else "the host"
            _log.info("on %s in %s, experts travel over %s", device.type, blueprint.dtype, transport)
        experts_group = groups.experts if num_ranks > 1 else None
        self._runner.connect(EpContext(blueprint.topology, rank, experts_group, self._manager.route))
        self._channel = StepChannel(groups.control if num_ranks > 1 else None, rank)
        self._warm_up(blueprint)
        self._frontend = (
            Frontend(config.engine, blueprint, requests, tuple(weight_bytes)) if requests is not None else None
        )

    def run(self) -> None:
        """The loop. Returns once a step input says stop."""
        while True:
            step_input = self._next_step()
            tickets = [self._manager.submit(command) for command in step_input.commands]
            phase, forward_pass_id = self._manager.phase, self._manager.forward_pass_id
            logits = None
            if step_input.batch is not None:
                self._begin_forward_pass(step_input.batch)
                logits = self._runner.forward(step_input.batch)
                self._manager.end_forward_pass(counted=True, num_tokens=self._my_tokens(step_input.batch))
            if step_input.batch is not None or self._manager.wants_tick:
                self._manager.tick()
            if self._frontend is not None:
                self._frontend.settle(tickets)
                if step_input.batch is not None:
                    assert logits is not None
                    phase = self._manager.phase if phase == "collecting" else phase
                    self._frontend.complete(step_input.batch, logits, forward_pass_id, phase)
            if step_input.ping:
                self._channel.meet()
                if self._frontend is not None:
                    self._frontend.pong()
            if step_input.stop:
                break
        self._manager.close()

    def _next_step(self) -> StepInput:
        if self._frontend is None:
            return self._channel.receive()
        step_input = self._frontend.next_step(idle=not self._manager.wants_tick)
        self._channel.send(step_input)
        return step_input

    def _begin_forward_pass(self, batch: StepBatch) -> None:
        first = token_bounds(batch.num_tokens, self._num_ranks)[self._rank]
        mine = min(max(batch.num_decode_tokens - first, 0), self._my_tokens(batch))
        self._manager.begin_forward_pass(batch.phase, num_decode_tokens=mine)

    def _my_tokens(self, batch: StepBatch) -> int:
        bounds = token_bounds(batch.num_tokens, self._num_ranks)
        return bounds[self._rank + 1] - bounds[self._rank]

    def _warm_up(self, blueprint: ModelBlueprint) -> None:
        """Run one prompt and one decoding step, uncounted: first-time allocations, and whether the model can run."""
        length = min(max(2 * blueprint.topology.num_ranks, 32), blueprint.max_model_len)
        if length < 2:
            return
        tokens = tuple((7 * i + 3) % blueprint.vocab_size for i in range(length))
        logits = None
        try:
            for segment in (Segment(0, 0, length - 1), Segment(0, length - 1, 1)):
                batch = StepBatch((segment,), tokens[segment.start : segment.end], (0,))
                logits = self._runner.forward(batch)
                self._manager.end_forward_pass(counted=False, num_tokens=self._my_tokens(batch))
            if logits is not None:  # on rank 0; the others wait for its next step
                check_against_transformers(blueprint, list(tokens), logits[0])
        except EquipoiseError:
            raise
        except (NotImplementedError, TypeError, AttributeError, ValueError, KeyError) as error:
            family = type(blueprint.model).__name__
            raise ModelError(
                f"{family} cannot be served: {type(error).__name__}: {error}", field="model_path"
            ) from error


def require_usable_fork() -> None:
    """Check that the process that forked this one had not started CUDA.

    Raises:
        ConfigError: it had, and CUDA cannot be started here any more.
    """
    if torch.cuda._is_in_bad_fork():
        raise ConfigError(
            "this rank was forked from a process that had started CUDA and can use no GPU: torch could not count the "
            "GPUs through NVML (is libnvidia-ml there? is CUDA_VISIBLE_DEVICES plain numbers?); or use --device cpu",
            field="device",
        )


def serve_rank(
    config: ServeConfig, blueprint: ModelBlueprint, rank: int, rendezvous: Path, requests: Connection | None
) -> None:
    """Run a rank from start to end. ``requests``: rank 0's end of the pipe to the launcher."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    require_usable_fork()
    RankWorker(config, blueprint, rank, rendezvous, requests).run()
    # Hazard: after an error the groups are left as they are. Taking NCCL down waits for what is under way, which peers
    # in the same forward pass never finish, and the supervisor would hear of the failure only then. The process ends.
    dist.destroy_process_group()
