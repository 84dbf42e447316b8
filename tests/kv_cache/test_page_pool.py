"""Page numbers: exact counts of holders, the lowest free page first, then the one idle for longest; none is lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.errors import CapacityError
from cutp.kv_cache import PagePool

# Each step: what to do, and two numbers that choose among the pages there are.
steps = st.lists(st.tuples(st.sampled_from(["take", "share", "release", "keep"]), st.integers(0, 30),
                           st.integers(0, 4)), max_size=60)


class Model:
    """The pool in the plainest way."""

    def __init__(self, num_pages):
        self.holders = [0] * num_pages
        self.kept = set()
        self.idle = []

    @property
    def free(self):
        return [page for page, count in enumerate(self.holders) if count == 0 and page not in self.idle]

    def held(self):
        return [page for page, count in enumerate(self.holders) if count]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.integers(0, 8), steps)
def test_any_sequence_of_calls(num_pages, steps):
    pool, model, evicted = PagePool(num_pages, 4), Model(num_pages), []
    pool.on_evict = evicted.append
    for what, number, count in steps:
        if what == "take":
            expected = (model.free + model.idle)[:count]
            if count > len(model.free) + len(model.idle):
                with pytest.raises(CapacityError, match=f"{count} cache pages .* of {num_pages} are free"):
                    pool.take(count)
                continue
            evicted.clear()
            assert pool.take(count) == expected
            assert evicted == [page for page in expected if page in model.idle]
            for page in expected:
                model.holders[page] = 1
                if page in model.idle:
                    model.idle.remove(page)
                    model.kept.remove(page)
        elif what == "share" and (model.held() or model.idle):
            page = (model.held() + model.idle)[number % (len(model.held()) + len(model.idle))]
            pool.share([page])
            model.holders[page] += 1
            if page in model.idle:
                model.idle.remove(page)
        elif what == "release" and model.held():
            start = number % len(model.held())
            pages = model.held()[start : start + 1 + count]
            pool.release(pages)
            for page in reversed(pages):
                model.holders[page] -= 1
                if model.holders[page] == 0 and page in model.kept:
                    model.idle.append(page)
        elif what == "keep" and model.held():
            page = model.held()[number % len(model.held())]
            pool.keep(page)
            model.kept.add(page)
        assert [pool.holders(page) for page in range(num_pages)] == model.holders
        assert pool.free_pages == model.holders.count(0) and pool.idle_pages == len(model.idle)
    assert pool.num_pages == num_pages


@pytest.mark.parametrize("tokens, pages", [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_pages_for(tokens, pages):
    assert PagePool(1, 4).pages_for(tokens) == pages


def test_pages_that_nobody_holds_are_not_released():
    pool = PagePool(4, 4)
    pages = pool.take(2)
    for wrong in ([2], [0, 3], [0, 0]):
        with pytest.raises(ValueError, match="not all of them were held"):
            pool.release(wrong)
    assert pool.free_pages == 2  # a refused call changes nothing
    pool.release(pages)
    with pytest.raises(ValueError, match="not all of them were held"):
        pool.release(pages)


def test_free_pages_are_neither_shared_nor_kept():
    pool = PagePool(2, 4)
    assert pool.take(1) == [0]
    with pytest.raises(ValueError, match="not all of them hold something"):
        pool.share([0, 1])
    assert pool.holders(0) == 1
    with pytest.raises(ValueError, match="page 1 is to be kept"):
        pool.keep(1)


def test_a_negative_number_of_pages():
    with pytest.raises(ValueError, match="-1 pages"):
        PagePool(2, 4).take(-1)


def test_an_idle_page_that_is_shared_again_is_the_last_to_be_evicted():
    pool = PagePool(3, 4)
    for page in pool.take(3):
        pool.keep(page)
    pool.release([2, 1, 0])  # evicted 0, 1, 2
    pool.share([0])
    pool.release([0])
    assert pool.idle_pages == 3 and pool.take(3) == [1, 2, 0]


def test_an_evicted_page_is_not_kept_any_more():
    pool = PagePool(2, 4)
    pages = pool.take(2)
    pool.keep(1)
    pool.release(pages)
    assert pool.idle_pages == 1
    assert pool.take(2) == [0, 1]
    pool.release([1])
    assert pool.idle_pages == 0 and pool.free_pages == 1
