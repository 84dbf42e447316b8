"""`cutp info`: true sizes, without MPI."""

import json
import subprocess
import sys

import pytest

from cutp import LLM, run_threads
from tests.cli.conftest import TALES
from tests.mpirun import clean_environment

CASES = ["mha", "gqa", "gqa_6_heads_2_kv", "mqa", "tied", "biases", "head_dim", "odd_vocab", "odd_ffn",
         "deepseek_v3_released", "deepseek_v3_biases"]


def test_text(cli):
    done = cli("info", "--tp", "3")
    assert (done.code, done.err) == (0, "")
    for part in (TALES, "LlamaForCausalLM", "4,983,040", "bfloat16", "8 query, 4 key-value, 64 wide", "1024 tokens",
                 "tp=3", "1 to 8"):
        assert str(part) in done.out
    assert cli("info", TALES, "--tp", "3").out == done.out


def test_json(cli):
    [facts] = cli("info", "--json").json
    assert {"architecture": "LlamaForCausalLM", "parameters": 4983040, "dtype": "bfloat16", "layers": 4, "tp": 1,
            "weight_bytes_per_rank": [2 * 4983040], "kv_bytes_per_token_per_rank": [4 * 2 * 4 * 64 * 2],
            "valid_tp": list(range(1, 9)), "tied_embeddings": True, "context_length": 1024}.items() <= facts.items()


@pytest.mark.parametrize("tp", [1, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_sizes_are_what_loading_takes(cli, tiny, case, tp):
    [facts] = cli("info", tiny(case), "--tp", tp, "--json").json

    def sizes(comm):
        with LLM(tiny(case), comm=comm) as llm:
            weights = [weight for _, weight in llm.model.named_weights()]
            cache = llm._work.core.runner.cache
            tokens = cache.num_pages * cache.params.page_size
            return (sum(weight.data.nbytes for weight in weights), sum(weight.local_bytes for weight in weights),
                    sum(block.nbytes for block in cache.blocks) / tokens)

    allocated, planned, cached = zip(*run_threads(tp, sizes), strict=True)
    assert facts["weight_bytes_per_rank"] == list(planned) == list(allocated)
    assert facts["kv_bytes_per_token_per_rank"] == list(cached)
    [whole] = cli("info", tiny(case), "--json").json
    assert sum(facts["weight_bytes_per_rank"]) >= whole["weight_bytes_per_rank"][0] == 4 * whole["parameters"]
    assert sum(facts["kv_bytes_per_token_per_rank"]) >= whole["kv_bytes_per_token_per_rank"][0]


def test_valid_sizes_are_those_that_load(cli, tiny):
    [facts] = cli("info", tiny("gqa_6_heads_2_kv"), "--json").json
    assert facts["valid_tp"] == [1, 2, 3, 4, 5, 6]
    assert cli("info", tiny("gqa_6_heads_2_kv"), "--tp", "6").code == 0
    cli("info", tiny("gqa_6_heads_2_kv"), "--tp", "7").assert_error(2, "7", "sizes 1 to 6 work")


def test_latent_cache(cli, tiny):
    done = cli("info", tiny("deepseek_v3_one_group"), "--tp", "3")
    for part in ("DeepseekV3ForCausalLM", "3, which share a cached latent of 22 values a token", "264 bytes", "1 to 3"):
        assert part in done.out
    [facts] = cli("info", tiny("deepseek_v3_one_group"), "--json").json
    assert (facts["latent_dim"], facts["kv_bytes_per_token_per_rank"]) == (22, [264])
    assert cli("info", TALES, "--json").json[0]["latent_dim"] is None


@pytest.mark.parametrize("tp", ["0", "-1", "two"])
def test_bad_tp(cli, tp):
    cli("info", f"--tp={tp}").assert_error(2, "--tp", tp)


@pytest.mark.parametrize("hide", ["None", "types.ModuleType('mpi4py')"])
def test_needs_no_mpi(hide, tmp_path):
    """Neither without mpi4py nor with one whose MPI library is missing, even in a shell that a launcher started."""
    code = (f"import sys, types; sys.modules['mpi4py'] = {hide}\nfrom cutp.cli.main import main\n"
            "try:\n    main(['info', '--tp', '3', '--json'])\nfinally:\n"
            "    assert 'mpi4py.MPI' not in sys.modules and 'cupy' not in sys.modules")
    for env in ({}, {"PMI_SIZE": "2", "PMI_RANK": "0"}):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                              env=clean_environment(env), stdin=subprocess.DEVNULL, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["tp"] == 3
