"""How fast a model runs: prefill and decoding through the engine, held against this GPU's limits of the same run."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from cutp.engine.core import EngineCore
from cutp.engine.llm import LLM
from cutp.engine.request import Request
from cutp.engine.sampling_params import SamplingParams
from cutp.errors import RequestError
from cutp.nn.moe import MoE

_GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, ignore_eos=True, min_tokens=0,
                         repetition_penalty=1.0)


@dataclass(frozen=True)
class Work:
    """What one rank must move and compute at least.

    matrix_elements: of the matrices that every token meets, the head and experts left out. head_elements: of the output
    head. expert_elements: of all experts, of which a token meets `expert_share`. itemsize: bytes of a weight. kv_bytes:
    of one cached token. The embedding's rows are not counted.
    """

    matrix_elements: int
    head_elements: int
    expert_elements: int
    expert_share: float
    itemsize: int
    kv_bytes: int
    heads: int
    head_dim: float
    layers: int

    @classmethod
    def of(cls, llm: LLM) -> Work:
        model = llm.model
        elements = {name: int(np.prod(weight.local_shape)) for name, weight in model.named_weights()}
        table, head = model.embed_tokens.shards[0].weight, model.lm_head.shards[0].weight
        experts = sum(count for name, count in elements.items() if ".experts." in name)
        mixtures = [module for module in model.modules() if isinstance(module, MoE)]
        attention = model.layers[0].self_attn.shards[0]
        head_elements, table_elements = (int(np.prod(weight.local_shape)) for weight in (head, table))
        read = sum(elements.values()) - (0 if head is table else table_elements)
        return cls(
            matrix_elements=read - head_elements - experts, head_elements=head_elements, expert_elements=experts,
            expert_share=mixtures[0].gate.top_k / mixtures[0].routed.num_experts if mixtures else 0.0,
            itemsize=table.dtype.itemsize,
            kv_bytes=model.kv_params.bytes_per_token(llm.tp, llm.comm.rank % llm.tp),
            heads=attention.n_heads, layers=len(model.layers),
            # Of latent attention in its expanded form: scores over one width, values of another.
            head_dim=(attention.qk_head_dim + attention.v_head_dim) / 2 if hasattr(attention, "v_head_dim")
            else attention.head_dim)

    def prefill_flop(self, prompts: int, length: int) -> float:
        """FLOP of `prompts` prompts of `length` tokens: matrices, causal attention, one row of logits each."""
        tokens = prompts * length
        attention = 4.0 * self.layers * self.heads * self.head_dim * prompts * length * (length + 1) / 2
        matrices = self.matrix_elements + self.expert_elements * self.expert_share
        return 2.0 * matrices * tokens + attention + 2.0 * self.head_elements * prompts

    def decode_bytes(self, batch: int, context: float) -> float:
        """Bytes that one step of `batch` requests with `context` cached tokens reads; of the experts, those that are
        expected to be met when every token draws its own at random."""
        met = 1.0 - (1.0 - self.expert_share) ** batch
        weights = self.matrix_elements + self.head_elements + self.expert_elements * met
        return weights * self.itemsize + batch * context * self.kv_bytes


def limits(llm: LLM) -> dict[str, Any] | None:
    """What this rank's GPU reads and multiplies, measured now; None on the CPU."""
    if not llm.on_gpu:
        return None
    from cutp.array.cuda import device_info
    from cutp.bench.limits import Limits

    found = Limits()
    return {"gpu": device_info().name, "read_gbps": found.read_gbps, "matmul_tflops": found.matmul_tflops}


def measure(llm: LLM, prompt_len: int, gen_len: int, batch: int, repeats: int = 5) -> dict[str, Any]:
    """Runs `batch` random prompts `repeats` times, after one run that is not counted; collective.

    Medians over the runs: prefill_ms from the first step to the batch's last first token; decode_ms a step in which
    every request gets a token, everything the host does included.
    """
    work = Work.of(llm)
    prefills, decodes, waits = [], [], []
    for seed in range(repeats + 1):
        prefill, steps = _run(llm._work.core, llm.model.vocab_size, prompt_len, gen_len, batch, seed)
        if seed:
            prefills.append(prefill)
            decodes.append(statistics.median(steps))
            waits.append(max(steps))
    prefill, decode = statistics.median(prefills), statistics.median(decodes)
    return {
        "batch": batch, "prompt_len": prompt_len, "gen_len": gen_len, "tp": llm.tp,
        "prefill_ms": 1e3 * prefill, "prefill_tokens_per_s": batch * prompt_len / prefill,
        "prefill_tflops": work.prefill_flop(batch, prompt_len) / prefill / 1e12,
        "decode_ms": 1e3 * decode, "slowest_step_ms": 1e3 * max(waits), "decode_tokens_per_s": batch / decode,
        "decode_gbps": work.decode_bytes(batch, prompt_len + gen_len / 2) / decode / 1e9,
    }


def _run(core: EngineCore, vocab: int, prompt_len: int, gen_len: int, batch: int,
         seed: int) -> tuple[float, list[float]]:
    """Seconds of the prefill, and of each step in which all requests decode."""
    rng = np.random.default_rng(seed)
    # The first prompts go on generating while the last ones are still computed.
    ahead = -(-batch * prompt_len // core.scheduler.max_batch_tokens) + 1
    most = min(core.scheduler.max_len - prompt_len, ahead + gen_len)
    params = SamplingParams(**{**_GREEDY.to_dict(), "max_tokens": most})
    requests = [Request(index, index, None, rng.integers(0, vocab, prompt_len).tolist(), prompt_len + most, params,
                        share_prefix=False) for index in range(batch)]
    core.step()  # the step that the run before had started ahead, for requests that are no more
    for request in requests:
        core.add(request)
    begin = time.perf_counter()
    while not all(request.generated for request in requests):
        core.step()
    prefill = time.perf_counter() - begin
    steps = []
    while len(steps) < gen_len - 1 and all(request.finish_reason is None for request in requests):
        start = time.perf_counter()
        core.step()
        steps.append(time.perf_counter() - start)
    for request in requests:
        if request.finish_reason is None:
            core.cancel(request)
    if not steps:
        raise RequestError(f"{batch} prompts of {prompt_len} tokens never decode together",
                           hint="allow longer requests (--max-len), or measure a smaller batch")
    return prefill, steps
