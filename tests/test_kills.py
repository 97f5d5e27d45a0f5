"""What is left when `pull`, `log` or `log --register` is killed in the middle, a few times each.

Many times, and `quantize` too: python benchmarks/kills.py. Run: pytest tests/test_kills.py
"""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "kills.py"


def test_kills_leave_nothing_half_made_and_the_next_runs_end():
    """In a process of its own: the script forks, which one with threads should not."""
    verbs = [word for verb in ("pull", "log", "register") for word in ("--only", verb)]
    command = [sys.executable, str(SCRIPT), *verbs, "--times", "2", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)

    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert re.findall(r"^(\w+): .* 0 faults", done.stdout, re.M) == ["pull", "log", "register"]
