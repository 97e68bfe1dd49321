"""Request bodies that are nearly right, wrong in many ways, or no bodies at all, for hypothesis to draw."""

from __future__ import annotations

import json
from typing import Any

import httpx
from hypothesis import strategies as st

JSON = {"Content-Type": "application/json"}

_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | st.text(st.characters(exclude_categories=()), max_size=8)
    | st.sampled_from(["deepseek", "a", 0, 1, -1, 1.0, True]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)


def _any_of(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), _values)


_sampling = st.fixed_dictionaries(
    # Always short: what is tested is reading the request, not decoding.
    {"max_new_tokens": st.integers(-1, 3)},
    optional=_any_of("temperature top_p top_k stop stop_token_ids ignore_eos sampling_seed n x"),
)
_generate = st.fixed_dictionaries(
    {"sampling_params": _sampling | st.lists(_sampling, max_size=2)},
    optional={
        "text": _values | st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=3),
        "input_ids": _values | st.lists(st.integers(-5, 300), max_size=5),
        "stream": st.booleans() | _values,
        "rid": _values,
        "return_logprob": _values,
        "unknown": _values,
    },
)
_completions = st.fixed_dictionaries(
    {"max_tokens": st.integers(-1, 3)},
    optional=_any_of("prompt temperature top_p stop seed stream stream_options user n model"),
)
_rebalance = st.fixed_dictionaries(
    {"dry_run": st.just(True)}, optional={"algorithm": _values, "max_moves_per_layer": _values, "x": _values}
)
any_request = st.one_of(
    st.tuples(st.just("/generate"), _generate),
    st.tuples(st.just("/v1/completions"), _completions),
    st.tuples(st.just("/eplb/rebalance"), _rebalance | _values),
)


def check_no_request_is_our_fault(client: httpx.Client, path: str, body: Any) -> None:
    response = client.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"]
        assert error["field"] is not None or response.status_code == 409
