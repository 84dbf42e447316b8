"""Generation settings of evaluation tasks: applied, or refused. Needs no harness."""

import subprocess
import sys

import pytest

from cutp import SamplingParams
from cutp.contrib.lm_eval_params import sampling_params
from cutp.errors import RequestError
from tests.mpirun import clean_environment


@pytest.mark.parametrize("settings,expected", [
    ({}, {"max_tokens": 256, "temperature": 0.0, "stop": ("</s>",)}),
    ({"until": "\n"}, {"stop": ("\n", "</s>")}),
    ({"until": ["\n", "", "</s>", "\n", "Q:"]}, {"stop": ("\n", "</s>", "Q:")}),
    ({"max_new_tokens": 7, "max_gen_toks": 5, "max_tokens": 9}, {"max_tokens": 5}),
    ({"max_completion_tokens": 4}, {"max_tokens": 4}),
    ({"temperature": 0.7}, {"temperature": 0.7}),
    ({"temperature": 0.7, "do_sample": False}, {"temperature": 0.0}),
    ({"temperature": 0.7, "do_sample": True, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": 3},
     {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": 3}),
    ({"temperature": 0, "do_sample": None, "top_p": None}, {"temperature": 0, "top_p": None}),
    ({"min_new_tokens": 3, "repetition_penalty": 1.2}, {"min_tokens": 3, "repetition_penalty": 1.2}),
    ({"num_beams": 1, "use_cache": True, "length_penalty": 1.0}, {}),
])
def test_applied(settings, expected):
    params = sampling_params(settings, 256, 11, "</s>")
    base = {"max_tokens": 256, "temperature": 0.0, "stop": ("</s>",), "seed": 11}
    assert params == SamplingParams(**(base | expected))
    params.check()


@pytest.mark.parametrize("settings,message", [
    ({"num_beams": 4}, "num_beams=4 is not supported"), ({"max_length": 100}, "max_length=100"),
    ({"typical_p": 0.9}, "typical_p"), ({"do_sample": True}, "the temperature is 0"),
    ({"do_sample": True, "temperature": 0.0}, "the temperature is 0"), ({"until": 5}, "until must be"),
    ({"until": ["a", None]}, "until must be"), ({"penalty_alpha": 0.6}, "penalty_alpha"),
])
def test_refused(settings, message):
    with pytest.raises(RequestError, match=message):
        sampling_params(settings, 256, 0, "</s>")


def test_settings_are_left_as_they_are():
    settings = {"until": ["\n"], "max_gen_toks": 3}
    sampling_params(settings, 256, 0, "</s>")
    assert settings == {"until": ["\n"], "max_gen_toks": 3}


def test_the_package_needs_no_harness():
    code = ("import sys; sys.modules['lm_eval'] = None\nimport cutp.contrib, cutp.contrib.lm_eval_params\n"
            "try:\n    import cutp.contrib.lm_eval\nexcept ImportError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
                          env=clean_environment(), stdin=subprocess.DEVNULL)
    assert done.stdout == "cutp.contrib.lm_eval needs the evaluation harness: pip install lm-eval\n"
    assert done.stderr == ""
