"""Scoring holds a bounded part of the logits, whatever the length of the text and the vocabulary."""

import json
import subprocess
import sys

import pytest

from tests.mpirun import CHECKOUT, clean_environment

# Blocks of 64 MB of logits or of attention scores, with temporaries. All logits of the text would take 1.5 GB, and
# those of one pass of 512 tokens, with their exponentials in float64, 0.8 GB.
BOUND = 400e6


@pytest.mark.skipif(sys.platform != "linux", reason="the script reads /proc")
def test_a_text_of_3000_tokens_with_a_vocabulary_of_128256():
    script = CHECKOUT / "tests" / "cli" / "scoring_memory.py"
    done = subprocess.run([sys.executable, script, "--tokens", "3000", "--vocab", "128256"], capture_output=True,
                          text=True, timeout=200, env=clean_environment(), stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert 0 < measured["added_bytes"] < BOUND, measured
