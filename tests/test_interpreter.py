"""Runs, in one process of their own, the tests that need Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FILES = {"test_attend.py": 12, "test_columns.py": 8, "test_packed.py": 1, "test_triton.py": 6}
"""And how many tests each has that need it."""


def test_under_the_interpreter() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "in_the_interpreter", "-p", "no:xdist", *(HERE / file for file in FILES)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-3000:]
    assert found.stdout.startswith("." * sum(FILES.values())), found.stdout
