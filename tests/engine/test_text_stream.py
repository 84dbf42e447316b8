"""A growing text: what is certain comes out once and in order, and ends before the first stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.checkpoint.detokenizer import Detokenizer
from cutp.checkpoint.tokenizer import Tokenizer
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


# ---------------------------------------------------------------- tokens before which nothing may end the text

def watched_from(pieces, stop, first, rest=""):
    """What comes out when stop strings count from what token `first` completes; and the stream."""
    stream = TextStream(Pieces(pieces, rest), stop)
    out = []
    for i in range(len(pieces)):
        out.append(stream.push(i, watch=i >= first))
        if stream.stopped:
            break
    return [*out, stream.finish()], stream


@pytest.mark.parametrize("first, text, pushes", [(0, "a ", 2), (1, "a ", 2), (2, "a END b ", 5), (4, "a END b ", 5),
                                                 (5, "a END b END c", 6)])
def test_a_stop_string_before_its_time_stays_in_the_text(first, text, pushes):
    out, stream = watched_from(["a E", "ND b", " E", "N", "D ", "c"], ["END"], first)
    assert stream.text == "".join(out) == text and len(out) - 1 == pushes
    assert stream.stopped == (first < 5)


def test_a_stop_string_that_began_before_its_time_counts():
    out, stream = watched_from(["a EN", "D b"], ["END"], 1)
    assert stream.stopped and stream.text == "".join(out) == "a "


def test_a_short_stop_string_that_was_passed_over_is_not_found_later():
    # The long one makes the search look far back.
    out, stream = watched_from(["ax", "b", "c"], ["x", "0123456789"], 1)
    assert not stream.stopped and stream.text == "".join(out) == "axbc"


def test_a_passed_over_stop_string_is_still_held_back_no_longer_than_others():
    out, _ = watched_from(["END", "abcd", "e"], ["END"], 2)
    assert out == ["E", "NDab", "c", "de"]


def test_the_last_flush_belongs_to_the_last_token():
    assert watched_from(["ab", "c"], ["cd"], 2, rest="d!")[1].text == "abcd!"
    assert watched_from(["ab", "c"], ["cd"], 1, rest="d!")[1].text == "ab"


words = st.text("ab", max_size=4)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(st.lists(words, max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), words,
       st.integers(0, 6) | st.just(0))
def test_any_text_pieces_and_stops(pieces, stops, rest, first):
    stream = TextStream(Pieces(pieces, rest), stops)
    longest = max((len(stop) for stop in stops), default=1)
    whole, out, watch = "", "", True
    snapshots = []
    for i in range(len(pieces) + 1):
        last = i == len(pieces)
        watch = watch if last else i >= first
        piece = rest if last else pieces[i]
        out += stream.finish() if last else stream.push(i, watch=watch)
        old, whole = len(whole), whole + piece
        starts = [at for stop in stops for at in range(max(0, old + 1 - len(stop)), len(whole))
                  if whole.startswith(stop, at)]
        assert stream.stopped == bool(starts and watch)
        if stream.stopped:
            whole = whole[: min(starts)]
            break
        assert last or len(out) >= len(whole) - (longest - 1)  # no more is held back than a stop string needs
        snapshots.append(out)
    out += stream.finish()
    assert stream.text == out == whole
    assert all(whole.startswith(earlier) for earlier in snapshots)  # what came out was certain


# ---------------------------------------------------------------- with a tokenizer whose tokens are bytes

def byte_tokenizer(tmp_path):
    """A tokenizer with a token for each byte: id = the byte in the byte-level alphabet's order."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path)


@pytest.mark.parametrize("stop, first, text", [
    ("\U0001f600", 0, "naïve "), ("ï", 0, "na"), ("ï", 3, "na"), ("ï", 4, "naïve \U0001f600 – né"),
    ("é", 4, "naïve \U0001f600 – n"), ("\U0001f600 –", 0, "naïve "), ("– né", 9, "naïve \U0001f600 ")])
def test_stop_strings_of_characters_that_are_several_tokens(tmp_path, stop, first, text):
    tokenizer = byte_tokenizer(tmp_path)
    whole = "naïve \U0001f600 – né"
    ids = tokenizer.encode(whole)
    assert len(ids) == len(whole.encode())
    stream = TextStream(Detokenizer(tokenizer, []), [stop])
    out = ""
    for i, token in enumerate(ids):
        out += stream.push(token, watch=i >= first)
        assert "\ufffd" not in out  # no half of a character comes out
        if stream.stopped:
            break
    out += stream.finish()
    assert stream.text == out == text


def test_an_incomplete_character_at_the_end(tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    stream = TextStream(Detokenizer(tokenizer, []), ["zz"])
    out = "".join(stream.push(token) for token in tokenizer.encode("aé")[:-1])
    assert out + stream.finish() == stream.text == "a\ufffd"
