"""POST /generate, in SGLang's request shape: answers whole or as a stream."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from equipoise.admin.auth import ApiKeyRoute
from equipoise.engine.requests import SamplingParams, TokenEvent, TokenLogprob
from equipoise.errors import ConfigError
from equipoise.server.answering import STREAM_RESPONSE, collect, make_requests, stream
from equipoise.server.generation import Answer, batch_of, check_choices, prompts_of, samples_of
from equipoise.server.request_models import GenerateBody, SamplingBody

router = APIRouter(route_class=ApiKeyRoute)


@router.post("/generate", responses=STREAM_RESPONSE)
async def generate(body: GenerateBody, request: Request) -> Response:
    """Completes ``text`` or ``input_ids``; with ``stream``, each event holds the whole answer so far."""
    if (body.text is None) == (body.input_ids is None):
        raise ConfigError("give exactly one of text and input_ids", field="text")
    name = "text" if body.text is not None else "input_ids"
    prompts, is_batch = prompts_of(body.text if body.text is not None else body.input_ids, name)
    chosen = batch_of(body.sampling_params or SamplingBody(), len(prompts), "sampling_params")
    counts = {check_choices(one.n, "sampling_params.n") for one in chosen}
    if len(counts) > 1:
        raise ConfigError(f"sampling_params.n must be one number for a batch, got {counts}", field="sampling_params.n")
    count = counts.pop()
    prompts = [prompt for prompt in prompts for _ in range(count)]
    sampling = [sample for one in chosen for sample in samples_of(one.sampling(**_logprobs(body)), count)]
    is_list = is_batch or count > 1
    rids = None if body.rid is None else batch_of(body.rid, len(prompts), "rid")
    if rids is not None and is_list and not isinstance(body.rid, list):
        rids = [f"{body.rid}_{index}" for index in range(len(prompts))]
    requests = await make_requests(request, prompts, sampling, rids, name)
    eos_ids: frozenset[int] = request.app.state.eos_ids

    def render(index: int, answer: Answer, _event: TokenEvent) -> dict[str, Any]:
        return {**({"index": index} if is_list else {}), **sglang_answer(answer, eos_ids)}

    if body.stream:
        return await stream(request, requests, render, field=name)
    answers = await collect(request, requests, field=name)
    rendered = [sglang_answer(answer, eos_ids) for answer in answers]
    return JSONResponse(rendered if is_list else rendered[0])


def _logprobs(body: GenerateBody) -> dict[str, Any]:
    """What SGLang's three fields ask of the engine."""
    if not body.return_logprob:
        return {}
    if body.logprob_start_len not in (None, -1, 0):
        raise ConfigError(
            f"logprob_start_len must be -1 (the answer) or 0 (the prompt too), got {body.logprob_start_len}",
            field="logprob_start_len",
        )
    return {"logprobs": body.top_logprobs_num or 0, "prompt_logprobs": body.logprob_start_len == 0}


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
            **_sglang_logprobs(answer),
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


def _sglang_logprobs(answer: Answer) -> dict[str, Any]:
    """SGLang's meta_info of log probabilities: [log probability, token id, null] for each token."""

    def triples(entries: list[TokenLogprob]) -> list[Any]:
        return [[entry.logprob, entry.token_id, None] for entry in entries]

    def tops(entries: list[TokenLogprob]) -> list[Any]:
        return [[[value, token, None] for token, value in entry.top] or None for entry in entries]

    sampling: SamplingParams = answer.sampling
    if sampling.logprobs is None:
        return {}
    found = {"output_token_logprobs": triples(answer.logprobs), "output_top_logprobs": tops(answer.logprobs)}
    if sampling.prompt_logprobs:
        found["input_token_logprobs"] = triples(answer.prompt_logprobs)
        found["input_top_logprobs"] = tops(answer.prompt_logprobs)
    return found
