"""The program that compute-sanitizer watches (launch/sanitize.sh), without it."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


def test_program_runs_and_launches_every_kernel():
    """In a process of its own: it imports tests by names that others have too, and counts what was launched."""
    done = subprocess.run([sys.executable, Path(__file__).with_name("sanitizer.py")], capture_output=True, text=True,
                          env={**os.environ, "MOBA_WORKSPACE_MIB": "1"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
