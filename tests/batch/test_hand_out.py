"""Dealing records: everybody computes the same, nobody gets too much, long ones go first."""

from hypothesis import given
from hypothesis import strategies as st

from cutp.batch import hand_out
from cutp.batch.hand_out import Window, deal, plan, shares
from cutp.batch.records import Record
from cutp.engine.sampling_params import SamplingParams


def record(index, cost):
    return Record(index, index, "plain", False, [0] * cost, SamplingParams(), "")


@given(st.integers(0, 200), st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 40))
def test_shares(available, outstanding, target):
    counts = shares(available, outstanding, target)
    assert len(counts) == len(outstanding) and min(counts) >= 0
    room = sum(max(0, target - count) for count in outstanding)
    assert sum(counts) == min(available, room)
    after = [count + more for count, more in zip(outstanding, counts, strict=True)]
    for count, more in zip(after, counts, strict=True):
        if more:
            assert count <= target
            # Whoever got something has at most one more than anybody else.
            assert count <= min(after) + 1


def test_shares_of_the_same_work_go_to_the_first():
    assert shares(5, [0, 0, 0], 10) == [2, 2, 1]
    assert shares(2, [3, 0, 0], 10) == [0, 1, 1]
    assert shares(100, [3, 0, 12], 10) == [7, 10, 0]


@given(st.lists(st.integers(1, 50), max_size=30), st.data())
def test_deal(costs, data):
    records = [record(i, cost) for i, cost in enumerate(sorted(costs, reverse=True))]
    first = data.draw(st.integers(0, len(records)))
    counts = [first, 0, len(records) - first]
    hands = deal(records, counts)
    assert [len(hand) for hand in hands] == counts
    assert sorted(r.index for hand in hands for r in hand) == list(range(len(records)))
    assert all(hand == sorted(hand, key=lambda r: r.index) for hand in hands)


def test_plan():
    assert plan(256, 0, 0.0) == (256 + 32, 0.1)
    assert plan(256, 0, 0.1) == (256 + 32, 0.2)
    # 100 a second: twice what it finishes in 0.8 s.
    assert plan(256, 40, 0.4) == (256 + 160, 0.8)
    assert plan(10, 200, 2.0) == (10 + 400, 2.0)
    # 2000 a second: as many as may be, and meetings so often that half of them are finished in between.
    assert plan(10, 4000, 2.0) == (10 + 1024, 0.256)
    assert plan(10, 10**6, 0.1) == (10 + 1024, 0.1)


def test_deal_evens_out_the_cost():
    costs = [9, 5, 4, 3, 3]
    hands = deal([record(i, cost) for i, cost in enumerate(costs)], [2, 3])
    assert [[r.cost for r in hand] for hand in hands] == [[9, 3], [5, 4, 3]]


def test_window_takes_the_longest_of_a_stretch_first(monkeypatch):
    monkeypatch.setattr(hand_out, "WINDOW_RECORDS", 4)
    costs = [1, 3, 2, 3, 9, 1, 8]
    read = []

    def source():
        for index, cost in enumerate(costs):
            read.append(index)
            yield record(index, cost)

    window = Window(source())
    assert window.available(1) == 4 and read == [0, 1, 2, 3]
    assert [r.index for r in window.take(3)] == [1, 3, 2]
    assert window.available(3) == 4 and window.exhausted
    assert [r.index for r in window.take(9)] == [0, 4, 6, 5]
    assert window.available(3) == 0 and window.take(1) == []


def test_window_is_bounded_by_its_text(monkeypatch):
    monkeypatch.setattr(hand_out, "WINDOW_COST", 100)
    window = Window(record(index, 60) for index in range(50))
    assert window.available(1) == 2 and window.available(5) == 6
