"""An engine without a model, for what a real one cannot be made to do on demand: die, hang, fail a rebalance."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from equipoise.engine.requests import GenerateRequest, TokenEvent
from equipoise.engine.step_log import GetSteps, GetStepTotals, StepRecord, StepTotals
from equipoise.errors import ConfigError, EngineDeadError, EquipoiseError
from equipoise.load.stream_report import RecordingReply
from equipoise.manager.commands import (
    Command,
    DumpRecording,
    DumpReply,
    GetRecording,
    GetStatus,
    Rebalance,
    StartRecording,
    StatusReply,
    StopRecording,
)
from equipoise.manager.reports import BalanceSummary, RebalanceProfile, RebalanceReport, RebalanceTotals


class ByteTokenizer:
    """One token per byte; 0 ends the text."""

    eos_token_id = 0
    chat_template = "made up"

    def __call__(self, text: str, **_options: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:  # noqa: ARG002 - transformers' interface
        return bytes(ids).decode()

    def get_vocab(self) -> dict[str, int]:
        return {"x" * 2000: 0}

    def apply_chat_template(self, messages: list[dict[str, str]], **_options: object) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


REPORT = RebalanceReport(
    outcome="committed",
    action="migrate",
    reason="balancedness 0.500 can become 0.900",
    algorithm="deepseek",
    forward_pass_id=7,
    window_steps=8,
    layer_ids=[0, 1],
    balancedness_before=[0.5, None],
    balancedness_after=[0.9, None],
    mean_balancedness_before=0.5,
    mean_balancedness_after=0.9,
    balance_before=BalanceSummary(0.5, 0.5, 0.5, 0, 2.0, 2.0, 2.0),
    balance_after=BalanceSummary(0.9, 0.9, 0.9, 0, 1.1, 1.1, 1.1),
    slots_changed=[3, 0],
    moves=[2, 0],
    cross_node_moves=[1, 0],
    bytes_sent_per_rank=[10, 20],
    bytes_received_per_rank=[20, 10],
    bytes_sent_per_node=[0],
    bytes_received_per_node=[0],
    planning_seconds=0.01,
    transfer_seconds=0.02,
    stall_seconds=0.005,
    profile=RebalanceProfile(
        gather_seconds=0.001,
        plan_seconds=0.002,
        plan_transfer_seconds=0.003,
        wait_seconds=0.01,
        migrate_seconds=0.02,
        stall_seconds=0.005,
        peak_staging_bytes=640,
        layers=[],
    ),
)


class FakeEngine:
    """Answers each prompt with its own tokens, shifted by one, ``delay`` seconds apart."""

    def __init__(self, delay: float = 0.0) -> None:
        self.tokenizer = ByteTokenizer()
        self.max_model_len = 64
        self.vocab_size = 256
        self.silent_seconds = 0.0
        self.eos_token_ids = (ByteTokenizer.eos_token_id,)
        self.delay = delay
        self.error: str | None = None
        self.die_after: int | None = None  # tokens of a request
        self.aborted: list[str] = []
        self.finished: list[str] = []
        self.commands: list[Command] = []
        self.raises: EquipoiseError | None = None  # by the next command
        self.report = REPORT
        self.totals = RebalanceTotals()
        self.steps = [StepTotals("collecting", 20, 0.05, {0.01: 3, 0.1: 2, float("inf"): 0})]

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        if self.error is not None:
            raise EngineDeadError(self.error)
        if len(request.input_ids) > 64:
            raise ConfigError(f"input_ids has {len(request.input_ids)} tokens, at most 64", field="input_ids")
        wanted = request.sampling.max_new_tokens
        for count in range(1, wanted + 1):
            await asyncio.sleep(self.delay)
            if self.die_after is not None and count > self.die_after:
                self.error = "rank 1 was killed"
                raise EngineDeadError(self.error)
            if request.rid in self.aborted:
                yield TokenEvent(request.rid, [], "", "abort")
                return
            token = request.input_ids[(count - 1) % len(request.input_ids)] % 94 + 33
            yield TokenEvent(request.rid, [token], chr(token), "length" if count == wanted else None)
        self.finished.append(request.rid)

    async def abort(self, rid: str) -> None:
        self.aborted.append(rid)

    async def control(self, command: Command) -> Any:
        if self.error is not None:
            raise EngineDeadError(self.error)
        self.commands.append(command)
        if self.raises is not None:
            error, self.raises = self.raises, None
            raise error
        if isinstance(command, Rebalance):
            return dataclasses.replace(self.report, outcome="dry_run") if command.dry_run else self.report
        if isinstance(command, DumpRecording):
            return DumpReply(path=f"{command.directory}/dump.pt", num_steps=3, num_tokens=12)
        if isinstance(command, StartRecording | StopRecording | GetRecording):
            return RecordingReply(isinstance(command, StartRecording), None)
        if isinstance(command, GetStatus):
            return self.status()
        if isinstance(command, GetSteps):
            steps = [StepRecord(id_, 0.01, 4, "collecting") for id_ in range(5)]
            return [step for step in steps if step.forward_pass_id >= command.since]
        if isinstance(command, GetStepTotals):
            return self.steps
        return None

    def status(self) -> StatusReply:
        return StatusReply(
            phase="collecting",
            enable_eplb=True,
            recording=False,
            compiling=False,
            algorithm="deepseek",
            available_algorithms=["deepseek"],
            forward_pass_id=5,
            load_phase="all",
            window_steps=5,
            layer_ids=[0, 1],
            mean_balancedness=0.75,
            balance=BalanceSummary(0.75, 0.7, 0.6, 1, 1.4, 1.7, 1.3),
            balancedness=[0.75, None],
            rank_load=[[6.0, 3.0], [0.0, 0.0]],
            num_layers=2,
            num_logical_experts=4,
            num_physical_experts=6,
            num_ranks=2,
            num_nodes=1,
            num_rebalances=self.totals.by_outcome["committed"],
            totals=self.totals,
            layers_pending=0,
            last_report=self.report,
            error=None,
        )
