"""A growing text: what is certain comes out once and in order, and ends before the first stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.engine.text_stream import TextStream


class Pieces:
    """A detokenizer whose token i is the i-th of some pieces, with some text left at the end."""

    def __init__(self, pieces, rest=""):
        self.pieces, self.rest = pieces, rest

    def push(self, token_id):
        return self.pieces[token_id]

    def flush(self):
        rest, self.rest = self.rest, ""
        return rest


def emitted(pieces, stop=(), rest=""):
    """The pieces that come out, the last one from `finish`; and the stream."""
    stream = TextStream(Pieces(pieces, rest), stop)
    out = []
    for i in range(len(pieces)):
        out.append(stream.push(i))
        if stream.stopped:
            break
    return [*out, stream.finish()], stream


def test_without_stop_strings_everything_comes_out_at_once():
    out, stream = emitted(["Once", "", " upon", " a"], rest="!")
    assert out == ["Once", "", " upon", " a", "!"] and stream.text == "Once upon a!" and not stream.stopped


def test_text_that_may_begin_a_stop_string_is_held_back():
    out, stream = emitted(["ab", "cd", "ef"], ["xyz"])
    assert out == ["", "ab", "cd", "ef"] and stream.text == "abcdef"


@pytest.mark.parametrize("pieces", [["Hello END there"], ["Hello E", "ND there"], ["Hello ", "E", "N", "D", " there"],
                                    ["Hello EN", "D"], [*"Hello END"]])
def test_a_stop_string_across_token_borders(pieces):
    out, stream = emitted(pieces, ["END"])
    assert stream.stopped and stream.text == "".join(out) == "Hello "
    assert out[-1] == ""  # nothing follows a stop


@pytest.mark.parametrize("stop, text", [
    (["cd", "b"], "a"), (["b", "cd"], "a"), (["xx", "ef"], "abcd"), (["abcdef", "f"], ""), (["de", "cdef"], "ab"),
    (["zz"], "abcdef")])
def test_the_earliest_of_several_stops_counts(stop, text):
    out, stream = emitted(["abcdef"], stop)
    assert stream.text == "".join(out) == text and stream.stopped == (text != "abcdef")


def test_a_stop_string_that_overlaps_itself():
    out, stream = emitted(["xa", "aa", "b"], ["aab"])
    assert stream.text == "".join(out) == "xa"


def test_a_stop_string_at_the_start():
    assert emitted(["\n\nHi"], ["\n\n"])[1].text == ""


def test_a_stop_string_that_the_last_flush_completes():
    out, stream = emitted(["ab", "c"], ["cd"], rest="d and more")
    assert stream.stopped and stream.text == "".join(out) == "ab"


def test_finish_twice():
    out, stream = emitted(["abc"], ["zzz"], rest="d")
    assert stream.finish() == "" and stream.text == "".join(out) == "abcd"


words = st.text("ab", max_size=4)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(words, max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), words)
def test_any_text_pieces_and_stops(pieces, stops, rest):
    stream = TextStream(Pieces(pieces, rest), stops)
    longest = max((len(stop) for stop in stops), default=1)
    whole, out, stopped = "", "", False
    snapshots = []
    for i in range(len(pieces) + 1):
        last = i == len(pieces)
        piece = rest if last else pieces[i]
        out += stream.finish() if last else stream.push(i)
        whole += piece
        ends = [whole.find(stop) for stop in stops if stop in whole]
        stopped = bool(ends)
        assert stream.stopped == stopped
        if stopped:
            whole = whole[: min(ends)]
            break
        assert last or len(out) >= len(whole) - (longest - 1)  # no more is held back than a stop string needs
        snapshots.append(out)
    out += stream.finish()
    assert stream.text == out == whole
    assert all(whole.startswith(earlier) for earlier in snapshots)  # what came out was certain
