"""Pages are found by all the tokens that lead to them, under the same salt only; ends of chains are evicted first."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.kv_cache import PagePool, PrefixCache


def make(pages=8, page_size=2, salt=b""):
    pool = PagePool(pages, page_size)
    return pool, PrefixCache(pool, salt)


def keys_of(cache, tokens, salt=b""):
    return cache.keys(lambda start, stop: tokens[start:stop], salt)


def publish(pool, cache, tokens, salt=b""):
    """Takes pages for all full pages of `tokens` and publishes them."""
    keys, pages = keys_of(cache, tokens, salt), pool.take(len(tokens) // pool.page_size)
    return [cache.publish(keys[i], page) for i, page in enumerate(pages)]


def found(pool, cache, tokens, salt=b""):
    """The pages that are known for `tokens`; they are released again."""
    pages = cache.share(keys_of(cache, tokens, salt), 0, len(tokens) // pool.page_size)
    pool.release(pages)
    return pages


def test_pages_are_found_up_to_the_first_unknown_one():
    pool, cache = make()
    pages = publish(pool, cache, [1, 2, 3, 4, 5, 6, 7])
    assert pages == [0, 1, 2] and len(cache) == 3
    assert found(pool, cache, [1, 2, 3, 4, 5, 6]) == [0, 1, 2]
    assert found(pool, cache, [1, 2, 3, 4, 9, 6]) == [0, 1]
    assert found(pool, cache, [1, 2, 9, 4, 5, 6]) == [0]  # the last page has the same tokens, after others
    assert found(pool, cache, [9, 2, 3, 4, 5, 6]) == []
    assert found(pool, cache, [3, 4]) == []  # the same tokens elsewhere


def test_sharing_begins_and_ends_where_asked():
    pool, cache = make()
    publish(pool, cache, [1, 2, 3, 4, 5, 6])
    keys = keys_of(cache, [1, 2, 3, 4, 5, 6])
    assert cache.share(keys, 1, 2) == [1] and [pool.holders(page) for page in range(3)] == [1, 2, 1]
    assert cache.share(keys, 2, 2) == [] and cache.share(keys, 2, 0) == []


def test_hits_are_counted_in_tokens():
    pool, cache = make()
    publish(pool, cache, [1, 2, 3, 4])
    assert cache.hit_tokens == 0
    found(pool, cache, [1, 2, 3, 4])
    found(pool, cache, [1, 2, 9, 9])
    assert cache.hit_tokens == 6


def test_salts_separate():
    pool, cache = make()
    publish(pool, cache, [1, 2], b"a")
    assert found(pool, cache, [1, 2], b"a") == [0]
    assert found(pool, cache, [1, 2]) == found(pool, cache, [1, 2], b"b") == found(pool, cache, [1, 2], b"aa") == []


def test_the_engines_secret_changes_every_key():
    tokens = [1, 2, 3, 4]
    all_keys = [keys_of(make(salt=secret)[1], tokens, salt)[i]
                for secret in (b"", b"s", b"s" * 200, b"s" * 201) for salt in (b"", b"s") for i in (0, 1)]
    assert len(set(all_keys)) == len(all_keys) and {len(key) for key in all_keys} == {16}


def test_equal_engines_make_equal_keys():
    tokens = list(range(10))
    first, second = keys_of(make(salt=b"s")[1], tokens, b"x"), keys_of(make(salt=b"s")[1], tokens, b"x")
    assert [second[i] for i in (4, 0, 2)] == [first[i] for i in (4, 0, 2)]


def test_the_hash():
    _, cache = make(salt=b"engine")
    secret = hashlib.blake2b(b"engine").digest()
    key = hashlib.blake2b(b"tenant", digest_size=16, key=secret, person=b"salt").digest()
    keys = keys_of(cache, [7, 2**40, 0, 9], b"tenant")
    for page, tokens in enumerate(([7, 2**40], [0, 9])):
        key = hashlib.blake2b(key + np.array(tokens, np.int64).tobytes(), digest_size=16, key=secret).digest()
        assert keys[page] == key


def test_a_salt_cannot_continue_another_chain():
    """A salt made of what is hashed for a page does not lead to that page's key."""
    _, cache = make(page_size=1)
    keys = keys_of(cache, [5, 6])
    start = keys._chain[0]
    forged = keys_of(cache, [6], start + (5).to_bytes(8, "little"))
    assert forged[0] != keys[1]


def test_a_page_whose_tokens_are_not_all_known_has_no_key():
    _, cache = make(page_size=4)
    tokens = [1, 2, 3]
    keys = keys_of(cache, tokens)
    with pytest.raises(ValueError, match="page 0 has no key: only 3 of its tokens"):
        keys[0]
    tokens.append(4)
    assert keys[0] == keys_of(cache, [1, 2, 3, 4])[0]  # the failed attempt left nothing behind


def test_tokens_are_read_once():
    _, cache = make()
    reads = []

    def tokens(start, stop):
        reads.append(start)
        return [start, stop]

    keys = cache.keys(tokens)
    assert keys[2] and keys[0] and keys[2] and keys[3]
    assert reads == [0, 2, 4, 6]


def test_a_second_page_with_the_same_contents_is_given_up():
    pool, cache = make()
    publish(pool, cache, [1, 2])
    [own] = pool.take(1)
    assert own == 1
    assert cache.publish(keys_of(cache, [1, 2])[0], own) == 0
    assert pool.holders(0) == 2 and pool.holders(1) == 0 and len(cache) == 1
    assert cache.publish(keys_of(cache, [1, 2])[0], 0) == 0 and pool.holders(0) == 2  # known as itself
    pool.release([0])
    pool.release([0])
    assert pool.free_pages == 8 and pool.idle_pages == 1


def test_an_idle_page_with_the_same_contents_is_taken_up():
    pool, cache = make()
    pool.release(publish(pool, cache, [1, 2]))
    own = pool.take(1)[0]
    assert cache.publish(keys_of(cache, [1, 2])[0], own) == 0
    assert pool.holders(0) == 1 and pool.holders(own) == 0 and pool.idle_pages == 0


def test_the_end_of_the_oldest_chain_is_evicted_first():
    pool, cache = make(pages=5)
    first, second = publish(pool, cache, [1, 2, 3, 4, 5, 6]), publish(pool, cache, [7, 8, 9, 10])
    pool.release(first)
    pool.release(second)
    assert found(pool, cache, [7, 8]) == [3]  # touched, so its page is the last to go; [9, 10] is not
    taken = [pool.take(1)[0] for _ in range(5)]
    assert taken == [2, 1, 0, 4, 3] and cache.evicted_pages == 5 and len(cache) == 0
    assert found(pool, cache, [1, 2, 3, 4, 5, 6]) == []


def test_free_pages_go_before_idle_ones():
    pool, cache = make(pages=4)
    pool.release(publish(pool, cache, [1, 2, 3, 4]))
    assert pool.take(2) == [2, 3] and cache.evicted_pages == 0
    assert pool.take(1) == [1] and found(pool, cache, [1, 2, 3, 4]) == [0]


def test_held_pages():
    pool, cache = make()
    pages = publish(pool, cache, [1, 2, 3, 4, 5, 6])
    keys = keys_of(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    assert [cache.held_pages(keys, stop) for stop in (-1, 0, 2, 3, 4)] == [0, 0, 2, 3, 3]
    pool.release(pages[1:])
    assert cache.held_pages(keys, 4) == 1 and cache.hit_tokens == 0


lines = st.lists(st.integers(0, 1), max_size=12)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(1, 3), st.lists(st.tuples(lines, st.booleans()), max_size=10), lines)
def test_what_is_found_is_what_was_published(page_size, published, wanted):
    """Among prompts of zeros and ones; a prompt that is not held stays idle, as there are pages enough."""
    pool, cache = make(pages=200, page_size=page_size)
    contents = {}
    for tokens, held in published:
        pages = publish(pool, cache, tokens)
        for i, page in enumerate(pages):
            assert contents.setdefault(page, tokens[: (i + 1) * page_size]) == tokens[: (i + 1) * page_size]
        if not held:
            pool.release(pages)
    known = {tuple(prefix) for prefix in contents.values()}
    assert len(known) == len(contents) == len(cache)
    pages = found(pool, cache, wanted)
    expected = 0
    while tuple(wanted[: (expected + 1) * page_size]) in known and (expected + 1) * page_size <= len(wanted):
        expected += 1
    assert [contents[page] for page in pages] == [wanted[: (i + 1) * page_size] for i in range(expected)]
