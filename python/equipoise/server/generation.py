"""Runs prompts on the engine: one stream of events for a whole batch, aborted when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from equipoise.admin.http_errors import HttpError
from equipoise.engine.requests import GenerateRequest, SamplingParams, TokenEvent, TokenLogprob
from equipoise.errors import ConfigError, EngineDeadError
from equipoise.server.engine_protocol import ServingEngine
from equipoise.server.fields import MAX_BATCH, MAX_CHOICES, MAX_RID_CHARACTERS
from equipoise.server.prometheus import ServerMetrics

T = TypeVar("T")
_Arrivals = asyncio.Queue[tuple[int, TokenEvent] | BaseException | None]


@dataclass
class Answer:
    """What one prompt has got so far."""

    rid: str
    prompt_tokens: int
    sampling: SamplingParams
    started: float = field(default_factory=time.monotonic)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def take(self, event: TokenEvent) -> None:
        self.logprobs.extend(event.logprobs)
        self.prompt_logprobs.extend(event.prompt_logprobs)
        self.text += event.text_delta
        self.token_ids.extend(event.token_ids)
        self.finish_reason = event.finish_reason

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class RequestGenerator:
    """Run requests on an engine and know which are running. One per server.

    Args:
        max_requests: that may run and wait together; more are refused.
        timeout: seconds that an answer may take; None: as long as it takes.
    """

    def __init__(
        self, engine: ServingEngine, metrics: ServerMetrics, *, max_requests: int, timeout: float | None
    ) -> None:
        self.engine = engine
        self._metrics = metrics
        self._max_requests = max_requests
        self._timeout = timeout
        self._running: set[str] = set()
        self._aborts: set[asyncio.Task[None]] = set()
        self._arrivals: set[_Arrivals] = set()  # of every run

    def make_requests(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams], rids: Sequence[str] | None
    ) -> list[GenerateRequest]:
        """One engine request per prompt, under the client's ids or fresh ones.

        Raises:
            ConfigError: an id that is taken, used twice or too long; field ``rid``.
            HttpError: 429, there are too many requests already.
        """
        if len(self._running) + len(prompts) > self._max_requests:
            raise HttpError(
                429,
                f"{len(self._running)} requests run or wait already (--max-queued-requests): try again later",
                kind="Overloaded",
            )
        names = [uuid.uuid4().hex for _ in prompts] if rids is None else list(rids)
        for name in names:
            if not 1 <= len(name) <= MAX_RID_CHARACTERS:
                raise ConfigError(f"rid must have 1 to {MAX_RID_CHARACTERS} characters, got {len(name)}", field="rid")
            if name in self._running:
                raise ConfigError(f"rid {name!r} is already running", field="rid")
        if len(set(names)) != len(names):
            raise ConfigError("rid must name each prompt of a batch differently", field="rid")
        return [
            GenerateRequest(rid=rid, input_ids=tuple(ids), sampling=params)
            for rid, ids, params in zip(names, prompts, sampling, strict=True)
        ]

    async def run(self, requests: Sequence[GenerateRequest]) -> AsyncGenerator[tuple[int, TokenEvent]]:
        """Events of all requests as they come, each with its request's index. Closing it aborts what still runs.

        Raises:
            EquipoiseError: that of the first request to fail; the others are aborted.
        """
        arrived: _Arrivals = asyncio.Queue()
        self._arrivals.add(arrived)

        async def pump(index: int, request: GenerateRequest) -> None:
            ending: BaseException | None = None
            try:
                async with contextlib.aclosing(self._events(request)) as events:
                    async for event in events:
                        arrived.put_nowait((index, event))
            except Exception as error:
                ending = error
            arrived.put_nowait(ending)

        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        pumps = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
        running = len(pumps)
        try:
            while running:
                arrival = await self._before(deadline, arrived)
                if isinstance(arrival, BaseException):
                    raise arrival
                if arrival is None:
                    running -= 1
                else:
                    yield arrival
        finally:
            self._arrivals.discard(arrived)
            for task in pumps:
                task.cancel()

    async def _before(self, deadline: float | None, arrived: asyncio.Queue[T]) -> T:
        try:
            async with asyncio.timeout(None if deadline is None else max(deadline - time.monotonic(), 0)):
                return await arrived.get()
        except TimeoutError:
            raise HttpError(
                504, f"no whole answer within {self._timeout:g} s (--request-timeout)", kind="RequestTimeout"
            ) from None

    async def _events(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent]:
        self._running.add(request.rid)
        self._metrics.running.inc()
        self._metrics.waiting.inc()
        reason: str | None = None
        answered = False
        try:
            async for event in self.engine.generate(request):
                if not answered:
                    answered = True
                    self._metrics.waiting.dec()
                    self._metrics.prompt_tokens.inc(len(request.input_ids))
                self._metrics.generated_tokens.inc(len(event.token_ids))
                reason = event.finish_reason
                yield event
        except ConfigError:
            reason = "refused"
            raise
        except (asyncio.CancelledError, GeneratorExit):
            if reason is None:
                reason = "abort"
                self._abort_later(request.rid)
            raise
        finally:
            self._running.discard(request.rid)
            if not answered:
                self._metrics.waiting.dec()
            self._metrics.request_ended(reason or "error")

    def _abort_later(self, rid: str) -> None:
        """A task of its own: the one that notices may itself be cancelled at its next await."""

        async def abort() -> None:
            with contextlib.suppress(EngineDeadError):
                await self.engine.abort(rid)

        task = asyncio.get_running_loop().create_task(abort())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def abort(self, rid: str) -> bool:
        """End a running request with finish reason ``abort``; False if there is none of that name."""
        if rid not in self._running:
            return False
        await self.engine.abort(rid)
        return True

    async def abort_all(self) -> None:
        """Ends every running request with finish reason ``abort``."""
        with contextlib.suppress(EngineDeadError):
            for rid in list(self._running):
                await self.engine.abort(rid)

    def give_up(self) -> None:
        """Answers 503 for what still runs: an engine with a stopped rank does not end it."""
        for arrived in self._arrivals:
            arrived.put_nowait(HttpError(503, "the server shuts down, and its engine is silent", kind="ShuttingDown"))


def batch_of(value: Any, size: int, name: str) -> list[Any]:
    """``value`` once per prompt: a list of that length as it is, anything else repeated.

    Raises:
        ConfigError: a list of another length.
    """
    if not isinstance(value, list):
        return [value] * size
    if len(value) != size:
        raise ConfigError(f"{name} has {len(value)} entries for {size} prompts", field=name)
    return value


def prompts_of(value: Any, name: str) -> tuple[list[str | list[int]], bool]:
    """The prompts of a request as a list, and whether they came as one.

    Raises:
        ConfigError: an empty batch, or one that is too large.
    """
    is_batch = isinstance(value, list) and not (value and isinstance(value[0], int))
    prompts = value if is_batch else [value]
    if not 1 <= len(prompts) <= MAX_BATCH:
        raise ConfigError(f"{name} must be 1 to {MAX_BATCH} prompts, got {len(prompts)}", field=name)
    return prompts, is_batch


def check_choices(count: int | None, name: str) -> int:
    """How many answers a prompt gets.

    Raises:
        ConfigError: less than one, or too many.
    """
    if count is not None and not 1 <= count <= MAX_CHOICES:
        raise ConfigError(f"{name} must be in [1, {MAX_CHOICES}], got {count}", field=name)
    return count or 1


def samples_of(sampling: SamplingParams, count: int) -> list[SamplingParams]:
    """``sampling`` for each of ``count`` answers to one prompt: a seed counts on, or all would be the same."""
    if sampling.seed is None:
        return [sampling] * count
    return [dataclasses.replace(sampling, seed=(sampling.seed + index) % 2**63) for index in range(count)]
