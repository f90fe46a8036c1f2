"""Writes README's table of model types from what the round trips of tests/test_round_trip.py really did: `make table`.

`python tests/architectures.py -k llama` writes the rows of some.
"""

import sys
from collections import defaultdict
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- architectures: written by `make table` -->", "<!-- end of architectures -->"
STEPS = {"quantize": "quantize", "generate": "generate", "transformers": "loads in transformers"}
"""What a round trip records, and the heading of its column. PEFT and further engines get theirs with their tests."""


class Recorder:
    """Collects what each test recorded; a test that failed counts for nothing."""

    def __init__(self) -> None:
        self.done: dict[str, list[set[str]]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        steps = dict(report.user_properties)
        if report.when == "call" and "kind" in steps:
            self.done[str(steps.pop("kind"))].append(set(map(str, steps)) if report.passed else set())


def row(kind: str, made: list[set[str]]) -> str:
    """The row of a model type; a step counts where every variant of the type made it."""
    return f"| {kind} | " + " | ".join("yes" if all(step in one for one in made) else "" for step in STEPS) + " |"


def main(options: list[str]) -> int:
    """Run the round trips, those that pytest's `options` choose, and write their rows; the others stay as they are."""
    recorder = Recorder()
    status = pytest.main(["-n", "auto", str(Path(__file__).with_name("test_round_trip.py")), *options], plugins=[recorder])
    before, rest = README.read_text().split(BEGIN)
    old, after = rest.split(END)
    rows = {line.split("|")[1].strip(): line for line in old.splitlines()[3:]}
    rows |= {kind: row(kind, made) for kind, made in recorder.done.items()}
    head = ["| model type | " + " | ".join(STEPS.values()) + " |", "|---" * (len(STEPS) + 1) + "|"]
    lines = "\n".join([BEGIN, *head, *(rows[kind] for kind in sorted(rows, key=str.lower)), END])
    README.write_text(f"{before}{lines}{after}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
