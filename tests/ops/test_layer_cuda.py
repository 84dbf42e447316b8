"""The kernels of one layer together: decode against prefill, a row alone and in a batch, graph replay and eager."""

import numpy as np
import pytest

from cutp.ops.activation_cuda import gated_activation
from cutp.ops.decode_attention_cuda import decode_attention, decode_plan, decode_workspace
from cutp.ops.embedding_cuda import embedding
from cutp.ops.prefill_attention_cuda import prefill_attention, prefill_work_list
from cutp.ops.residual_cuda import finish_logits, residual_add
from cutp.ops.rms_norm_cuda import add_rms_norm, rms_norm
from cutp.ops.rotary_cuda import rotary_kv_write, rotary_table
from cutp.ops.skinny_gemm_cuda import skinny_gemm
from tests.ops.kernel_results import assert_same_bits, bfloat16, float32, gpu_only

BATCH, DIM, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, PAGE, CONTEXT = 5, 512, 8, 2, 64, 768, 1000, 16, 100
PAGES = BATCH * -(-CONTEXT // PAGE)


class Step:
    """One layer's kernels on static buffers, as a decoding step uses them, and a prefill of the same queries."""

    def __init__(self, device):
        rng = np.random.default_rng(0)

        def random(*shape, dtype=bfloat16):
            return device.array((rng.standard_normal(shape) / 4).astype(np.float32).astype(dtype))

        def out(*shape, dtype=bfloat16):
            return device.poisoned(shape, dtype)

        self.tokens = device.array(rng.integers(0, VOCAB, BATCH))
        self.table, self.norm_weight = random(VOCAB, DIM), random(DIM)
        self.qkv_weight = random((HEADS + 2 * KV_HEADS) * HEAD_DIM, DIM)
        self.o_weight, self.gate_up_weight = random(DIM, HEADS * HEAD_DIM), random(2 * FFN, DIM)
        self.down_weight, self.head_weight = random(DIM, FFN), random(VOCAB, DIM)
        self.pages = random(PAGES, 2, KV_HEADS, PAGE, HEAD_DIM)
        self.lookup_table = device.array(rng.permutation(PAGES).reshape(BATCH, -1).astype(np.int32))
        self.lengths = device.array(np.array([1, 17, 64, 99, 100], np.int32))
        self.inv_freq = device.array((10000.0 ** -np.linspace(0, 1, HEAD_DIM // 2)).astype(np.float32))
        shapes = decode_workspace(BATCH, CONTEXT, HEADS, KV_HEADS, HEAD_DIM)
        self.plan = device.array(np.zeros(shapes.plan, np.int32))
        self.partials = out(*shapes.partials, dtype=float32)
        self.counters = device.array(np.zeros(shapes.counters, np.uint32))
        self.positions, self.slots = (device.array(np.zeros(BATCH, np.int64)) for _ in range(2))
        self.offsets = device.array(np.arange(BATCH + 1, dtype=np.int32))
        self.cached = device.array(np.zeros(BATCH, np.int32))
        self.work = device.array(prefill_work_list([1] * BATCH, [CONTEXT - 1] * BATCH, HEADS // KV_HEADS))
        self.h, self.x, self.attended_norm, self.residual = (out(BATCH, DIM) for _ in range(4))
        self.cos, self.sin = (out(BATCH, HEAD_DIM // 2, dtype=float32) for _ in range(2))
        self.qkv = out(BATCH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.q, self.decoded, self.prefilled = (out(BATCH, HEADS, HEAD_DIM) for _ in range(3))
        self.o, self.down, self.after = (out(BATCH, DIM) for _ in range(3))
        self.gate_up, self.activated = out(BATCH, 2 * FFN), out(BATCH, FFN)
        self.logits, self.finished = out(BATCH, VOCAB), out(BATCH, VOCAB, dtype=float32)
        self.set_lengths(device, [1, 17, 64, 99, 100])

    def set_lengths(self, device, lengths):
        """The next step's lengths, written into the static buffers."""
        table = device.numpy(self.lookup_table)
        last = np.array(lengths) - 1
        self.lengths[...] = device.array(np.array(lengths, np.int32))
        self.cached[...] = device.array(last.astype(np.int32))
        self.positions[...] = device.array(last.astype(np.int64))
        self.slots[...] = device.array(table[np.arange(BATCH), last // PAGE] * np.int64(PAGE) + last % PAGE)

    def run(self):
        embedding(self.tokens, self.table, 0, out=self.h)
        rms_norm(self.h, self.norm_weight, 1e-5, out=self.x)
        skinny_gemm(self.x, self.qkv_weight, out=self.qkv)
        rotary_table(self.positions, self.inv_freq, 1.0, bfloat16, cos_out=self.cos, sin_out=self.sin)
        rotary_kv_write(self.qkv, self.cos, self.sin, self.slots, self.pages, q_out=self.q)
        decode_plan(self.lengths, KV_HEADS, plan=self.plan)
        decode_attention(self.q, self.pages, self.lookup_table, self.lengths, self.plan, HEAD_DIM**-0.5,
                         partials=self.partials, counters=self.counters, blocks=64, out=self.decoded)
        prefill_attention(self.q, self.pages, self.lookup_table, self.offsets, self.cached, self.work, HEAD_DIM**-0.5,
                          out=self.prefilled)
        skinny_gemm(self.decoded.reshape(BATCH, -1), self.o_weight, out=self.o)
        add_rms_norm(self.o, self.h, self.norm_weight, 1e-5, residual_out=self.residual, out=self.attended_norm)
        skinny_gemm(self.attended_norm, self.gate_up_weight, out=self.gate_up)
        gated_activation(self.gate_up, "silu", out=self.activated)
        skinny_gemm(self.activated, self.down_weight, out=self.down)
        residual_add(self.residual, self.down, out=self.after)
        skinny_gemm(self.after, self.head_weight, out=self.logits)
        finish_logits(self.logits, 1.0, 30.0, out=self.finished)

    def results(self, device):
        names = ("decoded", "prefilled", "after", "finished")
        return {name: device.numpy(getattr(self, name)).copy() for name in names}


STEPS = [[1, 17, 64, 99, 100], [2, 18, 65, 100, 1], [100, 100, 100, 100, 100]]


@gpu_only
def test_replay_equals_eager(device):
    from cutp.array.graph import Stream, capture

    stream = Stream()
    eager, replayed = Step(device), Step(device)
    with stream:
        replayed.run()
    stream.synchronize()
    replayed = Step(device)  # the first run only loaded the kernels
    with capture(stream) as graph:
        replayed.run()
    for lengths in STEPS:
        for step in (eager, replayed):
            step.set_lengths(device, lengths)
        with stream:
            eager.run()
        graph.launch()
        stream.synchronize()
        expected, got = eager.results(device), replayed.results(device)
        for name, values in expected.items():
            assert not np.isnan(values.astype(np.float32)).any(), name
            assert_same_bits(got[name], values)
    graph.close()


def test_decode_and_prefill_agree(device):
    """Two kernels, one answer: both give a decoding step's attention, to bfloat16 rounding."""
    step = Step(device)
    step.run()
    got = step.results(device)
    decoded, prefilled = (got[name].astype(np.float32) for name in ("decoded", "prefilled"))
    assert np.linalg.norm(decoded - prefilled) <= 4e-3 * np.linalg.norm(prefilled)
    assert np.isfinite(got["finished"]).all()


@pytest.mark.parametrize("row", (0, 3))
def test_a_row_does_not_depend_on_its_batch(device, row):
    """Bit for bit, through a whole layer: other rows' tokens and lengths change, this one's stay."""
    first, second = Step(device), Step(device)
    tokens = np.random.default_rng(9).integers(0, VOCAB, BATCH)
    tokens[row] = device.numpy(first.tokens)[row]
    second.tokens[...] = device.array(tokens)
    lengths = [50, 3, 88, 16, 70]
    lengths[row] = STEPS[0][row]
    second.set_lengths(device, lengths)
    for step in (first, second):
        step.run()
    for name, values in first.results(device).items():
        assert_same_bits(second.results(device)[name][row], values[row])
