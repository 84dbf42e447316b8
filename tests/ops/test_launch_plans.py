"""What launchers remember by the layouts of their arrays: arrays of other layouts are checked and planned anew."""

from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cutp.array.kernel import use_backend
from cutp.errors import ConfigError
from cutp.ops import (
    activation_cuda,
    decode_attention_cuda,
    embedding_cuda,
    grouped_gemm_cuda,
    latent_cuda,
    latent_decode_cuda,
    linear_per_head_cuda,
    logprobs_cuda,
    moe_cuda,
    moe_routing_cuda,
    penalties_cuda,
    residual_cuda,
    rms_norm_cuda,
    rotary_cuda,
    sampling_cuda,
    skinny_gemm_cuda,
    stream_gemm_cuda,
)

BF16, F32, I32, I64 = (np.dtype(t) for t in (ml_dtypes.bfloat16, np.float32, np.int32, np.int64))
T, D, PAGES, PAGE = 6, 64, 3, 16


class Recorder:
    def __init__(self):
        self.calls = []

    def launch(self, source, name, grid, block, args, shared_bytes, defines, pdl):
        numbers = tuple((type(a), a.item()) for a in args if isinstance(a, np.generic))
        arrays = [a for a in args if isinstance(a, np.ndarray)]
        self.calls.append((source, name, grid, block, numbers, len(arrays), shared_bytes, defines))


def bf16(*shape):
    return np.zeros(shape, BF16)


def f32(*shape):
    return np.zeros(shape, F32)


def i32(*shape):
    return np.zeros(shape, I32)


def i64(*shape):
    return np.zeros(shape, I64)


@dataclass
class Case:
    """A call that works. any_strides: arrays whose strides mean nothing or may be anything."""

    function: Any
    arrays: dict[str, np.ndarray]
    options: dict[str, Any] = field(default_factory=dict)
    any_strides: tuple[str, ...] = ()

    def run(self, **changed):
        with use_backend(Recorder()) as recorder:
            self.function(**self.arrays | self.options | changed)
        return recorder.calls


def u64(*shape):
    return np.zeros(shape, np.uint64)


_DECODE = decode_attention_cuda.decode_workspace(T, 2 * PAGE, 4, 2, D)
_ROWS = sampling_cuda.SamplingArrays(f32(T), i32(T), f32(T), f32(T), u64(T), i64(T), i64(T))
_LATENT = latent_decode_cuda.latent_decode_workspace(T, 2 * PAGE, 4)
CASES = {case.function.__name__: case for case in (
    Case(activation_cuda.activation, {"x": bf16(T, D), "out": bf16(T, D)}, {"name": "silu"}),
    Case(activation_cuda.gated_activation, {"gate_up": bf16(T, 2 * D), "out": bf16(T, D)}, {"name": "silu"}),
    Case(activation_cuda.clamped_swiglu, {"gate_up": bf16(T, 2 * D), "out": bf16(T, D)}),
    Case(embedding_cuda.embedding, {"tokens": i64(T), "table": bf16(9, D), "out": bf16(T, D)}, {"vocab_start": 0}),
    Case(residual_cuda.scale, {"x": bf16(T, D), "out": bf16(T, D)}, {"factor": 2.0}),
    Case(residual_cuda.clip, {"x": bf16(T, D), "out": bf16(T, D)}, {"limit": 2.0}),
    Case(residual_cuda.scale_rows, {"x": bf16(T, D), "shares": bf16(T, 1), "out": bf16(T, D)}),
    Case(residual_cuda.residual_add, {"x": bf16(T, D), "y": bf16(T, D), "out": bf16(T, D)}),
    Case(residual_cuda.finish_logits, {"logits": bf16(T, D), "out": f32(T, D)}),
    Case(rms_norm_cuda.rms_norm, {"x": bf16(T, D), "weight": bf16(D), "out": bf16(T, D), "square_sums": f32(T, 1)},
         {"eps": 1e-5, "total_dim": 2 * D}, any_strides=("square_sums",)),
    Case(rms_norm_cuda.square_sum, {"x": bf16(T, D), "out": f32(T, 1)}, any_strides=("out",)),
    Case(rms_norm_cuda.layer_norm, {"x": bf16(T, D), "weight": bf16(D), "bias": bf16(D), "out": bf16(T, D)},
         {"eps": 1e-5}),
    Case(rms_norm_cuda.add_rms_norm, {"x": bf16(T, D), "residual": bf16(T, D), "weight": bf16(D),
                                      "residual_out": bf16(T, D), "out": bf16(T, D)}, {"eps": 1e-5}),
    Case(rotary_cuda.rotary_table, {"positions": i64(T), "inv_freq": f32(2, 32), "attention_scaling": f32(2),
                                    "request_of_token": i64(T), "cos_out": f32(T, 32), "sin_out": f32(T, 32)},
         {"dtype": BF16}),
    Case(rotary_cuda.rotary_kv_write, {"qkv": bf16(T, 8 * D), "cos": f32(T, 32), "sin": f32(T, 32), "slots": i64(T),
                                       "pages": bf16(PAGES, 2, 2, PAGE, D), "q_out": bf16(T, 4, D)}),
    Case(rotary_cuda.narrow_heads, {"x": bf16(T, 4, D), "out": bf16(T, 4, 32)}),
    Case(skinny_gemm_cuda.skinny_gemm, {"x": bf16(T, D), "weight": bf16(8, D), "bias": bf16(8), "out": bf16(T, 8)}),
    Case(stream_gemm_cuda.stream_gemm, {"x": bf16(T, D), "weight": bf16(8, D), "bias": bf16(8), "out": bf16(T, 8)}),
    Case(stream_gemm_cuda.stream_gemm_gated, {"x": bf16(T, D), "weight": bf16(16, D), "bias": bf16(16),
                                              "out": bf16(T, 8)}, {"name": "silu"}),
    Case(grouped_gemm_cuda.grouped_linear, {"x": bf16(T, D), "weight": bf16(2, 8, D), "offsets": i32(3),
                                            "bias": bf16(2, 8), "tokens": i32(9), "out": bf16(9, 8)}),
    Case(linear_per_head_cuda.linear_per_head, {"x": bf16(T, 2, D), "weight": bf16(2, 8, D), "out": bf16(T, 2, 8)}),
    Case(moe_cuda.expert_rows, {"experts": i32(T, 2), "tokens": i32(2 * T), "offsets": i32(5), "positions": i32(T, 2)},
         {"first": 0, "count": 4}),
    Case(moe_cuda.combine_experts, {"y": bf16(2 * T, D), "positions": i32(T, 2), "weights": f32(T, 2),
                                    "out": bf16(T, D)}),
    Case(moe_routing_cuda.route_softmax, {"logits": bf16(T, 8), "slots": i64(T), "experts": i32(T, 2),
                                          "weights": f32(T, 2)}, {"top_k": 2, "renormalize": True}),
    Case(decode_attention_cuda.decode_plan, {"kv_lengths": i32(T), "plan": i32(*_DECODE.plan)}, {"n_kv_heads": 2}),
    Case(decode_attention_cuda.decode_attention,
         {"q": bf16(T, 4, D), "pages": bf16(PAGES, 2, 2, PAGE, D), "lookup_table": i32(T, 2), "kv_lengths": i32(T),
          "plan": i32(*_DECODE.plan), "sinks": f32(4), "partials": f32(*_DECODE.partials),
          "counters": np.zeros(_DECODE.counters, np.uint32), "out": bf16(T, 4, D)}, {"scale": 1.0, "blocks": 4}),
    Case(decode_attention_cuda.rotary_decode_attention,
         {"qkv": bf16(T, 8 * D), "cos": f32(T, D // 2), "sin": f32(T, D // 2), "pages": bf16(PAGES, 2, 2, PAGE, D),
          "lookup_table": i32(T, 2), "kv_lengths": i32(T), "plan": i32(*_DECODE.plan), "sinks": f32(4),
          "partials": f32(*_DECODE.partials), "counters": np.zeros(_DECODE.counters, np.uint32), "out": bf16(T, 4, D)},
         {"scale": 1.0, "blocks": 4}),
    Case(latent_cuda.latent_rotary_write,
         {"compressed": bf16(T, 48), "latent": bf16(T, 32), "q": bf16(T, 2, 32), "cos": f32(T, 8), "sin": f32(T, 8),
          "slots": i64(T), "pages": bf16(PAGES, 1, 1, PAGE, 48), "q_out": bf16(T, 2, 48)}, {"interleaved": False}),
    Case(latent_cuda.latent_attention,
         {"q": bf16(T, 2, 48), "pages": bf16(PAGES, 1, 1, PAGE, 48), "lookup_table": i32(2, 2), "lengths": i32(T),
          "table_rows": i64(T), "out": bf16(T, 2, 32)}, {"scale": 1.0}),
    Case(latent_decode_cuda.latent_decode_plan, {"kv_lengths": i32(T), "plan": i32(*_LATENT.plan)}, {"n_heads": 4}),
    Case(latent_decode_cuda.latent_decode_attention,
         {"q": bf16(T, 4, 576), "pages": bf16(PAGES, 1, 1, PAGE, 576), "lookup_table": i32(2, 2), "kv_lengths": i32(T),
          "plan": i32(*_LATENT.plan), "table_rows": i64(T), "partials": f32(*_LATENT.partials),
          "out": bf16(T, 4, 512)}, {"scale": 1.0, "blocks": 4}),
    Case(penalties_cuda.apply_penalties, {"logits": f32(T, D), "counts": i32(9, D), "slots": i32(T),
                                          "repetition": f32(T), "presence": f32(T), "frequency": f32(T)}),
    Case(penalties_cuda.add_logit_bias, {"logits": f32(T, D), "ids": i32(T, 3), "values": f32(T, 3)},
         {"vocab_start": 0}),
    Case(penalties_cuda.count_tokens, {"counts": i32(9, D), "slots": i32(T), "tokens": i64(T)}, {"vocab_start": 0}),
    Case(logprobs_cuda.logprob_records,
         {"logits": f32(T, D), "wanted": i32(T), "targets": i64(T), "parts": u64(T, 1, 5),
          "tickets": np.zeros(T, np.uint32), "records": u64(T, 5)}, {"vocab_start": 0}),
    Case(logprobs_cuda.combine_logprobs,
         {"records": u64(2, T, 5), "wanted": i32(T), "targets": i64(T), "logprobs": f32(T),
          "is_greedy": np.zeros(T, np.bool_), "top_ids": i64(T, 2), "top_logprobs": f32(T, 2)}),
    Case(sampling_cuda.row_argmax,
         {"logits": f32(T, D), "temperature": f32(T), "parts": u64(T, 2), "tickets": np.zeros(T, np.uint32),
          "pairs": u64(T)}, {"vocab_start": 0}),
    Case(sampling_cuda.combine_argmax,
         {"pairs": u64(2, T), "row_max": f32(T), "tokens": i64(T), "status": i32(T), "search": u64(T, 5),
          "least": f32(T), "histogram": u64(T, 2, 2048)}, {"rows": _ROWS}),
    Case(sampling_cuda.count_digits, {"logits": f32(T, D), "temperature": f32(T), "row_max": f32(T),
                                      "search": u64(T, 5), "histogram": u64(T, 2, 1024)}, {"level": 2}),
    Case(sampling_cuda.find_digits,
         {"histograms": u64(2, T, 2, 2048), "first": u64(2, T, 2, 2048), "search": u64(T, 5), "least": f32(T),
          "following": u64(T, 2, 2048)}, {"rows": _ROWS, "level": 0}),
    Case(sampling_cuda.draw,
         {"logits": f32(T, D), "row_max": f32(T), "least": f32(T), "parts": u64(T, 2),
          "tickets": np.zeros(T, np.uint32), "pairs": u64(T)}, {"rows": _ROWS, "vocab_start": 0}),
    Case(sampling_cuda.combine_draw, {"pairs": u64(2, T), "temperature": f32(T), "tokens": i64(T)}),
)}
EACH = [(name, array) for name, case in CASES.items() for array in case.arrays]


@pytest.mark.parametrize(("name", "array"), EACH)
def test_arrays_of_another_layout_are_checked_again(name, array):
    """After a launch that worked, the same call with one array of another dtype, shape or strides is refused."""
    case = CASES[name]
    good = case.arrays[array]
    expected = case.run()
    assert len(expected) >= 1 and case.run() == expected
    changes = [good.view(f"V{good.itemsize}"), good[None], good.astype(np.int8)]
    if array not in case.any_strides:
        changes.append(np.zeros((*good.shape, 2), good.dtype)[..., 0])
    for changed in changes:
        with pytest.raises(ConfigError):
            case.run(**{array: changed})
        assert case.run() == expected


@pytest.mark.parametrize("name", CASES)
def test_other_arrays_of_the_same_layout_reach_the_kernel(name):
    """Nothing of the arrays themselves is remembered."""
    case = CASES[name]

    class Places:
        def launch(self, source, kernel, grid, block, args, *_):
            self.seen = {id(a) for a in args if isinstance(a, np.ndarray)}

    copies = {key: value.copy() for key, value in case.arrays.items()}
    rows = {id(a) for a in vars(case.options["rows"]).values()} if "rows" in case.options else set()
    for arrays in (case.arrays, copies):
        with use_backend(Places()) as places:
            case.function(**arrays | case.options)
        assert places.seen and places.seen <= rows | {id(a) for a in arrays.values()}


def test_strides_that_are_allowed_reach_the_kernel():
    norm, wide = CASES["rms_norm"], np.zeros((T, 2 * D), BF16)
    together, apart = norm.run(), norm.run(x=wide[:, :D])
    assert together != apart and norm.run() == together and norm.run(x=wide[:, D:]) == apart
    sums = norm.run(square_sums=f32(T, 4)[:, 1:2])
    assert sums not in (together, apart) and norm.run() == together
    product = CASES["skinny_gemm"]
    assert product.run() != product.run(x=wide[:, :D]) != product.run(out=np.zeros((T, 16), BF16)[:, :8])
    heads = CASES["linear_per_head"]
    assert heads.run(weight=np.zeros((2, D, 8), BF16).transpose(0, 2, 1)) != heads.run()


def test_settings_are_not_remembered_with_layouts():
    def numbers(case, **options):
        return [value for _, value in CASES[case].run(**options)[0][4]]

    assert numbers("scale", factor=3.0)[-1] == 3.0 and numbers("scale", factor=0.0)[-1] == 0.0
    assert np.signbit(numbers("scale", factor=-0.0)[-1]) and not np.signbit(numbers("scale", factor=0.0)[-1])
    assert numbers("rms_norm", eps=0.5)[-3] == 0.5 and numbers("rms_norm", eps=0.25)[-3] == 0.25
    assert numbers("gated_activation", name="silu") != numbers("gated_activation", name="relu")
    assert numbers("activation", name="silu") != numbers("activation", name="relu")
    assert numbers("gated_activation", limit=7.0)[-1] == 7.0 and np.isinf(numbers("gated_activation")[-1])
    assert numbers("decode_attention", scale=0.5)[-2:] != numbers("decode_attention", scale=0.25)[-2:]
    assert numbers("rotary_decode_attention", softcap=5.0)[-2:] != numbers("rotary_decode_attention", softcap=6.0)[-2:]
    assert numbers("decode_plan", window=5) != numbers("decode_plan") != numbers("decode_plan", together=True)
    assert numbers("embedding", vocab_start=7) != numbers("embedding")
    assert numbers("rotary_kv_write", interleaved=True) != numbers("rotary_kv_write")
    assert numbers("latent_rotary_write", interleaved=True) != numbers("latent_rotary_write")
    assert [CASES["decode_attention"].run(blocks=blocks)[0][2][0] for blocks in (3, 5)] == [3, 5]
    assert [CASES["latent_decode_attention"].run(blocks=blocks)[0][2][0] for blocks in (3, 5)] == [3, 5]
    assert numbers("count_digits", level=1, histogram=u64(T, 2, 2048)) != numbers("count_digits")
    for name in ("row_argmax", "draw", "logprob_records", "add_logit_bias", "count_tokens"):
        assert numbers(name, vocab_start=9) != numbers(name)
    assert numbers("route_softmax", renormalize=False) != numbers("route_softmax")
    with pytest.raises(ConfigError, match="limit is -1"):
        CASES["clip"].run(limit=-1)
    for name in ("decode_attention", "rotary_decode_attention"):
        with pytest.raises(ConfigError, match=f"{name}: softcap is 0"):
            CASES[name].run(softcap=0.0)
    for name in ("latent_attention", "latent_decode_attention"):
        with pytest.raises(ConfigError, match=f"{name}: scale is 0"):
            CASES[name].run(scale=0.0)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "rows" in case.options])
def test_the_settings_of_rows_are_checked_again(name):
    case = CASES[name]
    expected = case.run()
    for setting, array in vars(_ROWS).items():
        for changed in (array.astype(np.int8), array[:-1], np.zeros((T, 2), array.dtype)[:, 0]):
            with pytest.raises(ConfigError, match=rf"rows\.{setting}"):
                case.run(rows=replace(_ROWS, **{setting: changed}))
    assert case.run(rows=replace(_ROWS)) == expected
