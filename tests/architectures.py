"""Writes README's table of model types from what the round trips of tests/test_round_trip.py really did: `make table`."""

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


def table(done: dict[str, list[set[str]]]) -> str:
    """The rows, by model type; a step counts where every variant of the type made it."""
    lines = ["| model type | " + " | ".join(STEPS.values()) + " |", "|---" * (len(STEPS) + 1) + "|"]
    for kind in sorted(done, key=str.lower):
        lines.append(f"| {kind} | " + " | ".join("yes" if all(step in made for made in done[kind]) else "" for step in STEPS) + " |")
    return "\n".join(lines)


def main() -> int:
    recorder = Recorder()
    status = pytest.main(["-n", "auto", str(Path(__file__).with_name("test_round_trip.py"))], plugins=[recorder])
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table(recorder.done)}\n{END}{after}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
