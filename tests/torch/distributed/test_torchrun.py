"""The torchrun example, launched as torchrun launches it."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[3] / "examples" / "torchrun_fsdp2.py"


def test_the_torchrun_example_skips_together_and_resumes_bit_for_bit():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(EXAMPLE)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # the two ranks write to one pipe: a line's end may come late
    lines = sorted(re.findall(r"rank \d: .*? resumed (?:True|False)", done.stdout))
    assert lines == [f"rank {rank}: skipped 1, scale 16384, resumed True" for rank in range(2)]
