"""What each pass computes, for whom: order, budget, pages, preemption, sharing; and that nobody waits for ever."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.errors import CapacityError
from tests.engine.simulated_engine import SimulatedEngine, request


def ids(requests):
    return [one.id for one in requests]


def until_preempted(engine):
    """Runs to the first pass that preempts; returns the plans."""
    plans = []
    while not engine.preemptions and engine.scheduler.has_work:
        plans.append(engine.step())
    return plans


def test_a_long_prompt_is_cut_into_chunks_of_the_budget():
    engine = SimulatedEngine(request(0, 20, 2), budget=8)
    assert engine.run() == [[(0, 0, 8)], [(0, 8, 16)], [(0, 16, 20)], [(0, 20, 21)]]


def test_only_the_last_chunk_completes():
    scheduler = SimulatedEngine(request(0, 9, 1), budget=4).scheduler
    seen = []
    for _ in range(3):
        chunks = scheduler.schedule().chunks
        seen += [chunk.completes for chunk in chunks]
        scheduler.advance(chunks)
    assert seen == [False, False, True]
    assert scheduler.schedule().chunks == []  # nothing to do until the next token is there


def test_generating_requests_come_before_prompts():
    engine = SimulatedEngine(request(0, 3, 5), budget=4)
    assert engine.step() == [(0, 0, 3)]
    engine.add(request(1, 10, 1))
    assert engine.step() == [(0, 3, 4), (1, 0, 3)]
    assert engine.step() == [(0, 4, 5), (1, 3, 6)]


def test_prompts_are_served_in_order_of_arrival():
    engine = SimulatedEngine(request(0, 6, 1), request(1, 6, 1), request(2, 2, 1), budget=8)
    assert engine.step() == [(0, 0, 6), (1, 0, 2)]
    assert ids(engine.scheduler.waiting) == [2]  # no slot for one that no token is left for
    assert engine.step() == [(1, 2, 6), (2, 0, 2)]


def test_more_generating_requests_than_budget():
    engine = SimulatedEngine(*(request(i, 1, 3) for i in range(4)), budget=2)
    assert engine.run() == [[(0, i, i + 1), (1, i, i + 1)] for i in range(3)] + [
        [(2, i, i + 1), (3, i, i + 1)] for i in range(3)]


def test_running_requests_are_limited():
    engine = SimulatedEngine(*(request(i, 1, 2) for i in range(3)), running=2)
    assert engine.run() == [[(0, 0, 1), (1, 0, 1)], [(0, 1, 2), (1, 1, 2)], [(2, 0, 1)], [(2, 1, 2)]]


def test_pages_are_taken_as_tokens_need_them():
    one = request(0, 9, 8)
    engine = SimulatedEngine(one, budget=6)
    counts = []
    while engine.scheduler.has_work:
        engine.scheduler.advance([])
        engine.step()
        counts.append(len(one.pages))
    assert counts == [2, 3, 3, 3, 3, 4, 4, 4, 0]


def test_slots_are_reused_lowest_first():
    requests = [request(0, 1, 5), request(1, 1, 3), request(2, 1, 2), request(3, 1, 5), request(4, 1, 5)]
    engine = SimulatedEngine(*requests[:3], running=3)
    engine.step()
    assert [one.slot for one in requests] == [0, 1, 2, None, None]
    for _ in range(2):
        engine.step()
    for one in requests[3:]:
        engine.add(one)
    engine.step()
    assert [one.slot for one in requests] == [0, None, None, 1, 2]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("first, second, pages, admitted", [
    ((7, 12), (8, 1), 5, False),  # 3 + 3 pages: for the known tokens of both, and one more each to generate into
    ((7, 12), (8, 1), 6, True),
    ((7, 1), (8, 0), 4, True),  # neither grows beyond 2 pages
    ((15, 9), (9, 9), 8, False),  # 5 + 4 pages, also when the first has a token more
    ((15, 9), (9, 9), 9, True),
])
def test_admission_waits_for_pages(together, first, second, pages, admitted):
    engine = SimulatedEngine(request(0, *first), pages=pages, budget=30)
    if not together:
        engine.step()
    engine.add(request(1, *second))
    engine.step()
    assert ids(engine.scheduler.waiting) == ([] if admitted else [1])
    engine.run()


def test_admission_counts_the_pages_that_a_following_request_has_not_taken():
    prompt = list(range(4))
    engine = SimulatedEngine(request(0, prompt, 1), request(1, [*prompt, *range(50, 70)]), request(2, 4), pages=8,
                             budget=30)
    assert engine.step() == [(0, 0, 4)] and ids(engine.scheduler.waiting) == [2]  # 2 + 6 + 1 pages
    engine.run()


def test_a_prompt_takes_the_pages_there_are():
    """The first one has grown by more than was left for it when the second, which follows it, was admitted."""
    engine = SimulatedEngine(request(0, range(4), 30), request(1, [*range(4), *range(50, 70)], 2), pages=9, budget=5)
    assert engine.step() == [(0, 0, 4)] and ids(engine.scheduler.running) == [0, 1]
    engine.scheduler.max_batch_tokens = 2
    assert [engine.step() for _ in range(12)] == [[(0, i, i + 1), (1, i, i + 1)] for i in range(4, 16)]
    engine.scheduler.max_batch_tokens = 20
    assert engine.step() == [(0, 16, 17), (1, 16, 20)] and engine.pool.free_pages == 0
    assert engine.step() == [(0, 17, 18)]
    engine.run()


def test_a_small_request_does_not_overtake_a_large_one():
    engine = SimulatedEngine(request(0, 8, 9), request(1, 16), request(2, 1), pages=5)
    engine.step()
    assert ids(engine.scheduler.running) == [0] and ids(engine.scheduler.waiting) == [1, 2]


def test_without_a_page_the_youngest_pauses_then_is_preempted_and_keeps_its_tokens():
    old, young = request(0, 4, 14), request(1, 4, 14)
    engine = SimulatedEngine(old, young, pages=5, cache=False)
    plans = [engine.step() for _ in range(9)]
    assert plans[4:6] == [[(0, 7, 8), (1, 7, 8)], [(0, 8, 9)]]  # the last page goes to the older one
    assert young in engine.scheduler.running and len(young.pages) == 2
    assert engine.step() == [(0, 12, 13)]  # which then needs another
    assert engine.preemptions == {1: 1} and ids(engine.scheduler.waiting) == [1]
    generated = list(young.generated)
    assert len(generated) == 5
    assert engine.run()[4:6] == [[(1, 0, 8)], [(1, 8, 9)]]  # computed again, when the other is done
    assert young.generated[:5] == generated and len(young.generated) == 14 and engine.preemptions == {1: 1}


def test_a_preempted_request_goes_on_from_the_pages_that_are_left():
    """Those of its generated tokens too; its last page went first."""
    old, young = request(0, 4, 16), request(1, 4, 20)
    engine = SimulatedEngine(old, young, pages=7)
    until_preempted(engine)
    assert engine.preemptions == {1: 1} and young.length == 13
    engine.run()
    assert engine.hits == {1: 8} and engine.computed[1] == 12 + 23 - 8


def test_a_preempted_requests_chunk_is_taken_out_of_the_pass():
    """An old prompt that had to follow takes pages of a younger request whose next token was planned already."""
    first, old, young = request(0, [1, 2, 3, 4], 30), request(1, [1, 2, 3, 4, *range(50, 93)], 2), request(2, 1, 40)
    engine = SimulatedEngine(first, old, young, request(3, 60), pages=18, budget=5)
    plans = until_preempted(engine)
    assert plans[-2] == [(0, 15, 16), (2, 12, 13), (1, 37, 40)]
    assert plans[-1] == [(0, 16, 17), (1, 40, 44)] and engine.preemptions == {2: 1}  # its place is used, too
    assert ids(engine.scheduler.waiting) == [2, 3]
    engine.run()


def test_a_prompt_that_is_preempted_is_not_planned():
    """An old prompt takes pages of a younger one that stood after it in the same pass."""
    first, old, young = request(0, [1, 2], 19), request(1, [1, 2, *range(50, 82)], 2), request(2, 4, 3)
    engine = SimulatedEngine(first, old, young, pages=23, page_size=2, budget=4)
    plans = until_preempted(engine)
    assert engine.preemptions == {2: 1} and plans[0] == [(0, 0, 2), (2, 0, 2)]
    assert plans[1:-1] == [[(0, 2 + i, 3 + i), (1, 2 + 3 * i, 5 + 3 * i)] for i in range(10)]
    assert plans[-1] == [(0, 12, 13), (1, 32, 34)]  # a token would have been left for it
    engine.run()


def test_samples_of_one_prompt_compute_it_once():
    engine = SimulatedEngine(*(request(i, range(19), 2) for i in range(8)), pages=40, budget=16)
    plans = engine.run()
    assert plans[:2] == [[(0, 0, 16)], [(i, 16, 19) for i in range(5)] + [(5, 16, 17)]]
    assert engine.computed == {0: 20} | {i: 4 for i in range(1, 8)}  # the last page is not full, so not shared
    assert engine.cache.queried_tokens == 8 * 19 and engine.cache.hit_tokens == 7 * 16


def test_requests_follow_one_that_computes_what_they_share():
    """They have slots but no chunk, and go on where the common pages end."""
    common = list(range(12))
    engine = SimulatedEngine(request(0, [*common, 50, 51]), request(1, [*common[:8], 60]), request(2, common), pages=40,
                             budget=6)
    assert engine.step() == [(0, 0, 6)]
    assert engine.step() == [(0, 6, 12)]
    assert engine.step() == [(0, 12, 14), (1, 8, 9), (2, 8, 11)]
    engine = SimulatedEngine(request(0, [*common, 50, 51], 9), request(1, [*common[:8], 60], 5), pages=40, budget=9)
    assert engine.step() == [(0, 0, 9)]
    engine.add(request(2, [7, 7], 5))
    assert engine.step() == [(0, 9, 14), (1, 8, 9), (2, 0, 2)]


def test_a_request_that_follows_does_not_hold_up_the_next_one():
    engine = SimulatedEngine(request(0, range(6)), request(1, range(6), 1), request(2, [9], 1), budget=8)
    assert engine.step() == [(0, 0, 6), (2, 0, 1)]
    assert ids(engine.scheduler.running) == [1] and engine.scheduler.running[0].pages == []
    assert engine.step() == [(1, 4, 6)]


def test_who_follows_goes_on_alone_when_the_first_is_cancelled():
    first, second = request(0, range(30)), request(1, range(30))
    engine = SimulatedEngine(first, second, pages=40, budget=6)
    engine.step()
    engine.step(cancel_during=[first])  # the pages of this pass are lost, those of the one before are not
    assert engine.step() == [(1, 4, 10)]
    engine.run()


def test_a_request_whose_hidden_states_are_wanted_computes_them_itself():
    prompt = range(16)
    engine = SimulatedEngine(request(0, prompt), request(1, prompt, wanted_from=0), request(2, prompt, wanted_from=9),
                             request(3, prompt), pages=40, budget=64)
    assert engine.step() == [(0, 0, 16), (1, 0, 16)]
    assert engine.step() == [(2, 8, 16), (3, 12, 16)]
    assert engine.hits == {2: 8, 3: 12}


def test_equal_pages_that_were_computed_twice_become_one():
    first, second = request(0, range(9), 3), request(1, range(9), 3, wanted_from=0)
    engine = SimulatedEngine(first, second, pages=40, budget=64)
    engine.step()
    assert first.pages[:2] == second.pages[:2] == [0, 1] and first.pages[2] != second.pages[2]
    assert engine.pool.free_pages == 36
    engine.run()


def test_a_page_that_was_begun_is_completed_though_another_has_it():
    first, second = request(0, [4], 20), request(1, [4, 0, 0, 0, 7, 7, 7, 7], 1)
    engine = SimulatedEngine(first, second, budget=2)
    assert engine.step() == [(0, 0, 1), (1, 0, 1)]
    engine.scheduler.max_batch_tokens = 1
    assert [engine.step() for _ in range(3)] == [[(0, i, i + 1)] for i in (1, 2, 3)]
    assert first.generated == [0, 0, 0, 0]  # what stands in the second one's prompt
    engine.scheduler.max_batch_tokens = 8
    assert engine.step() == [(0, 4, 5), (1, 1, 8)]
    engine.run()


@pytest.mark.parametrize("kind", ["salt", "not shared", "no cache"])
def test_what_is_not_shared(kind):
    engine = SimulatedEngine(request(0, range(9), 1, salt=b"a", share=kind != "not shared"),
                             request(1, range(9), 1, salt=b"b" if kind == "salt" else b"a"), pages=40, budget=64,
                             cache=kind != "no cache")
    assert engine.run()[0] == [(0, 0, 9), (1, 0, 9)]
    if kind != "no cache":
        assert engine.cache.hit_tokens == 0 and engine.cache.queried_tokens == (9 if kind == "not shared" else 18)


def test_a_later_request_finds_the_pages_of_an_earlier_one():
    engine = SimulatedEngine(request(0, range(16), 8), budget=64)
    engine.run()
    answer = engine.requests[0].tokens(0, 24)
    engine.add(request(1, range(16)))
    assert engine.run() == [[(1, 12, 16)]]  # a page of its own, though all are known: its last token must be computed
    engine.add(request(2, range(17)))
    assert engine.run() == [[(2, 16, 17)]]
    engine.add(request(3, [*answer, 5]))
    assert engine.run() == [[(3, 20, 25)]]  # the answer's last token was never computed
    assert engine.cache.queried_tokens == 16 + 16 + 17 + 25 and engine.cache.hit_tokens == 12 + 16 + 20


@pytest.mark.parametrize("prompt, plan", [(range(32), [(0, 32, 33), (1, 28, 32)]), (32, [(0, 32, 33)])])
def test_pages_in_use_are_not_counted_twice_at_admission(prompt, plan):
    """8 pages and one to generate into are admitted to 7 free ones when 7 of them are those of a running request."""
    engine = SimulatedEngine(request(0, range(32), 30), pages=16, budget=64)
    engine.step()
    engine.add(request(1, prompt, 2))
    assert engine.step() == plan


def test_cancelling():
    requests = [request(i, 9, 3) for i in range(4)]
    engine = SimulatedEngine(*requests, pages=8, budget=20)
    engine.step()
    assert ids(engine.scheduler.running) == [0, 1] and ids(engine.scheduler.waiting) == [2, 3]
    engine.cancel(requests[3])
    engine.cancel(requests[3])  # once more is no error
    engine.cancel(requests[0])
    engine.check_pages()
    assert ids(engine.scheduler.running) == [1] and ids(engine.scheduler.waiting) == [2]
    engine.step(cancel_during=[requests[1], requests[2]])
    assert not engine.scheduler.has_work and requests[1].cached == 0
    engine.run()
    engine.cancel(requests[0])


def test_clear_drops_everything_and_frees_the_pages():
    requests = [request(i, 9, 3) for i in range(5)]
    engine = SimulatedEngine(*requests, pages=7)
    engine.step()
    assert engine.scheduler.running and engine.scheduler.waiting
    engine.scheduler.clear()
    assert not engine.scheduler.has_work and engine.pool.free_pages == 7
    assert all(not r.pages and r.slot is None and r.cached == 0 for r in requests)
    assert engine.scheduler.schedule().chunks == []
    engine.requests.clear()
    engine.add(request(0, 9, 3))  # ids may begin again
    engine.run()


def test_a_request_that_does_not_run_cannot_finish():
    engine = SimulatedEngine(request(0, 1))
    with pytest.raises(ValueError):
        engine.scheduler.finish(engine.scheduler.waiting[0])


@pytest.mark.parametrize("running", [False, True])
def test_ids_must_grow(running):
    engine = SimulatedEngine(request(3, 1, 5))
    if running:
        engine.step()
    for id in (2, 3):
        with pytest.raises(ValueError, match=f"request {id} was added after request 3"):
            engine.scheduler.add(request(id, 1))


@pytest.mark.parametrize("pages, max_len", [(3, 40), (10, 12)])
def test_a_request_that_could_never_run_is_refused(pages, max_len):
    engine = SimulatedEngine(pages=pages, page_size=4, max_len=max_len)
    message = f"request 0 may reach 13 tokens; the limit is {max_len}, and the cache holds {4 * pages}"
    with pytest.raises(CapacityError, match=message):
        engine.add(request(0, 10, 3))
    engine.add(request(0, 10, 2))
    engine.run()


def test_a_stream_of_small_requests_does_not_starve_a_big_one():
    """Wherever it stands in the queue; the small ones alone would keep slots, budget and pages in use for ever."""
    for before in range(4):
        engine = SimulatedEngine(pages=20, budget=6, running=6)
        arrivals, big = 0, None
        while big not in engine.finished:
            for _ in range(3):
                if arrivals == before:
                    big = request(arrivals, 60, 12)  # 18 of the 20 pages
                    engine.add(big)
                else:
                    engine.add(request(arrivals, 3 + arrivals % 4, 5))
                arrivals += 1
            engine.step()
        assert engine.passes < 12 * before + 60 / 6 + 12 + 4
        assert engine.preemptions[big.id] == 0 or before > 0


def test_small_requests_behind_a_huge_one():
    """They wait for its prompt, and generate beside it."""
    small = [request(1 + i, 2, 5) for i in range(4)]
    engine = SimulatedEngine(request(0, 400, 100), *small, pages=140, budget=16)
    for _ in range(400 // 16):
        assert [id for id, _, _ in engine.step()] == [0]
    for _ in range(6):
        engine.step()
    assert set(small) <= set(engine.finished) and engine.requests[0] not in engine.finished
    engine.run()


def test_the_oldest_prompt_gets_its_share_of_a_pass_that_others_could_fill():
    """It had to wait for a page of the first, and meanwhile others began to generate."""
    first, old = request(0, range(5), 30), request(1, [*range(4), *range(100, 106)], 1)
    engine = SimulatedEngine(first, old, *(request(i, 1, 60) for i in range(2, 13)), pages=300, budget=16, running=13)
    assert engine.step() == [(0, 0, 5), *((i, 0, 1) for i in range(2, 13))]
    engine.cancel(first)
    engine.scheduler.max_batch_tokens = 1
    assert engine.step() == [(1, 4, 5)]
    engine.scheduler.max_batch_tokens = 12
    assert engine.step() == [*((i, 1, 2) for i in range(2, 11)), (1, 5, 8)]
    assert engine.step() == [*((i, 2, 3) for i in range(2, 11)), (11, 1, 2), (1, 8, 10)]  # it needs no more


prompts = st.one_of(st.integers(1, 25), st.tuples(st.integers(0, 2), st.integers(1, 25), st.integers(0, 6)))
arrivals = st.fixed_dictionaries({
    "prompt": prompts, "new": st.integers(0, 12), "wanted": st.none() | st.integers(0, 24),
    "share": st.sampled_from([True, True, True, False]), "salt": st.sampled_from([b"", b"", b"x"])})
events = st.lists(st.one_of(st.none(), arrivals, st.tuples(st.booleans(), st.integers(0, 30))), max_size=40)


def arriving(id, prompt, new, wanted, share, salt):
    """prompt: tokens of its own, or (one of three texts, tokens of it, tokens of its own after that)."""
    if not isinstance(prompt, int):
        text, common, own = prompt
        prompt = [*([5, 6, 7, 8] * 9)[text : text + common], *range(1000 * (id + 1), 1000 * (id + 1) + own)]
    length = prompt if isinstance(prompt, int) else len(prompt)
    wanted = None if wanted is None else min(wanted, length - 1)
    return request(id, prompt, new, wanted_from=wanted, share=share, salt=salt)


def replay(events, **limits):
    """Runs a step for None, adds a request, or cancels one (during the next step, or before it); then to the end."""
    engine, arrived, plans, doomed = SimulatedEngine(**limits), 0, [], []
    for event in events:
        if event is None:
            plans.append((engine.step(doomed), [list(r.pages) for r in engine.scheduler.running]))
            doomed = []
        elif isinstance(event, dict):
            engine.add(arriving(arrived, **event))
            arrived += 1
        elif engine.unfinished():
            during, number = event
            victim = engine.unfinished()[number % len(engine.unfinished())]
            if during:
                doomed.append(victim)
            else:
                engine.cancel(victim)
    plans += engine.run()
    return engine, plans


@settings(max_examples=100, derandomize=True, deadline=None)
@given(events, st.integers(1, 20), st.integers(1, 5), st.integers(0, 20), st.integers(1, 5), st.booleans())
def test_any_load(events, budget, page_size, spare, max_running, cache):
    """The simulated engine checks every pass; a second scheduler with another secret makes the same plans."""
    largest = max((arriving(0, **event).max_total for event in events if isinstance(event, dict)), default=1)
    limits = dict(budget=budget, page_size=page_size, pages=-(-largest // page_size) + spare, running=max_running,
                  max_len=largest, cache=cache)
    engine, plans = replay(events, **limits)
    for r in engine.requests:
        assert r in engine.cancelled or r.length == r.max_total
        if r not in engine.cancelled and not engine.preemptions[r.id]:
            # Every token is computed or found once; but the last one that is generated is not needed.
            assert engine.computed[r.id] + engine.hits[r.id] == r.max_total - (1 if r.generated else 0)
    assert replay(events, **limits, salt=b"another")[1] == plans
