"""Checks of request parameters: every message names the parameter, what it may be and what it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from cutp.errors import RequestError

MAX_TOKEN_ID = 2**31


def refuse(name: str, expected: str, value: Any) -> NoReturn:
    """RequestError: `name` must be `expected`, not `value`, of which a long repr is cut."""
    raise RequestError(f"{name} must be {expected}, not {_shown(value)}")


def check_integer(name: str, value: Any, low: int, high: int) -> None:
    """RequestError unless the value is None or an int from low to high (a bool is none)."""
    if value is not None and not _is_integer(value, low, high):
        refuse(name, f"an integer from {low} to {high}", value)


def check_number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """RequestError unless the value is None or an int or float from low to high (above low with open_low)."""
    if value is not None and not (_is_number(value, low, high) and not (open_low and value == low)):
        refuse(name, f"a number {'above' if open_low else 'of at least'} {low:g} and at most {high:g}", value)


def check_flag(name: str, value: Any) -> None:
    """RequestError unless the value is True or False."""
    if not isinstance(value, bool):
        refuse(name, "true or false", value)


def check_texts(name: str, values: Any) -> None:
    """RequestError unless the values are a tuple of strings that are not empty."""
    if not isinstance(values, tuple):
        refuse(name, "a string or a list of strings", values)
    for text in values:
        if not _is_text(text):
            raise RequestError(f"{name} holds {_shown(text)}; it must hold strings that are not empty")


def check_token_ids(name: str, values: Any) -> None:
    """RequestError unless the values are a tuple of token ids."""
    if not isinstance(values, tuple):
        refuse(name, "a list of token ids", values)
    for token in values:
        check_integer(name, token, 0, MAX_TOKEN_ID)


def check_biases(name: str, pairs: Any, limit: float) -> None:
    """RequestError unless `pairs` are (token id, number from -limit to limit), each id once."""
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        refuse(name, "a mapping from token ids to numbers", pairs)
    for token, bias in pairs:
        if not _is_integer(token, 0, MAX_TOKEN_ID):
            refuse(name, f"a mapping from token ids from 0 to {MAX_TOKEN_ID} to numbers", token)
        check_number(f"{name} of token {token}", bias, -limit, limit)
        if bias is None:
            refuse(f"{name} of token {token}", "a number", bias)
    if len({token for token, _ in pairs}) != len(pairs):
        refuse(name, "a mapping that names each token id once", pairs)


def check_bad_words(name: str, words: Any) -> None:
    """RequestError unless the words are a tuple of strings with more than spaces, and of tuples of token ids."""
    if not isinstance(words, tuple):
        refuse(name, "a list of strings or of lists of token ids", words)
    for word in words:
        if isinstance(word, str):
            if not _is_text(word.strip(" ")):
                raise RequestError(f"{name} holds {_shown(word)}; a bad word must have more than spaces")
        elif not isinstance(word, tuple) or not word:
            raise RequestError(f"{name} holds {_shown(word)}; a bad word is a string or a list of token ids, not empty")
        else:
            check_token_ids(name, word)


def as_tuple(value: Any) -> Any:
    """A list or another iterable as a tuple; what cannot be one stays as it is, for a check to refuse."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        return value
    # The order of a set of strings differs between processes, and so between ranks.
    return tuple(sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value)


def as_texts(value: Any) -> Any:
    """Strings as a tuple, one string as a tuple of one."""
    return (value,) if isinstance(value, str) else as_tuple(value)


def as_words(value: Any) -> Any:
    """Bad words as a tuple of strings and tuples, one string as a tuple of one."""
    words = as_texts(value)
    return tuple(as_tuple(word) for word in words) if isinstance(words, tuple) else words


def as_pairs(value: Any) -> Any:
    """A mapping, or pairs, as a tuple of (token id, bias) in the order of the ids.

    Ids that are strings of digits, as JSON has them, become ints. What cannot be pairs stays for a check to refuse.
    """
    pairs = as_tuple(value.items() if isinstance(value, Mapping) else value)
    if not isinstance(pairs, tuple):
        return pairs
    pairs = tuple(as_tuple(pair) for pair in pairs)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        return pairs
    pairs = tuple((_id_of(token), bias) for token, bias in pairs)
    return tuple(sorted(pairs, key=lambda pair: pair[0])) if all(type(token) is int for token, _ in pairs) else pairs


def _id_of(token: Any) -> Any:
    return int(token) if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 12 else token


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except ValueError:  # of an int with thousands of digits
        return "a number with thousands of digits"
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _is_text(value: Any) -> bool:
    """Whether the value is a string with something in it, and not with half of a surrogate pair, which no text has."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    # A NaN is not between any two numbers.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
