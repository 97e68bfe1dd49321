"""POST /v1/completions and /v1/chat/completions, in OpenAI's shape: answers whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from equipoise.admin.auth import ApiKeyRoute
from equipoise.admin.http_errors import HttpError
from equipoise.engine.requests import GenerateRequest, TokenEvent, TokenLogprob
from equipoise.errors import ConfigError
from equipoise.server.answering import STREAM_RESPONSE, collect, make_requests, stream, usage
from equipoise.server.generation import Answer, check_choices, prompts_of, samples_of
from equipoise.server.openai_models import ChatBody, CompletionBody

router = APIRouter(route_class=ApiKeyRoute)


@router.post("/v1/completions", responses=STREAM_RESPONSE)
async def completions(body: CompletionBody, request: Request) -> Response:
    """Completes ``prompt``; with ``stream``, each event holds the new text only."""
    check_model(request, body.model)
    prompts, _ = prompts_of(body.prompt, "prompt")
    count = check_choices(body.n, "n")
    expanded = [prompt for prompt in prompts for _ in range(count)]
    requests = await make_requests(request, expanded, samples_of(body.sampling(), count) * len(prompts), None, "prompt")
    tokenizer = request.app.state.engine.tokenizer
    echoed = [_text_of(tokenizer, prompt) if body.echo else "" for prompt in expanded]
    begun: set[int] = set()

    def choice(index: int, text: str, entries: Sequence[TokenLogprob], reason: str | None) -> dict[str, Any]:
        logprobs = None if body.logprobs is None else _completion_logprobs(tokenizer, entries)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def render(index: int, answer: Answer, event: TokenEvent) -> dict[str, Any]:
        first = index not in begun
        begun.add(index)
        text = (echoed[index] if first else "") + event.text_delta
        entries = [*event.prompt_logprobs, *event.logprobs]
        return {**head, "choices": [choice(index, text, entries, answer.finish_reason)]}

    head = _head(request, requests, "cmpl", "text_completion")
    if body.stream:
        usage_head = head if body.wants_usage else None
        return await stream(request, requests, render, field="prompt", usage_head=usage_head, choices=count)
    answers = await collect(request, requests, field="prompt")
    choices = [
        choice(i, echoed[i] + answer.text, [*answer.prompt_logprobs, *answer.logprobs], answer.finish_reason)
        for i, answer in enumerate(answers)
    ]
    return JSONResponse({**head, "choices": choices, "usage": usage(answers, count)})


@router.post("/v1/chat/completions", responses=STREAM_RESPONSE)
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answers ``messages`` through the model's chat template; with ``stream``, each event holds the new text only."""
    check_model(request, body.model)
    count = check_choices(body.n, "n")
    tokenizer = request.app.state.engine.tokenizer
    sampling = body.sampling()
    prompt = render_chat(tokenizer, body)
    if body.max_tokens is None and body.max_completion_tokens is None:
        sampling = body.model_copy(update={"max_tokens": request.app.state.max_model_len}).sampling()
    requests = await make_requests(
        request, [prompt] * count, samples_of(sampling, count), None, "messages", special_tokens=False
    )
    begun: set[int] = set()

    def chunk(index: int, answer: Answer, event: TokenEvent) -> dict[str, Any]:
        role = {} if index in begun else {"role": "assistant"}
        begun.add(index)
        logprobs = {"content": _chat_logprobs(tokenizer, event.logprobs)} if body.logprobs else None
        delta = {**role, "content": event.text_delta}
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": answer.finish_reason}
        return {**head, "object": "chat.completion.chunk", "choices": [choice]}

    head = _head(request, requests, "chatcmpl", "chat.completion")
    if body.stream:
        usage_head = {**head, "object": "chat.completion.chunk"} if body.wants_usage else None
        return await stream(request, requests, chunk, field="messages", usage_head=usage_head, choices=count)
    answers = await collect(request, requests, field="messages")
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": {"content": _chat_logprobs(tokenizer, answer.logprobs)} if body.logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        for index, answer in enumerate(answers)
    ]
    return JSONResponse({**head, "choices": choices, "usage": usage(answers, count)})


def check_model(request: Request, model: str | None) -> None:
    """
    Raises:
        HttpError: 404, another model than the one that is served.
    """
    served = request.app.state.model_name
    if model is not None and model != served:
        raise HttpError(404, f"no model {model!r} here, only {served!r}", kind="NotFound", field="model")


def render_chat(tokenizer: Any, body: ChatBody) -> str:
    """The text that the model's chat template makes of the messages.

    Raises:
        ConfigError: no messages, no template, or one that does not take these messages.
    """
    if not body.messages:
        raise ConfigError("messages must hold at least one message", field="messages")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError("messages: the model has no chat template; use /v1/completions", field="messages")
    messages = [message.for_template(f"messages[{i}]") for i, message in enumerate(body.messages)]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **(body.chat_template_kwargs or {})
        )
    except Exception as error:  # templates raise what they like
        line = " ".join(str(error).split())[:300]
        raise ConfigError(f"messages: the model's chat template refuses them: {line}", field="messages") from None
    return text


def _head(request: Request, requests: Sequence[GenerateRequest], prefix: str, kind: str) -> dict[str, Any]:
    identity = f"{prefix}-{requests[0].rid}"
    return {"id": identity, "object": kind, "created": int(time.time()), "model": request.app.state.model_name}


def _text_of(tokenizer: Any, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else str(tokenizer.decode(prompt, skip_special_tokens=False))


def _token_text(tokenizer: Any, token: int) -> str:
    """A token's text; one that is no whole character by itself goes by its number, so that no two look alike."""
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    return text if text and "�" not in text else f"token_id:{token}"


def _completion_logprobs(tokenizer: Any, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    texts = [_token_text(tokenizer, entry.token_id) for entry in entries]
    tops: list[dict[str, float] | None] = []
    for text, entry in zip(texts, entries, strict=True):
        if entry.logprob is None:
            tops.append(None)
            continue
        top = {text: entry.logprob}
        for token, value in entry.top:
            name = _token_text(tokenizer, token)
            top[name] = max(value, top.get(name, value))
        tops.append(top)
    offsets = [0, *accumulate(len(text) for text in texts)][: len(texts)]
    values = [entry.logprob for entry in entries]
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _chat_logprobs(tokenizer: Any, entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    def shown(token: int, value: float | None) -> dict[str, Any]:
        text = _token_text(tokenizer, token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    return [
        {**shown(entry.token_id, entry.logprob), "top_logprobs": [shown(*pair) for pair in entry.top]}
        for entry in entries
    ]
