"""The page of a report: sound, closed to the network and to what names say, and with the numbers of report.json."""

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from gptq_fn_interop.cli import main
from gptq_fn_interop.report import draw_figures, read_report, write_page
from gptq_fn_interop.report.charts import SHADES, in_shades, linear_scale, log_scale
from gptq_fn_interop.report.run import Origin, describe_run
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_tiny_llama

from gptq_fn import stored_bits

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
ROLES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EVIL = 'model.layers.0.<script>alert("1")</script>&amp;\'onload="x"$\\frac{\u202e\ud800'


class Page(HTMLParser):
    """What a page holds; fails where it is not well formed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.values: list[float] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self.values.append(float(str(dict(attrs)["value"])))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
            if {"td", "th"} & {*self.open}:
                self.tables[-1][-1][-1] += data

    def all(self, *, of: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == of]


def linear(name: str, n: int = 1, **changes: Any) -> dict[str, Any]:
    sizes = {"bits": 4, "group_size": 32, "shape": [64, 96], "rows": 512, "dead": 0, "damp": 96 / 512}
    errors = {"error": 0.01 + n / 1000, "rtn_error": 0.02 + n / 900, "energy": 3.0 * n, "rounded": False}
    return {"name": name, **sizes, **errors, "alpha": 0.0, "restored": 0.0, "restored_held_out": None, **changes}


def written(directory: Path, linears: list[dict[str, Any]], **parts: Any) -> Path:
    directory.mkdir(exist_ok=True)
    config = {"bits": 4, "group_size": 32, "damp": None, "min_rows": 32, "alpha": 0.0, "rules": []}
    (directory / "report.json").write_text(json.dumps({"config": config, "linears": linears, **parts}))
    return directory


def page_of(directory: Path) -> Page:
    return Page(write_page(read_report(directory), directory / "report.html").read_text("utf-8"))


def table_with(page: Page, heading: str) -> list[list[str]]:
    (found,) = [table for table in page.tables if heading in table[0]]
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_key_value_heads": 4, "intermediate_size": 64}  # all weights of one shape: few programs to compile
    return save_tiny_llama(tmp_path_factory.mktemp("report") / "tiny", **sizes)


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    """Through the command, with its page."""
    destination = source.parent / "quantized"
    rules = ("--rule", ".*down_proj => bits=8,group_size=none", ".*layers[.]0[.].*q_proj => skip")
    options = ("--group-size", "32", "--preset", "fast", "--grid", "minmax", "--order", "natural", "--alpha", "0.5", "--report")
    options = (*options, "--samples", "4", "--length", "32")
    main(["quantize", str(source), str(destination), *options, *rules])
    return destination


def test_a_run_tells_of_itself(quantized: Path) -> None:
    report = json.loads((quantized / "report.json").read_text())
    run = report["run"]
    assert run["model"] == "tiny"
    assert run["calibration"] == {"data": "pydoc", "seed": 0, "samples": 4, "tokens": 128}
    assert run["options"] == {"preset": "fast"}
    assert {"python", "gptq-fn", "jax"} <= run["versions"].keys()
    assert run["seconds"] > 0
    assert str(quantized.parent) not in json.dumps(report)  # nor where anything lies


def test_what_nobody_knows_is_null() -> None:
    run = describe_run(Origin(data="of my own"), calib=[[1, 2, 3], [4, 5]])
    assert run["calibration"] == {"data": "of my own", "seed": None, "samples": 2, "tokens": 5}
    assert (run["model"], run["seconds"], describe_run()["calibration"]["tokens"]) == (None, None, None)


def test_the_page_of_a_run_tells_what_report_json_tells(quantized: Path) -> None:
    report = json.loads((quantized / "report.json").read_text())
    page = Page((quantized / "report.html").read_text("utf-8"))
    rows = table_with(page, "out x in")[1:]
    assert [row[0] for row in rows] == [x["name"] for x in report["linears"]]
    told = {error for x in report["linears"] for error in (x["error"], x["rtn_error"])}
    assert told == set(page.values)
    assert len(page.values) == 2 * len(rows) + 2 * min(len(rows), 12)
    bits = sum(stored_bits(tuple(x["shape"]), x["bits"], x["group_size"]) for x in report["linears"])
    weights = sum(math.prod(x["shape"]) for x in report["linears"])
    assert f"{bits / weights:.2f}" in page.text
    assert table_with(page, "bits a weight")[-1][-1] == f"{bits / weights:.3f}"
    energy = sum(x["energy"] for x in report["linears"])
    assert f"{100 * math.sqrt(sum(x['error'] ** 2 * x['energy'] for x in report['linears']) / energy):.2f} %" in page.text
    for words in (
        "tiny",
        "pydoc",
        "The asymmetric target",
        "down_proj",
        "bits 8, group_size a whole row",
        report["run"]["versions"]["jax"],
    ):
        assert words in page.text


def test_a_page_needs_no_network_and_runs_nothing(quantized: Path) -> None:
    text = (quantized / "report.html").read_text("utf-8")
    page = Page(text)
    assert "//" not in text
    assert not re.search(r"url\(|@import", text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "xlink:href")]
        assert str(attributes.get("href", "#")).startswith("#")
    (policy,) = [x["content"] for x in page.all(of="meta") if x.get("http-equiv")]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_no_calibration_text_is_in_a_report(quantized: Path) -> None:
    for name in ("report.json", "report.html"):
        assert "statement" not in (quantized / name).read_text("utf-8")  # a word of every page of the documentation


def test_charts_have_words_for_those_who_do_not_see_them(quantized: Path) -> None:
    page = Page((quantized / "report.html").read_text("utf-8"))
    charts = [x for x in page.all(of="svg") if x.get("role") == "img"]
    ids = {x["id"] for _, x in page.tags if "id" in x}
    assert len(charts) == len(ROLES)  # the target's has another reason to be: alpha was given, nothing was held out
    for chart in charts:
        assert {*str(chart["aria-labelledby"]).split()} <= ids
    assert all(x.get("aria-hidden") == "true" for x in page.all(of="svg") if x.get("role") != "img")
    used = {str(x["href"])[1:] for x in page.all(of="use")}
    assert used <= ids
    assert len([x for _, x in page.tags if "id" in x]) == len(ids)


@pytest.mark.parametrize(
    "name", [EVIL, "<b>", "", "model.layers.0.<img src=x onerror=alert(1)>", "a.999999999999999999999.b", "\x00\x1b[31m"]
)
def test_names_are_text_whatever_they_say(name: str, tmp_path: Path) -> None:
    others = [linear(f"model.layers.{i}.{role}", i + 1) for i in range(3) for role in ROLES]
    rules = [{"pattern": "<i>" + re.escape("<script>"), "config": None}]
    linears = [linear(name, 40, rounded=True, rows=3, dead=4), *others]
    directory = written(tmp_path / "<b>&", linears, left=[[name, "<script>"]], run={"model": name, "options": {name: name}})
    (directory / "report.json").write_text(
        json.dumps({**(told := json.loads((directory / "report.json").read_text())), "config": {**told["config"], "rules": rules}})
    )
    page = page_of(directory)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "i"}
    assert not [key for _, x in page.tags for key in x if key.startswith("on")]
    shown = name.encode("unicode_escape", "surrogatepass").decode()
    assert page.text.isprintable() or not set(page.text) - set("\n") & {c for c in page.text if not c.isprintable()}
    if name.isascii() and name.isprintable():
        assert name in page.text
    elif name == "\x00\x1b[31m":
        assert shown in page.text
    assert [path.name for path in draw_figures(read_report(directory), tmp_path / "figures")] == ["error_map.png", "error_over_depth.png"]


def experts(blocks: int, number: int) -> Iterator[dict[str, Any]]:
    for i in range(blocks):
        yield linear(f"model.layers.{i}.self_attn.q_proj", i + 1)
        for e in range(number):
            for n, role in enumerate(("gate", "up", "down")):
                few = {"rounded": True, "rows": e, "error": 0.0 if e == 0 else 0.5 + e / 1000} if e < 2 else {}
                yield linear(f"model.layers.{i}.mlp.experts.{e}.{role}_proj", 1 + e + n + i, **few)


def test_experts_are_told_by_role_and_block(tmp_path: Path) -> None:
    """Mean and worst, over those that tokens reached; each that fell back is counted."""
    linears = [*experts(3, 5)]
    page = page_of(written(tmp_path / "moe", linears))
    rows = {row[0]: row for row in table_with(page, "out x in")[1:]}
    assert len(rows) == 3 * 4
    for i in range(3):
        mine = [x for x in linears if re.fullmatch(rf"model\.layers\.{i}\.mlp\.experts\.\d+\.up_proj", x["name"])]
        reached = [x["error"] for x in mine if x["rows"]]
        row = rows[f"model.layers.{i}.mlp.experts.*.up_proj (5)"]
        assert row[3:5] == [f"{100 * sum(reached) / 4:.1f} %", f"{100 * max(reached):.1f} %"]
        assert row[6] == "0"
        assert row[-1] == "2"
        assert sum(reached) / 4 in [pytest.approx(value) for value in page.values]
    counted = {row[0]: row[1:] for row in table_with(page, "fewest tokens")[1:]}
    assert counted["mlp.experts.*.gate_proj"] == ["6 of 15", "0", "512", "512"]
    assert "18 rounded to nearest" in re.sub(r"rounded to nearest(\d+)of", r"\1 rounded to nearest of", page.text)


def test_pages_of_large_models_are_small(tmp_path: Path) -> None:
    deep = written(tmp_path / "deep", [linear(f"model.layers.{i}.{role}", i + 1) for i in range(80) for role in ROLES])
    wide = written(tmp_path / "wide", [*experts(48, 128)])
    assert len(table_with(page_of(deep), "out x in")) == 1 + 560
    assert len(table_with(page_of(wide), "out x in")) == 1 + 48 * 4
    for directory in (deep, wide):
        assert (directory / "report.html").stat().st_size < 600_000


def test_a_report_of_the_first_version_is_read(tmp_path: Path) -> None:
    """What it does not tell is unknown; neither energies nor fallbacks were written then."""
    kept = ("name", "bits", "group_size", "shape", "rows", "dead", "error", "rtn_error", "damp")
    linears = [{key: x[key] for key in kept} | {"seconds": 0.1} for x in (linear(f"h.{i}.attn.c_attn", i + 1) for i in range(3))]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/report.json").write_text(json.dumps({"config": {"bits": 4, "damp": 0.01}, "linears": linears}))
    page = page_of(tmp_path / "old")
    assert "mean of the linears" in page.text
    assert f"{100 * sum(x['error'] for x in linears) / 3:.2f} %" in page.text
    for name in ("data", "seed", "float model", "time", "versions"):
        assert re.search(rf"{name}unknown", page.text), name
    (tmp_path / "old/report.json").write_text(
        json.dumps({"linears": [{key: linears[0][key] for key in ("name", "bits", "shape", "error")}]})
    )
    assert "Whether damping had to be raised is unknown." in page_of(tmp_path / "old").text


def test_raised_damping_is_told_by_what_was_asked_for(tmp_path: Path) -> None:
    rules = [{"pattern": ".*up", "config": {"bits": 4, "damp": 0.3}}]
    names = {"model.layers.0.q": 96 / 512, "model.layers.1.q": 2 * 96 / 512, "model.layers.0.up": 0.3, "model.layers.1.up": 0.6}
    directory = written(tmp_path / "d", [linear(name, damp=damp) for name, damp in names.items()])
    told = json.loads((directory / "report.json").read_text())
    (directory / "report.json").write_text(json.dumps({**told, "config": {**told["config"], "rules": rules}}))
    assert [x.name for x in read_report(directory).linears if x.raised] == ["model.layers.1.q", "model.layers.1.up"]
    rows = table_with(page_of(directory), "needed")[1:]
    assert rows == [["model.layers.1.up", "0.3", "0.6"], ["model.layers.1.q", "0.1875", "0.375"]]


def test_what_was_measured_is_shown_with_its_errors(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {"model": "q", "data": "wikitext2", "perplexity": 12.25, "perplexity_error": 0.5, "kl": 0.0625, "kl_error": 0.001}
    tasks = [
        {"task": "arc_easy", "metric": "acc", "value": 0.5, "error": 0.01, "reference": 0.75, "change_value": -0.25, "change_error": 0.02}
    ]
    for name, content in (("text", text), ("tasks", tasks)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    main(["report", str(quantized), "--to", str(tmp_path / "r.html"), "--eval", str(tmp_path / "text.json"), str(tmp_path / "tasks.json")])
    assert "open it in a browser" in " ".join(capsys.readouterr().out.split())
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    for words in ("on wikitext2", "12.25 ± 0.5", "0.0625 ± 0.001"):
        assert words in page.text
    assert table_with(page, "metric")[1:] == [["arc_easy", "acc", "0.5 ± 0.01", "0.75", "-0.25 ± 0.02"]]
    beside = written(tmp_path / "beside", [linear("h.0.q")])
    (beside / "evaluation.json").write_text(json.dumps(text))
    assert "12.25 ± 0.5" in page_of(beside).text


@pytest.mark.parametrize(("form", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figures_are_drawn_in_three_forms_the_same_ones_each_time(form: str, start: bytes, tmp_path: Path) -> None:
    told = read_report(written(tmp_path / "d", [linear(f"h.{i}.{role}", i + 1, bits=3 + i) for i in range(2) for role in ("q", "k")]))
    once, again = ({path.name: path.read_bytes() for path in draw_figures(told, tmp_path / n, form)} for n in "ab")
    assert once == again
    assert list(once) == [f"{name}.{form}" for name in ("error_map", "error_over_depth", "bits_map")]
    assert all(content.startswith(start) for content in once.values())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "There is no report.json in "),
        ("{", "is damaged: it is not JSON"),
        (b"\xff\xfe", "is damaged: it is not JSON"),
        ("[" * 100_000, "is damaged: it is not JSON"),
        ("[]", "holds no list of linears"),
        ('{"linears": 3}', "holds no list of linears"),
        ('{"linears": [3]}', "is damaged"),
        ('{"linears": [{"name": "x", "bits": 4, "error": 0.1}]}', "is damaged: no 'shape'"),
        ('{"linears": [{"name": "x", "bits": 4, "error": "big", "shape": [1, 2]}]}', "is damaged: could not convert"),
        ('{"linears": [], "schema": 2}', "is of schema 2, this version of gptq-fn reads schema 1"),
        ('{"linears": [{"name": "x", "bits": 4, "error": 0.1, "shape": [1, 2]}], "config": {"rules": [{"pattern": "("}]}}', "is damaged"),
    ],
)
def test_what_is_no_report_is_refused_in_a_sentence(
    content: Any, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    assert stop.value.code == 1
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "report.html").exists()


def test_other_files_that_do_not_serve_are_refused(tmp_path: Path) -> None:
    directory = written(tmp_path / "d", [linear("lm_head")])
    with pytest.raises(FileNotFoundError, match="write one with gptq-fn eval --json"):
        read_report(directory, [tmp_path / "none.json"])
    (tmp_path / "odd.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no evaluation"):
        read_report(directory, [tmp_path / "odd.json"])
    with pytest.raises(ValueError, match="stands in a numbered block"):
        draw_figures(read_report(directory), tmp_path / "figures")
    assert "lm_head" in page_of(directory).text  # the page does without blocks
    with pytest.raises(IsADirectoryError, match="name the file to write, as "):
        write_page(read_report(directory), tmp_path)
    assert "0 linears" in page_of(written(tmp_path / "empty", [])).text


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=50))
def test_larger_errors_never_have_lighter_shades(values: list[float]) -> None:
    shade, edges = in_shades(values)
    shades = [shade(value) for value in sorted(values)]
    assert shades == sorted(shades)
    assert shades[0] >= 0
    assert shades[-1] == (SHADES - 1 if len(edges) > 1 else SHADES // 2)


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=50), st.booleans())
def test_scales_hold_all_values_and_have_ticks_inside(values: list[float], log: bool) -> None:
    scale = log_scale(values) if log else linear_scale(values)
    assert all(-1e-9 <= scale.at(value) <= 1 + 1e-9 for value in values)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 7
    assert all(-1e-6 <= scale.at(tick) <= 1 + 1e-6 for tick in ticks)
