"""From prompts to token events: one stream for a whole batch, and an engine that stops when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from equipoise.admin.http_errors import ClientLeft
from equipoise.engine.requests import GenerateRequest, SamplingParams, TokenEvent
from equipoise.errors import ConfigError, EngineDeadError
from equipoise.server.engine_protocol import ServingEngine
from equipoise.server.prometheus import ServerMetrics
from equipoise.server.request_models import MAX_BATCH

T = TypeVar("T")

MAX_RID_CHARACTERS = 256


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

    def take(self, event: TokenEvent) -> None:
        self.text += event.text_delta
        self.token_ids.extend(event.token_ids)
        self.finish_reason = event.finish_reason

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class RequestGenerator:
    """Run requests on an engine and know which are running. One per server."""

    def __init__(self, engine: ServingEngine, metrics: ServerMetrics) -> None:
        self.engine = engine
        self._metrics = metrics
        self._running: set[str] = set()
        self._aborts: set[asyncio.Task[None]] = set()
        self._tokenizing = asyncio.Lock()  # a fast tokenizer may not be entered by two threads at once

    async def token_ids(self, prompt: str | list[int], name: str) -> list[int]:
        """
        Raises:
            ConfigError: the prompt ``name`` holds no token.
        """
        if isinstance(prompt, str):
            async with self._tokenizing:
                ids = await asyncio.to_thread(lambda: self.engine.tokenizer(prompt)["input_ids"])
        else:
            ids = prompt
        if not ids:
            raise ConfigError(f"{name} must hold at least one token, got none", field=name)
        return list(ids)

    def make_requests(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams], rids: Sequence[str] | None
    ) -> list[GenerateRequest]:
        """One engine request per prompt, under the client's ids or fresh ones.

        Raises:
            ConfigError: an id that is taken, used twice or too long; field ``rid``.
        """
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
        arrived: asyncio.Queue[tuple[int, TokenEvent] | BaseException | None] = asyncio.Queue()

        async def pump(index: int, request: GenerateRequest) -> None:
            ending: BaseException | None = None
            try:
                async with contextlib.aclosing(self._events(request)) as events:
                    async for event in events:
                        arrived.put_nowait((index, event))
            except Exception as error:
                ending = error
            arrived.put_nowait(ending)

        pumps = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
        running = len(pumps)
        try:
            while running:
                arrival = await arrived.get()
                if isinstance(arrival, BaseException):
                    raise arrival
                if arrival is None:
                    running -= 1
                else:
                    yield arrival
        finally:
            for task in pumps:
                task.cancel()

    async def _events(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent]:
        self._running.add(request.rid)
        self._metrics.running.inc()
        reason: str | None = None
        answered = False
        try:
            async for event in self.engine.generate(request):
                if not answered:
                    answered = True
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
            self._metrics.request_ended(reason or "error")

    def _abort_later(self, rid: str) -> None:
        """A task of its own: the one that notices may itself be cancelled at its next await."""

        async def abort() -> None:
            with contextlib.suppress(EngineDeadError):
                await self.engine.abort(rid)

        task = asyncio.get_running_loop().create_task(abort())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def abort_all(self) -> None:
        """Ends every running request with finish reason ``abort``."""
        with contextlib.suppress(EngineDeadError):
            for rid in list(self._running):
                await self.engine.abort(rid)


def batch_of(value: Any, is_batch: bool, size: int, name: str) -> list[Any]:
    """``value`` once per prompt: a list of that length as it is, anything else repeated.

    Raises:
        ConfigError: a list where the prompt is no batch, or one of another length.
    """
    if not isinstance(value, list):
        return [value] * size
    if not is_batch or len(value) != size:
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


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client closes its connection.

    Raises:
        ClientLeft: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft("the client closed its connection")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events over ``chunks``, made from ``source``, which is closed however the response ends."""

    def __init__(self, chunks: AsyncGenerator[str], source: AsyncGenerator[Any]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._chunks = chunks
        self._source = source

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._chunks.aclose()
            await self._source.aclose()


async def peeked(first: T, rest: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """``first``, then ``rest``."""
    yield first
    async for item in rest:
        yield item
