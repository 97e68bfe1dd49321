"""POST /generate in SGLang's request shape and POST /v1/completions in OpenAI's; both answer whole or as a stream."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from equipoise.admin.auth import ApiKeyRoute
from equipoise.admin.http_errors import HttpError, body_and_status
from equipoise.engine.requests import GenerateRequest, SamplingParams, TokenEvent
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.server.generation import (
    Answer,
    EventStream,
    RequestGenerator,
    batch_of,
    peeked,
    prompts_of,
    unless_client_leaves,
)
from equipoise.server.request_models import CompletionBody, GenerateBody, SamplingBody

router = APIRouter(route_class=ApiKeyRoute)

Render = Callable[[int, Answer, TokenEvent], dict[str, Any]]


@router.post("/generate")
async def generate(body: GenerateBody, request: Request) -> Response:
    """Completes ``text`` or ``input_ids``; with ``stream``, each event holds the whole answer so far."""
    if (body.text is None) == (body.input_ids is None):
        raise ConfigError("give exactly one of text and input_ids", field="text")
    name = "text" if body.text is not None else "input_ids"
    prompts, is_batch = prompts_of(body.text if body.text is not None else body.input_ids, name)
    chosen = batch_of(body.sampling_params or SamplingBody(), is_batch, len(prompts), "sampling_params")
    rids = None if body.rid is None else batch_of(body.rid, is_batch, len(prompts), "rid")
    if rids is not None and is_batch and not isinstance(body.rid, list):
        rids = [f"{body.rid}_{index}" for index in range(len(prompts))]
    requests = await _requests(request, prompts, [one.sampling() for one in chosen], rids, name)

    def render(index: int, answer: Answer, _event: TokenEvent) -> dict[str, Any]:
        return {**({"index": index} if is_batch else {}), **sglang_answer(answer, _eos_ids(request))}

    if body.stream:
        return await _stream(request, requests, render, field=name)
    answers = await _collect(request, requests, field=name)
    rendered = [sglang_answer(answer, _eos_ids(request)) for answer in answers]
    return JSONResponse(rendered if is_batch else rendered[0])


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: Request) -> Response:
    """Completes ``prompt``; with ``stream``, each event holds the new text only."""
    model = request.app.state.model_name
    if body.model is not None and body.model != model:
        raise HttpError(404, f"no model {body.model!r} here, only {model!r}", kind="NotFound", field="model")
    prompts, is_batch = prompts_of(body.prompt, "prompt")
    del is_batch  # an OpenAI answer is a list of choices either way
    requests = await _requests(request, prompts, [body.sampling()] * len(prompts), None, "prompt")
    head = {"id": f"cmpl-{requests[0].rid}", "object": "text_completion", "created": int(time.time()), "model": model}

    def render(index: int, answer: Answer, event: TokenEvent) -> dict[str, Any]:
        return {**head, "choices": [_choice(index, event.text_delta, answer)]}

    if body.stream:
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        return await _stream(request, requests, render, field="prompt", usage_head=head if wants_usage else None)
    answers = await _collect(request, requests, field="prompt")
    choices = [_choice(index, answer.text, answer) for index, answer in enumerate(answers)]
    return JSONResponse({**head, "choices": choices, "usage": _usage(answers)})


def sglang_answer(answer: Answer, eos_ids: frozenset[int]) -> dict[str, Any]:
    """One entry of a /generate answer. ``finish_reason`` is null while the answer still grows."""
    return {
        "text": answer.text,
        "output_ids": list(answer.token_ids),
        "meta_info": {
            "id": answer.rid,
            "finish_reason": _finish_reason(answer, eos_ids),
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": len(answer.token_ids),
            "e2e_latency": answer.seconds,
        },
    }


def _finish_reason(answer: Answer, eos_ids: frozenset[int]) -> dict[str, Any] | None:
    if answer.finish_reason is None:
        return None
    if answer.finish_reason == "length":
        return {"type": "length", "length": len(answer.token_ids)}
    if answer.finish_reason == "stop":
        return {"type": "stop", "matched": _matched(answer, eos_ids)}
    return {"type": answer.finish_reason}


def _matched(answer: Answer, eos_ids: frozenset[int]) -> int | str | None:
    """What ended the answer: the stop token, else the stop string when only one can have been it."""
    if answer.token_ids:
        last = answer.token_ids[-1]
        if last in answer.sampling.stop_token_ids or (last in eos_ids and not answer.sampling.ignore_eos):
            return last
    return answer.sampling.stop[0] if len(answer.sampling.stop) == 1 else None


def _choice(index: int, text: str, answer: Answer) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": answer.finish_reason}


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(len(answer.token_ids) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _eos_ids(request: Request) -> frozenset[int]:
    eos: frozenset[int] = request.app.state.eos_ids
    return eos


async def _requests(
    request: Request, prompts: list[Any], sampling: list[SamplingParams], rids: list[str] | None, name: str
) -> list[GenerateRequest]:
    generator: RequestGenerator = request.app.state.generator
    ids = [await generator.token_ids(prompt, name) for prompt in prompts]
    return generator.make_requests(ids, sampling, rids)


def _answers(requests: Sequence[GenerateRequest]) -> list[Answer]:
    return [Answer(request.rid, len(request.input_ids), request.sampling) for request in requests]


def _naming(error: EquipoiseError, field: str) -> EquipoiseError:
    """The engine knows a prompt as ``input_ids``; the client may have sent it under another name."""
    if isinstance(error, ConfigError) and error.field == "input_ids" and field != "input_ids":
        return ConfigError(f"{field}: {error}", field=field)
    return error


async def _collect(request: Request, requests: Sequence[GenerateRequest], *, field: str) -> list[Answer]:
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


async def _stream(
    request: Request,
    requests: Sequence[GenerateRequest],
    render: Render,
    *,
    field: str,
    usage_head: dict[str, Any] | None = None,
) -> EventStream:
    """The first event is awaited before the status goes out, so that a refused request is a 4xx and not a stream."""
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
                yield _sse(render(index, answers[index], event))
            if usage_head is not None:
                yield _sse({**usage_head, "choices": [], "usage": _usage(answers)})
        except EquipoiseError as error:
            yield _sse(body_and_status(error, generator.engine.error)[0])
        yield "data: [DONE]\n\n"

    return EventStream(chunks(), source)


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
