"""The section on what was measured of the model's predictions, as gptq-fn eval --json writes it."""

from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import Element

from gptq_fn_interop.report.markup import tag
from gptq_fn_interop.report.parts import note, pairs, section, table
from gptq_fn_interop.report.read import Told
from gptq_fn_interop.report.words import figure, value_of

LABELS = {
    "tokens": "tokens predicted",
    "nll": "negative log likelihood, nats a token",
    "reference_nll": "the same of the reference",
    "change_error": "standard error of the difference",
    "kl": "KL from the reference, nats a token",
    "kl_99": "KL that 99% of tokens are below",
    "agreement": "top-1 agreement with the reference",
}
"""Names of what is measured, in words; others are shown as they are."""


def predictions(told: Told) -> Element:
    """Figures of text one by one, those of tasks in a table."""
    if not told.measured:
        return section("Predictions", note("Not measured: gptq-fn eval measures perplexity, KL against the float model, and tasks."))
    texts = [pairs(_figures(x)) for x in told.measured if "task" not in x]
    tasks = [
        (
            tag("span", value_of(x["task"])),
            tag("span", value_of(x.get("metric"))),
            *(_with_error(x, name) if name in x else "" for name in ("value", "reference", "change_value")),
        )
        for x in told.measured
        if "task" in x
    ]
    return section("Predictions", texts, table(("task", "metric", "value", "reference", "change"), tasks) if tasks else None)


def _figures(measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each figure with its standard error, where that has a name of its own."""
    errors = {error for name in measured if (error := f"{name}_error") in measured}
    return [
        (LABELS.get(name, name), _with_error(measured, name))
        for name, value in measured.items()
        if name not in errors and name != "model" and value is not None
    ]


def _with_error(measured: Mapping[str, Any], name: str) -> str:
    error = measured.get(f"{name.removesuffix('_value')}_error") if name != "value" else measured.get("error")
    return value_of(measured[name]) if error is None else f"{value_of(measured[name])} ± {figure(error)}"
