"""Scoring holds a bounded part of the logits, whatever the length of the text and the vocabulary."""

import json
import subprocess
import sys

import pytest

from tests.mpirun import CHECKOUT, clean_environment

# Measured: 237 MB, for blocks of 64 MB of logits or of attention scores, with temporaries. With all logits of one pass
# of 512 tokens it is 331 MB; those of the whole text would take 1.5 GB.
BOUND = 280e6


@pytest.mark.skipif(sys.platform != "linux", reason="the script reads /proc")
def test_a_text_of_3000_tokens_with_a_vocabulary_of_128256():
    script = CHECKOUT / "tests" / "cli" / "scoring_memory.py"
    done = subprocess.run([sys.executable, script, "--tokens", "3000", "--vocab", "128256"], capture_output=True,
                          text=True, timeout=200, env=clean_environment(), stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert 0 < measured["added_bytes"] < BOUND, measured
