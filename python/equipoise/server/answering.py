"""Answers requests whole or as a stream of server-sent events; work ends when the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from equipoise.admin.http_errors import ClientLeft, body_and_status
from equipoise.engine.requests import GenerateRequest, SamplingParams, TokenEvent
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.server.generation import Answer, RequestGenerator
from equipoise.server.tokenizing import Tokenizing

T = TypeVar("T")
Render = Callable[[int, Answer, TokenEvent], dict[str, Any]]

STREAM_RESPONSE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What OpenAPI says of a route that streams when asked to."""


async def make_requests(
    request: Request,
    prompts: Sequence[Any],
    sampling: Sequence[SamplingParams],
    rids: Sequence[str] | None,
    name: str,
    *,
    special_tokens: bool = True,
) -> list[GenerateRequest]:
    """Tokenise prompts, texts or ids, and make an engine's request of each.

    Raises:
        ConfigError: a prompt or an id that cannot be.
        ClientLeft: it closed the connection meanwhile.
        HttpError: 429, there are too many requests already.
    """
    generator: RequestGenerator = request.app.state.generator
    tokenizing: Tokenizing = request.app.state.tokenizing

    async def work() -> list[list[int]]:
        return [await tokenizing.token_ids(prompt, name, special_tokens=special_tokens) for prompt in prompts]

    ids = await unless_client_leaves(request, work())
    return generator.make_requests(ids, sampling, rids)


def _answers(requests: Sequence[GenerateRequest]) -> list[Answer]:
    return [Answer(request.rid, len(request.input_ids), request.sampling) for request in requests]


def _naming(error: EquipoiseError, field: str) -> EquipoiseError:
    """The engine knows a prompt as ``input_ids``; the client may have sent it under another name."""
    if isinstance(error, ConfigError) and error.field == "input_ids" and field != "input_ids":
        return ConfigError(f"{field}: {error}", field=field)
    return error


async def collect(request: Request, requests: Sequence[GenerateRequest], *, field: str) -> list[Answer]:
    """Run requests to their ends. ``field``: what the client calls the prompt."""
    generator: RequestGenerator = request.app.state.generator
    answers = _answers(requests)

    async def work() -> None:
        async for index, event in generator.run(requests):
            answers[index].take(event)

    try:
        await unless_client_leaves(request, work())
    except EquipoiseError as error:
        raise _naming(error, field) from None
    return answers


async def stream(
    request: Request,
    requests: Sequence[GenerateRequest],
    render: Render,
    *,
    field: str,
    usage_head: dict[str, Any] | None = None,
    choices: int = 1,
) -> EventStream:
    """Answer with a stream of what ``render`` makes of each event; None of it is left out.

    The first event is awaited before the status goes out, so that a refused request is a 4xx and not a stream.
    """
    generator: RequestGenerator = request.app.state.generator
    answers = _answers(requests)
    source = generator.run(requests)
    try:
        first = await unless_client_leaves(request, anext(source))
    except EquipoiseError as error:
        raise _naming(error, field) from None

    async def chunks() -> AsyncGenerator[str]:
        try:
            async for index, event in peeked(first, source):
                answers[index].take(event)
                yield sse(render(index, answers[index], event))
            if usage_head is not None:
                yield sse({**usage_head, "choices": [], "usage": usage(answers, choices)})
        except EquipoiseError as error:
            yield sse(body_and_status(error, generator.engine.error)[0])
        yield "data: [DONE]\n\n"

    return EventStream(chunks(), source)


def usage(answers: Sequence[Answer], choices: int = 1) -> dict[str, int]:
    """Tokens of prompts, each counted once however many choices it has, and of answers."""
    prompt = sum(answer.prompt_tokens for answer in answers[::choices])
    completion = sum(len(answer.token_ids) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


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
