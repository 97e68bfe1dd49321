"""Continuous batching: whatever comes when, each request is fed its own tokens once and in order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.engine.model.step_batch import StepBatch
from equipoise.engine.requests import GenerateRequest, SamplingParams
from equipoise.engine.scheduler import Scheduler
from helpers.engine_loop import outcomes_of

EOS = 99


def next_token(tokens: list[int]) -> int:
    """A stand-in for a model: depends on every token before."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 100
    return value


class FakeModel:
    """Keeps each row's tokens as a cache would and complains about gaps and overlaps."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}

    def step(self, batch: StepBatch) -> list[int]:
        tokens = list(batch.token_ids)
        lengths = [segment.length for segment in batch.segments]
        assert lengths == sorted(lengths, key=lambda length: length > 1), "single tokens come first"
        assert len({segment.row for segment in batch.segments}) == len(lengths), "a row twice in a step"
        assert sum(lengths) == len(tokens)
        answers = []
        for index, segment in enumerate(batch.segments):
            row = [] if segment.start == 0 else self.rows[segment.row]
            assert len(row) == segment.start, "a gap or an overlap in the cache"
            self.rows[segment.row] = row + tokens[: segment.length]
            tokens = tokens[segment.length :]
            if index in batch.sampled:
                answers.append(next_token(self.rows[segment.row]))
        return answers


def expected(request: GenerateRequest, max_model_len: int) -> tuple[list[int], str]:
    tokens, sampling = list(request.input_ids), request.sampling
    made: list[int] = []
    while True:
        made.append(next_token(tokens + made))
        if made[-1] in sampling.stop_token_ids or (made[-1] == EOS and not sampling.ignore_eos):
            return made, "stop"
        if len(made) == sampling.max_new_tokens or len(tokens) + len(made) >= max_model_len:
            return made, "length"


def make_scheduler(num_rows: int = 2, step_tokens: int = 8, max_model_len: int = 40) -> Scheduler:
    return Scheduler(
        num_rows=num_rows,
        max_model_len=max_model_len,
        step_tokens=step_tokens,
        eos_token_ids=(EOS,),
        decode=lambda ids: "".join(chr(0x4E00 + i) for i in ids),
    )


requests = st.builds(
    lambda ids, new, ignore, stop: (tuple(ids), SamplingParams(new, ignore_eos=ignore, stop_token_ids=tuple(stop))),
    st.lists(st.integers(0, 98), min_size=1, max_size=30),
    st.integers(1, 12),
    st.booleans(),
    st.lists(st.integers(0, 98), max_size=3),
)


@given(
    st.lists(st.tuples(st.integers(0, 6), requests), min_size=1, max_size=7),
    st.integers(1, 3),
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 6)), max_size=2),
)
@settings(max_examples=150, deadline=None)
def test_every_request_gets_its_own_answer(arrivals, num_rows: int, step_tokens: int, aborts) -> None:  # type: ignore[no-untyped-def]
    scheduler, model = make_scheduler(num_rows, step_tokens), FakeModel()
    asked = {str(i): GenerateRequest(str(i), ids, sampling) for i, (_, (ids, sampling)) in enumerate(arrivals)}
    due = sorted((step, str(i)) for i, (step, _) in enumerate(arrivals))
    made: dict[str, list[int]] = {rid: [] for rid in asked}
    text: dict[str, str] = dict.fromkeys(asked, "")
    ended: dict[str, str] = {}
    step = 0
    while due or scheduler.has_work:
        while due and due[0][0] <= step:
            scheduler.add(asked[due.pop(0)[1]])
        events = [event for at, i in aborts if at == step for event in scheduler.abort(str(i))]
        batch = scheduler.next_batch()
        if batch is not None:
            assert batch.num_tokens <= max(step_tokens, num_rows + 1)
            events += scheduler.complete(batch, outcomes_of(batch, model.step(batch)))
        for event in events:
            assert event.rid not in ended, "news after the end"
            made[event.rid] += event.token_ids
            text[event.rid] += event.text_delta
            if event.finish_reason is not None:
                ended[event.rid] = event.finish_reason
        step += 1
        assert step < 2000, "no progress"
    for rid, request in asked.items():
        tokens, reason = expected(request, 40)
        if ended[rid] == "abort":
            assert made[rid] == tokens[: len(made[rid])]
            continue
        assert (made[rid], ended[rid]) == (tokens, reason)
        shown = tokens[:-1] if reason == "stop" else tokens
        assert text[rid] == "".join(chr(0x4E00 + i) for i in shown)


def test_decoding_goes_on_while_a_long_prompt_is_cut_into_chunks() -> None:
    scheduler, model = make_scheduler(step_tokens=8), FakeModel()
    short = GenerateRequest("short", (1,), SamplingParams(20, ignore_eos=True))
    scheduler.add(short)
    first = scheduler.next_batch()
    assert first is not None
    scheduler.complete(first, outcomes_of(first, model.step(first)))
    scheduler.add(GenerateRequest("long", tuple(range(20)), SamplingParams(4)))
    lengths = []
    for _ in range(3):
        batch = scheduler.next_batch()
        assert batch is not None
        lengths.append([segment.length for segment in batch.segments])
        scheduler.complete(batch, outcomes_of(batch, model.step(batch)))
    assert lengths == [[1, 7], [1, 7], [1, 6]]


def test_a_stop_string_ends_the_answer_before_it() -> None:
    scheduler, model = make_scheduler(), FakeModel()
    tokens, _ = expected(GenerateRequest("a", (1, 2), SamplingParams(6, ignore_eos=True)), 40)
    stop = "".join(chr(0x4E00 + i) for i in tokens[2:4])
    scheduler.add(GenerateRequest("a", (1, 2), SamplingParams(6, ignore_eos=True, stop=(stop,))))
    events = []
    while (batch := scheduler.next_batch()) is not None:
        events += scheduler.complete(batch, outcomes_of(batch, model.step(batch)))
    assert "".join(event.text_delta for event in events) == "".join(chr(0x4E00 + i) for i in tokens[:2])
    assert [event.finish_reason for event in events] == [None, None, None, "stop"]


def test_prompts_get_on_however_many_requests_decode() -> None:
    scheduler = Scheduler(
        num_rows=3, max_model_len=64, step_tokens=2, eos_token_ids=(), decode=lambda ids: "x" * len(ids)
    )
    for rid in ("a", "b"):
        scheduler.add(GenerateRequest(rid, (1,), SamplingParams(max_new_tokens=30)))
    scheduler.add(GenerateRequest("prompt", (1, 2, 3, 4), SamplingParams(max_new_tokens=30)))
    fed = []
    for _ in range(4):
        batch = scheduler.next_batch()
        assert batch is not None
        fed.append([segment.length for segment in batch.segments])
        scheduler.complete(batch, outcomes_of(batch, [5] * len(batch.sampled)))
    assert fed == [[1, 1, 1]] * 4, "the two that decode fill a step, and yet the third moves"


def test_decoding_requests_stand_by_row_and_take_the_lowest_rows() -> None:
    scheduler = make_scheduler(num_rows=4, step_tokens=50)

    def add(rid: str, prompt: tuple[int, ...], new: int) -> None:
        scheduler.add(GenerateRequest(rid, prompt, SamplingParams(new, ignore_eos=True)))

    def rows_of_next_step() -> list[int]:
        batch = scheduler.next_batch()
        assert batch is not None
        scheduler.complete(batch, outcomes_of(batch, [5] * len(batch.sampled)))
        return [segment.row for segment in batch.segments]

    for rid, new in (("a", 1), ("b", 9), ("c", 2), ("d", 2)):
        add(rid, (1, 2), new)
    assert rows_of_next_step() == [0, 1, 2, 3]
    add("e", (1,), 2)  # the last to come, into the row that a left
    assert rows_of_next_step() == [0, 1, 2, 3]
    add("f", (1, 2), 9)
    assert rows_of_next_step() == [0, 1, 2], "c and d left rows 2 and 3, f has the lower one"
    add("g", (1, 2), 2)
    assert rows_of_next_step() == [1, 2, 0]
    scheduler.abort("b")
    add("h", (1, 2), 9)
    add("i", (1, 2), 9)
    assert rows_of_next_step() == [0, 2, 1, 3], "those that decode, then prompts"
    scheduler.abort("f")
    scheduler.abort("h")
    scheduler.abort("i")
    assert not scheduler.has_work


def test_prompts_are_taken_as_they_came_whatever_their_rows() -> None:
    scheduler = make_scheduler(num_rows=2, step_tokens=6)
    scheduler.add(GenerateRequest("short", (1,), SamplingParams(1)))
    scheduler.add(GenerateRequest("long", (1,) * 8, SamplingParams(9)))
    first = scheduler.next_batch()
    assert first is not None
    assert [(segment.row, segment.length) for segment in first.segments] == [(0, 1), (1, 5)]
    scheduler.complete(first, outcomes_of(first, [5]))
    scheduler.add(GenerateRequest("late", (1,) * 9, SamplingParams(9)))  # into the lower row
    second = scheduler.next_batch()
    assert second is not None
    assert [(segment.row, segment.length) for segment in second.segments] == [(1, 3), (0, 3)]
