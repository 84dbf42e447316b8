"""Rotary frequencies and tables against Hugging Face transformers (tests/golden/rope.npz), and the refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from cutp.errors import ModelConfigError, UnsupportedModelError
from cutp.nn.rope_parameters import ROPE_TYPES, RopeParameters
from cutp.nn.rotary_embedding import RotaryEmbedding

GOLDEN = dict(np.load(Path(__file__).parent.parent / "golden" / "rope.npz"))
CASES = {case["name"]: case for case in json.loads(str(GOLDEN["cases"]))}
RUNS = [(name, length) for name, case in CASES.items() for length in case["lengths"]]


def parameters(hf: dict) -> RopeParameters:
    fields = {"theta" if key == "rope_theta" else key: value for key, value in hf.items()}
    return RopeParameters(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def embedding(name: str, **changes) -> RotaryEmbedding:
    case = CASES[name]
    rope = parameters(case["rope_parameters"] | changes)
    return RotaryEmbedding(case["head_dim"], max_seq_len=case["max_position_embeddings"], parameters=rope)


def longrope(**changes) -> RopeParameters:
    fields = {"short_factor": (1.0,) * 4, "long_factor": (2.0,) * 4, "original_max_position_embeddings": 32}
    return RopeParameters("longrope", **(fields | changes))


def test_every_type_has_golden_values():
    assert {case["rope_parameters"]["rope_type"] for case in CASES.values()} == set(ROPE_TYPES)


@pytest.mark.parametrize(("name", "length"), RUNS)
def test_frequencies_match_hf(name, length):
    got = embedding(name).frequencies(length)
    assert got.inv_freq.dtype == np.float32
    assert not got.inv_freq.flags.writeable
    np.testing.assert_allclose(got.inv_freq, GOLDEN[f"{name}.{length}.inv_freq"], rtol=3e-7, atol=0)
    assert got.attention_scaling == pytest.approx(float(GOLDEN[f"{name}.{length}.attention_scaling"]), rel=1e-12)


@pytest.mark.parametrize(("name", "length"), RUNS)
def test_table_matches_hf(name, length):
    rope = embedding(name)
    positions = GOLDEN[f"{name}.{length}.positions"]
    cos, sin = rope.table(positions, length)
    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (len(positions), rope.rotary_dim // 2)
    # A last-bit difference in a frequency (their power function, or ours) grows with the position, so such a
    # frequency is allowed exactly the angle it causes. All others agree to 1e-6.
    off = np.abs(rope.frequencies(length).inv_freq.astype(np.float64) - GOLDEN[f"{name}.{length}.inv_freq"])
    allowed = 1e-6 + 2 * positions[:, None] * off
    assert (np.abs(cos - GOLDEN[f"{name}.{length}.cos"]) <= allowed).all()
    assert (np.abs(sin - GOLDEN[f"{name}.{length}.sin"]) <= allowed).all()


def test_nearly_all_frequencies_equal_hf_bit_for_bit():
    equal = total = 0
    for name, length in RUNS:
        same = embedding(name).frequencies(length).inv_freq == GOLDEN[f"{name}.{length}.inv_freq"]
        equal, total = equal + same.sum(), total + same.size
    assert equal / total > 0.98


def test_only_dynamic_and_longrope_depend_on_the_length():
    for name, case in CASES.items():
        rope = embedding(name)
        assert rope.length_dependent == (case["rope_parameters"]["rope_type"] in ("dynamic", "longrope"))
        longest = 4 * case["max_position_embeddings"]
        changes = not np.array_equal(rope.frequencies(1).inv_freq, rope.frequencies(longest).inv_freq)
        assert changes == rope.length_dependent


def test_a_request_keeps_its_table_at_every_position():
    rope = embedding("dynamic_2")
    cos, _ = rope.table(np.arange(8000), 8000)
    for position in (0, 5, 4095, 4096, 7999):
        np.testing.assert_array_equal(rope.table(np.array([position]), 8000)[0][0], cos[position])


def test_longrope_changes_one_token_beyond_the_original_length():
    rope = RotaryEmbedding(8, max_seq_len=128, parameters=longrope())
    np.testing.assert_array_equal(rope.frequencies(32).inv_freq, 2 * rope.frequencies(33).inv_freq)
    assert rope.frequencies(32).attention_scaling == rope.frequencies(33).attention_scaling > 1


def test_original_length_falls_back_to_max_seq_len():
    rope = RotaryEmbedding(8, max_seq_len=128, parameters=longrope(original_max_position_embeddings=None))
    np.testing.assert_array_equal(rope.frequencies(128).inv_freq, 2 * rope.frequencies(129).inv_freq)
    assert rope.frequencies(1).attention_scaling == 1.0


def test_llama3_without_a_blended_band():
    name = "llama31_8b"
    got = embedding(name, low_freq_factor=4.0, high_freq_factor=4.0).frequencies(1).inv_freq
    plain = embedding(name, rope_type="default").frequencies(1).inv_freq
    short = 2 * np.pi / plain < 8192 / 4
    np.testing.assert_array_equal(got, np.where(short, plain, plain / np.float32(8)))


def test_theta_argument_wins_and_defaults_hold():
    plain = RotaryEmbedding(64, max_seq_len=128)
    assert (plain.rotary_dim, plain.interleaved, plain.parameters.theta) == (64, False, 10000.0)
    other = RotaryEmbedding(64, max_seq_len=128, theta=500000, parameters=RopeParameters(theta=7.0))
    assert other.frequencies(1).inv_freq[-1] == pytest.approx(500000 ** -(62 / 64), rel=1e-6)


def test_rotary_dim_argument_equals_the_partial_factor():
    part = RotaryEmbedding(64, max_seq_len=128, rotary_dim=16).frequencies(1).inv_freq
    assert part.shape == (8,)
    factor = RopeParameters(partial_rotary_factor=0.25)
    np.testing.assert_array_equal(part, RotaryEmbedding(64, max_seq_len=8, parameters=factor).frequencies(1).inv_freq)


def test_many_lengths_do_not_pile_up():
    rope = embedding("dynamic_partial")
    first = rope.frequencies(100).inv_freq
    for length in range(1000):
        rope.frequencies(length)
    assert len(rope._known) <= 256
    np.testing.assert_array_equal(rope.frequencies(100).inv_freq, first)


def test_unknown_type_names_the_known_ones():
    with pytest.raises(UnsupportedModelError, match=r"'spiral'.*longrope"):
        RotaryEmbedding(64, max_seq_len=128, parameters=RopeParameters("spiral"))


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        (RopeParameters("linear"), "needs factor"),
        (RopeParameters("dynamic"), "needs factor"),
        (RopeParameters("dynamic", factor=0.5), "factor >= 1"),
        (RopeParameters("llama3", factor=8.0, low_freq_factor=1.0), "needs high_freq_factor"),
        (RopeParameters("llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=1.0), "below low_freq_factor"),
        (RopeParameters("linear", factor=0.0), "factor must be a positive number"),
        (RopeParameters("linear", factor=float("nan")), "factor must be a positive number"),
        (RopeParameters("yarn", factor=4.0, original_max_position_embeddings=-1), "original_max_position_embeddings"),
        (RopeParameters("yarn", factor=4.0, beta_fast=-2.0), "beta_fast"),
        (RopeParameters("yarn", factor=4.0, theta=1.0), "theta > 1"),
        (RopeParameters("default", theta=0.0), "theta must be a positive"),
        (RopeParameters("default", theta=float("inf")), "theta must be a positive"),
        (longrope(short_factor=None), "needs short_factor"),
        (longrope(long_factor=(2.0,) * 5), "long_factor must hold 4 positive numbers.*got 5"),
        (longrope(short_factor=(1.0,) * 3), "short_factor must hold 4 positive numbers.*got 3"),
        (longrope(short_factor=(1.0, 0.0, 1.0, 1.0)), "short_factor must hold 4 positive"),
        (longrope(original_max_position_embeddings=1), "at least 2"),
        (RopeParameters(partial_rotary_factor=1.5), "partial_rotary_factor"),
        (RopeParameters(partial_rotary_factor=0.4), "even number of dimensions"),
        (RopeParameters(partial_rotary_factor=0.1), "even number of dimensions"),
    ],
)
def test_parameters_that_cannot_work_are_refused(rope, words):
    with pytest.raises(ModelConfigError, match=words):
        RotaryEmbedding(8, max_seq_len=128, parameters=rope)


def test_dimensions_that_cannot_work_are_refused():
    for arguments in ({"dim": 7}, {"dim": 0}, {"dim": 8, "rotary_dim": 10}, {"dim": 8, "rotary_dim": 3}):
        with pytest.raises(ModelConfigError, match="even number of dimensions"):
            RotaryEmbedding(**arguments, max_seq_len=128)
    with pytest.raises(ModelConfigError, match="max_seq_len"):
        RotaryEmbedding(8, max_seq_len=0)
    with pytest.raises(ModelConfigError, match="4 or more"):
        RotaryEmbedding(2, max_seq_len=8, parameters=RopeParameters("dynamic", factor=2.0))
