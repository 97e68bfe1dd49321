"""Requests that must be refused, with the field that the answer has to name. Used against both engines."""

from __future__ import annotations

from typing import Any

BAD_GENERATE: list[tuple[Any, str]] = [
    ({}, "text"),
    ({"text": "a", "input_ids": [1]}, "text"),
    ({"text": ""}, "text"),
    ({"text": []}, "text"),
    ({"text": ["a", 1]}, "text"),
    ({"text": 5}, "text"),
    ({"text": {"a": "b"}}, "text"),
    ({"text": "\ud800"}, "text"),
    ({"text": ["a"] * 2000}, "text"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": [[]]}, "input_ids"),
    ({"input_ids": [1, "2"]}, "input_ids"),
    ({"input_ids": [1.5]}, "input_ids"),
    ({"input_ids": [True]}, "input_ids"),
    ({"input_ids": [[1], 2]}, "input_ids"),
    ({"text": "a", "strem": True}, "strem"),
    ({"text": "a", "\ud800": 1}, "body"),
    ({"text": "a", "stream": "yes"}, "stream"),
    ({"text": "a", "rid": ""}, "rid"),
    ({"text": "a", "rid": 7}, "rid"),
    ({"text": "a", "rid": ["x", "y"]}, "rid"),
    ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
    ({"text": "a", "rid": "x" * 300}, "rid"),
    ({"text": "a", "return_logprob": 1}, "return_logprob"),
    ({"text": "a", "return_logprob": True, "logprob_start_len": 3}, "logprob_start_len"),
    ({"text": "a", "sampling_params": 3}, "sampling_params"),
    ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
    ({"text": "a", "sampling_params": [{}, {}]}, "sampling_params"),
    ({"text": "a", "sampling_params": {"max_tokens": 3}}, "sampling_params.max_tokens"),
    ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
    ({"text": "a", "sampling_params": {"max_new_tokens": "3"}}, "sampling_params.max_new_tokens"),
    ({"text": "a", "sampling_params": {"max_new_tokens": 1.5}}, "sampling_params.max_new_tokens"),
    ({"text": "a", "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
    ({"text": "a", "sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
    ({"text": "a", "sampling_params": {"top_p": 0}}, "sampling_params.top_p"),
    ({"text": "a", "sampling_params": {"top_p": 1.1}}, "sampling_params.top_p"),
    ({"text": "a", "sampling_params": {"top_k": 0}}, "sampling_params.top_k"),
    ({"text": "a", "sampling_params": {"stop": [""]}}, "sampling_params.stop"),
    ({"text": "a", "sampling_params": {"stop": [1]}}, "sampling_params.stop"),
    ({"text": "a", "sampling_params": {"stop_token_ids": "1"}}, "sampling_params.stop_token_ids"),
    ({"text": "a", "sampling_params": {"ignore_eos": 1}}, "sampling_params.ignore_eos"),
    ({"text": "a", "sampling_params": {"sampling_seed": -1}}, "sampling_params.sampling_seed"),
    ({"text": "a", "sampling_params": {"n": 0}}, "sampling_params.n"),
    ({"text": "a", "sampling_params": {"frequency_penalty": 2.5}}, "sampling_params.frequency_penalty"),
    ([], "body"),
    ("text", "body"),
    (None, "body"),
]

BAD_COMPLETIONS: list[tuple[Any, str]] = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens"),
    ({"prompt": "a", "temperature": -0.1}, "temperature"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": True}, "n"),
    ({"prompt": "a", "echo": 1}, "echo"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "logit_bias": {"x": 1.0}}, "logit_bias"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "best_of": 2}, "best_of"),
    ({"prompt": "a", "stream_options": {"usage": True}}, "stream_options.usage"),
]

BAD_CHATS: list[tuple[Any, str]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, "tools"),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "top_logprobs"),
    ({"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": -1}, "max_completion_tokens"),
]

BAD_REBALANCE: list[tuple[Any, str]] = [
    ({"algorithm": 3}, "algorithm"),
    ({"dry_run": "no"}, "dry_run"),
    ({"dryrun": True}, "dryrun"),
    ({"max_moves_per_layer": -1}, "max_moves_per_layer"),
    ({"max_moves_per_layer": 10**30}, "max_moves_per_layer"),
    ({"max_moves_per_layer": 1.5}, "max_moves_per_layer"),
    ([], "body"),
    (7, "body"),
]

BAD_BODIES = (
    [("/generate", body, field) for body, field in BAD_GENERATE]
    + [("/v1/completions", body, field) for body, field in BAD_COMPLETIONS]
    + [("/v1/chat/completions", body, field) for body, field in BAD_CHATS]
    + [("/eplb/rebalance", body, field) for body, field in BAD_REBALANCE]
)
