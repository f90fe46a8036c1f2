"""What report.json tells of a run as a whole: of which model, with which data and versions, in what time."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptq_fn import Report, Samples
from gptq_fn_interop.shards import write_json

REPORT = "report.json"

SCHEMA = 1
"""The number of the layout. Fields may be added without another one; files from before it was written have none."""

LIBRARIES = ("gptq-fn", "jax", "jaxlib", "numpy")


@dataclass(frozen=True)
class Origin:
    """What only the caller of a run knows, for the report to tell: names and numbers, never text of the data."""

    model: str | None = None
    """The name of the float model."""
    data: str | None = None
    """The name of the calibration data."""
    seed: int | None = None
    """What chose the samples."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that the configuration does not tell, as JSON has them."""


def write_report(directory: Path, report: Report, run: Mapping[str, Any]) -> None:
    """Write report.json; `run` is what `describe_run` returns."""
    write_json(directory / REPORT, {"schema": SCHEMA, **report.as_dict(), "run": run})


def describe_run(
    origin: Origin | None = None, *, calib: Samples | None = None, seconds: float | None = None, libraries: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The description of a run that took so many seconds with these tokens; `libraries` are those that it used beside our own."""
    origin, device = origin or Origin(), jax.devices()[0]
    lengths = [np.shape(sample)[0] for sample in calib] if calib is not None else []
    return {
        "model": origin.model,
        "calibration": {
            "data": origin.data,
            "seed": origin.seed,
            "samples": len(lengths) if lengths else None,
            "tokens": sum(lengths) if lengths else None,
        },
        "options": dict(origin.options),
        "versions": {"python": platform.python_version(), **_versions((*LIBRARIES, *libraries))},
        "device": " ".join(dict.fromkeys((device.platform, device.device_kind))),
        "devices": jax.device_count(),
        "seconds": seconds,
    }


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
