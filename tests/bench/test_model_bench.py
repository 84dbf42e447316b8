"""What `cutp bench` counts, held against counting by hand; and that its commands run."""

import json

import pytest

from cutp import LLM
from cutp.bench.model import Work, measure
from cutp.bench.shapes import SHAPES, shape_config, shape_directory
from cutp.cli.main import main
from cutp.errors import ConfigError


def test_a_dense_model():
    with LLM() as llm:
        work = Work.of(llm)
    # tales: width 256, 8 heads of 64 on 4 key-value heads, feed-forward 768, 4 layers, vocabulary 4096.
    layer = 256 * (8 + 2 * 4) * 64 + 8 * 64 * 256 + 3 * 256 * 768 + 2 * 256
    assert work.matrix_elements == 4 * layer + 256 and work.head_elements == 4096 * 256
    assert work.kv_bytes == 4 * 2 * 4 * 64 * 4 and work.expert_elements == 0
    assert work.decode_bytes(3, 100) == (work.matrix_elements + work.head_elements) * 4 + 300 * work.kv_bytes
    assert work.prefill_flop(1, 10) == (2 * work.matrix_elements * 10 + 4 * 4 * 8 * 64 * 10 * 11 / 2
                                        + 2 * work.head_elements)


@pytest.fixture
def mixture(tmp_path):
    config = shape_config("mixtral-8x7b", 1) | {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 128,
                                                "num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_experts_count_as_far_as_they_are_met(mixture):
    with LLM(mixture, random_weights=True, max_len=64) as llm:
        work = Work.of(llm)
    assert work.expert_elements == 8 * 3 * 64 * 32 and work.expert_share == 2 / 8
    whole = work.matrix_elements + work.head_elements
    assert work.decode_bytes(1, 0) == (whole + work.expert_elements / 4) * work.itemsize
    assert work.decode_bytes(2, 0) == (whole + work.expert_elements * (1 - (3 / 4) ** 2)) * work.itemsize


def test_measured_runs_leave_nothing_behind():
    with LLM(max_batch_tokens=32) as llm:
        case = measure(llm, prompt_len=20, gen_len=4, batch=3, repeats=2)
        assert case["decode_tokens_per_s"] == pytest.approx(3 / case["decode_ms"] * 1e3)
        assert llm.memory()["cache_tokens_in_use"] == 0 and llm.stats()["running"] == 0


def test_shapes_are_models():
    for name in SHAPES:
        with shape_directory(name, 1) as directory, open(f"{directory}/config.json") as file:
            assert json.load(file)["num_hidden_layers"] == 1
    for name, layers in (("nonsense", None), ("llama-3.1-8b", 33)):
        with pytest.raises(ConfigError):
            shape_config(name, layers)


def run(capsys, *options):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--prompt-len", "16", "--gen-len", "3", "--repeats", "1", *options])
    return ended.value.code, capsys.readouterr()


def test_json(capsys, mixture):
    code, said = run(capsys, str(mixture), "--random-weights", "--batch", "1,2", "--json", "--device", "cpu")
    result = json.loads(said.out)
    assert code == 0 and [case["batch"] for case in result["cases"]] == [1, 2] and result["limits"] is None


def test_lines(capsys):
    code, said = run(capsys, "--batch", "2", "--device", "cpu")
    assert code == 0 and "batch 2    prompt 16" in said.out and "tok/s" in said.out


@pytest.mark.parametrize("options,message", [
    (["--shape", "llama"], "there is no shape 'llama'"), (["x", "--shape", "llama-3.1-8b"], "give one of them"),
    (["--layers", "2"], "--layers belongs to --shape"),
])
def test_bad_options(capsys, options, message):
    code, said = run(capsys, *options)
    assert code == 2 and message in said.err
