"""Writes the table in docs/architectures.md from what tests/test_round_trip.py and tests/test_peft.py really did: `make table`.

`python tests/architectures.py -k llama` writes the rows of some.
"""

import sys
from collections import defaultdict
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
BEGIN, END = "<!-- architectures: written by `make table` -->", "<!-- end of architectures -->"
TESTS = [Path(__file__).with_name(name) for name in ("test_round_trip.py", "test_peft.py")]
STEPS = {
    "quantize": "quantize",
    "generate": "generate",
    "transformers": "loads in transformers",
    "lora": "LoRA",
    "adalora": "AdaLoRA",
    "adaption prompt": "Adaption Prompt",
}
"""What the tests record, and the heading of its column. Further engines get theirs with their tests."""


class Recorder:
    """Collects what each run of a test recorded, by model type and test; a run that failed counts for nothing."""

    def __init__(self) -> None:
        self.done: dict[str, dict[str, list[set[str]]]] = defaultdict(lambda: defaultdict(list))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        steps = dict(report.user_properties)
        if report.when == "call" and "kind" in steps:
            runs = self.done[str(steps.pop("kind"))][report.nodeid.partition("[")[0]]
            runs.append(set(map(str, steps)) if report.passed else set())


def row(kind: str, tests: dict[str, list[set[str]]]) -> str:
    """The row of a model type; a step counts where every run of a test made it, one for each variant of the type."""
    made = set().union(*(set.intersection(*runs) for runs in tests.values()))
    return f"| {kind} | " + " | ".join("yes" if step in made else "" for step in STEPS) + " |"


def main(options: list[str]) -> int:
    """Run the tests, those that pytest's `options` choose, and write their rows; the others stay as they are."""
    recorder = Recorder()
    status = pytest.main(["-n", "auto", "-m", "", *map(str, TESTS), *options], plugins=[recorder])
    before, rest = PAGE.read_text().split(BEGIN)
    old, after = rest.split(END)
    rows = {line.split("|")[1].strip(): line for line in old.splitlines()[3:]}
    rows |= {kind: row(kind, tests) for kind, tests in recorder.done.items()}
    head = ["| model type | " + " | ".join(STEPS.values()) + " |", "|---" * (len(STEPS) + 1) + "|"]
    lines = "\n".join([BEGIN, *head, *(rows[kind] for kind in sorted(rows, key=str.lower)), END])
    PAGE.write_text(f"{before}{lines}{after}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
