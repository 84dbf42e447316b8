"""Which tokens run next: admission by pages, chunks within the budget, order, and no page lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.engine.request import Request
from cutp.engine.scheduler import Scheduler
from cutp.kv_cache import PageAllocator


def request(index, prompt, new=0):
    return Request(index, None, list(range(prompt)), prompt + new)


def scheduler(*requests, pages=10, page_size=4, budget=8, running=10):
    made = Scheduler(PageAllocator(pages, page_size), budget, running)
    for one in requests:
        made.add(one)
    return made


def plan(chunks):
    return [(chunk.request.index, chunk.start, chunk.stop) for chunk in chunks]


def run(scheduler, chunks):
    """What the engine does with a pass: caches the chunks, appends a token, finishes at max_total."""
    for chunk in chunks:
        chunk.request.cached = chunk.stop
        if chunk.completes:
            if chunk.request.length < chunk.request.max_total:
                chunk.request.generated.append(7)
            if chunk.request.length == chunk.request.max_total:
                scheduler.finish(chunk.request)


def step(scheduler):
    chunks = scheduler.schedule()
    run(scheduler, chunks)
    return plan(chunks)


def test_a_long_prompt_is_cut_into_chunks_of_the_budget():
    one = request(0, 20, 2)
    s = scheduler(one, budget=8)
    assert [step(s) for _ in range(4)] == [[(0, 0, 8)], [(0, 8, 16)], [(0, 16, 20)], [(0, 20, 21)]]
    assert not s.has_work and s.allocator.free_pages == 10


def test_only_the_last_chunk_completes():
    s = scheduler(request(0, 9, 1), budget=4)
    seen = []
    while s.has_work:
        chunks = s.schedule()
        seen += [chunk.completes for chunk in chunks]
        run(s, chunks)
    assert seen == [False, False, True]


def test_generating_requests_come_before_prompts():
    s = scheduler(request(0, 3, 5), budget=4)
    assert step(s) == [(0, 0, 3)]
    s.add(request(1, 10, 1))
    assert step(s) == [(0, 3, 4), (1, 0, 3)]
    assert step(s) == [(0, 4, 5), (1, 3, 6)]


def test_a_prompt_of_one_token_comes_before_a_longer_older_one():
    s = scheduler(request(0, 20, 1), request(1, 1, 3), budget=5, running=2)
    # Like a token that is generated, it takes one row of the batch.
    assert step(s) == [(1, 0, 1), (0, 0, 4)]


def test_prompts_are_served_in_order_of_arrival():
    s = scheduler(request(0, 6, 1), request(1, 6, 1), request(2, 2, 1), budget=8)
    assert step(s) == [(0, 0, 6), (1, 0, 2)]
    assert step(s) == [(1, 2, 6), (2, 0, 2)]


def test_more_generating_requests_than_budget():
    requests = [request(i, 1, 3) for i in range(4)]
    s = scheduler(*requests, budget=2)
    assert [step(s) for _ in range(6)] == [[(0, i, i + 1), (1, i, i + 1)] for i in range(3)] + [
        [(2, i, i + 1), (3, i, i + 1)] for i in range(3)]


def test_admission_waits_for_the_pages_of_all_tokens_a_request_may_reach():
    first, second = request(0, 3, 5), request(1, 5, 4)  # 8 tokens: 2 pages; 9 tokens: 3 pages
    s = scheduler(first, second, pages=4, page_size=4)
    assert step(s) == [(0, 0, 3)]
    assert first.pages == [0, 1] and second.pages == [] and list(s.waiting) == [second]
    while first in s.running:
        assert all(index == 0 for index, _, _ in step(s))
    assert first.pages == []
    assert step(s) == [(1, 0, 5)] and second.pages == [0, 1, 2]


def test_a_small_request_does_not_overtake_a_large_one():
    s = scheduler(request(0, 8), request(1, 16), request(2, 1), pages=4, page_size=4)
    s.schedule()
    assert [r.index for r in s.running] == [0] and [r.index for r in s.waiting] == [1, 2]


def test_running_requests_are_limited():
    s = scheduler(*(request(i, 1, 2) for i in range(3)), running=2)
    assert step(s) == [(0, 0, 1), (1, 0, 1)]
    assert step(s) == [(0, 1, 2), (1, 1, 2)]
    assert step(s) == [(2, 0, 1)]


def test_clear_drops_everything_and_frees_the_pages():
    requests = [request(i, 9, 3) for i in range(5)]
    s = scheduler(*requests, pages=7)
    step(s)
    assert s.running and s.waiting
    s.clear()
    assert not s.has_work and s.allocator.free_pages == 7 and all(not r.pages for r in requests)
    assert s.schedule() == []


def test_a_request_that_does_not_run_cannot_finish():
    s = scheduler(request(0, 1))
    with pytest.raises(ValueError):
        s.finish(s.waiting[0])


sizes = st.lists(st.tuples(st.integers(1, 25), st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=12)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(sizes, st.integers(1, 12), st.integers(1, 5), st.integers(0, 20), st.integers(1, 4))
def test_any_load(arrivals, budget, page_size, spare, max_running):
    """arrivals: (prompt, tokens to generate, pass before which it comes)."""
    requests = [(request(i, prompt, new), at) for i, (prompt, new, at) in enumerate(arrivals)]
    needed = {r.index: -(-r.max_total // page_size) for r, _ in requests}
    s = scheduler(pages=max(needed.values()) + spare, page_size=page_size, budget=budget, running=max_running)
    arrived, admitted = [], []
    for time in range(10_000):
        for r, at in requests:
            if at == time:
                s.add(r)
                arrived.append(r.index)
        chunks = s.schedule()
        admitted += [r.index for r in s.running if r.index not in admitted]
        assert admitted == arrived[: len(admitted)]  # first come, first served
        assert len(s.running) <= max_running
        owned = [page for r in s.running for page in r.pages]
        assert len(set(owned)) == len(owned) == s.allocator.num_pages - s.allocator.free_pages
        assert all(len(r.pages) == needed[r.index] for r in s.running)
        if s.waiting and len(s.running) < max_running:
            assert s.allocator.free_pages < needed[s.waiting[0].index]
        scheduled = [chunk.request.index for chunk in chunks]
        assert len(set(scheduled)) == len(scheduled)
        total = sum(chunk.stop - chunk.start for chunk in chunks)
        pending = sum(r.pending for r in s.running)
        assert total == min(budget, pending)  # no room is wasted, and none is exceeded
        assert all(chunk.start == chunk.request.cached < chunk.stop <= chunk.request.length for chunk in chunks)
        # One pending token before several, and by arrival within each kind.
        keys = [(chunk.request.pending > 1, arrived.index(chunk.request.index)) for chunk in chunks]
        assert keys == sorted(keys)
        run(s, chunks)
        if not s.has_work and time >= 12:
            break
    assert len(admitted) == len(requests) and s.allocator.free_pages == s.allocator.num_pages
    assert all(r.length == r.max_total for r, _ in requests)
