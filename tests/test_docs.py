"""What documents say runs: their Python as it is, their commands as far as the parser, their links."""

import functools
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
import tyro
from gptq_fn_interop.cli import COMMANDS, joined
from gptq_fn_interop.request import FIELDS
from tiny import save_tiny_llama

import gptq_fn
from gptq_fn import QuantConfig, interop

ROOT = Path(__file__).parent.parent
PAGES = [page for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if page.exists()]

NOT_RUN: dict[tuple[str, str], str] = {}
"""(page, first line) of Python blocks that are not run, and why."""


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """The line number and text of each fenced block in these languages."""
    for found in re.finditer(r"^( *)```(\S*)[^\n]*\n(.*?)^ *```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        if found[2] in languages:
            yield found.string.count("\n", 0, found.start(3)) + 1, found[3]


def programs(page: Path) -> str:
    """The Python of a page that is run, at its own line numbers."""
    lines: list[str] = []
    for number, text in blocks(page, "python"):
        if (str(page.relative_to(ROOT)), text.splitlines()[0]) not in NOT_RUN:
            lines += [""] * (number - 1 - len(lines)) + text.splitlines()
    return "\n".join(lines)


OWN_TESTS = ("docs/own_architecture.md",)
"""Pages with a test of their own."""


def test_the_python_of_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, since pages share what they compile. They find a small llama in path/to/model, quantized in path/to/quantized, and
    by the name of AutoGPTQ's files in path/to/old."""
    paths = tmp_path / "models/path/to"
    model = save_tiny_llama(paths / "model")
    calib = interop.tokens("pydoc", model, samples=8, length=64)
    interop.quantize_checkpoint(model, paths / "quantized", calib, QuantConfig())
    shutil.copytree(paths / "quantized", paths / "old")
    (paths / "old/model.safetensors").rename(paths / "old/gptq_model-4bit-128g.safetensors")
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        if programs(page) and name not in OWN_TESTS:
            here = tmp_path / name
            shutil.copytree(tmp_path / "models", here)
            monkeypatch.chdir(here)
            exec(compile(programs(page), name, "exec"), {})  # a traceback tells page and line


def test_what_is_not_run_is_there() -> None:
    assert {(page, line) for page, line in NOT_RUN if line not in (ROOT / page).read_text().splitlines()} == set()


def test_own_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "own_architecture.md"
    save_tiny_llama(tmp_path / "path/to/opt")  # for its tokenizer
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64}
    for old in (tmp_path / "path/to/opt").glob("*.safetensors"):
        old.unlink()
    model = transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=320, pad_token_id=0, **sizes))
    model.save_pretrained(tmp_path / "path/to/opt")
    monkeypatch.chdir(tmp_path)
    exec(compile(programs(page), str(page), "exec"), {})
    for written in ("opt-by-hand", "opt-traced"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / written)
        assert sum(type(m).__name__ == "QuantLinear" for m in loaded.modules()) == 12


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """The line number and arguments of each gptq-fn command in the shell blocks of a page."""
    for number, text in blocks(page, "", "sh", "bash", "console"):
        for line, command in enumerate(text.replace("\\\n", " ").splitlines(), number):
            if found := re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*gptq-fn (.*)", command.strip()):
                yield line, shlex.split(found[1], comments=True)


@pytest.mark.parametrize("page", [str(p.relative_to(ROOT)) for p in PAGES if any(commands(p))])
def test_the_commands_of_a_page_are_understood(page: str) -> None:
    called = []

    def only_parsed(name: str) -> object:
        return functools.wraps(COMMANDS[name])(lambda *args, **kwargs: called.append(name))

    parsers = {name: only_parsed(name) for name in COMMANDS}
    for line, args in commands(ROOT / page):
        try:
            tyro.extras.subcommand_cli_from_dict(parsers, prog="gptq-fn", args=joined(args))  # pyright: ignore[reportArgumentType]
        except SystemExit:
            pytest.fail(f"{page}:{line}: gptq-fn {shlex.join(args)}")
    assert called


def test_the_options_in_sentences_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = {}
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            tyro.extras.subcommand_cli_from_dict(dict(COMMANDS), prog="gptq-fn", args=[name, "--help"])
        options[name] = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    for page in PAGES:
        for said in re.findall(r"`gptq-fn (\w[^`]*)`", page.read_text()):
            command = joined(said.split())[0]
            assert set(re.findall(r"--[a-z][a-z-]+", said)) <= options[command], f"{page.name}: gptq-fn {said}"


def test_every_public_name_stands_in_the_reference() -> None:
    told = {name for page in ROOT.glob("docs/api/*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)}
    told = {name.replace("gptq_fn.check.check", "gptq_fn.check") for name in told}  # the function, not the module of its name
    doors = {"gptq_fn": gptq_fn.__all__, "gptq_fn.interop": interop.__all__, "gptq_fn.kernels": gptq_fn.kernels.__all__}
    names = {f"{door}.{name}" for door, listed in doors.items() for name in listed}
    assert {name for name in told if not name.startswith(("gptq_fn_interop.", "gptq_fn.testing"))} == names


def test_every_field_of_a_config_stands_in_the_page_on_transformers() -> None:
    page = (ROOT / "docs" / "transformers.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| `")] == [f"| `{name}` | {what} |" for name, what in FIELDS.items()]


def test_the_table_of_architectures_has_every_type() -> None:
    rows = re.findall(r"^\| (\S+) \| yes", (ROOT / "docs/architectures.md").read_text(), re.MULTILINE)
    assert set(rows) == set(gptq_fn.FAMILIES)
    assert all(f" {len(rows)} model types" in (ROOT / page).read_text() for page in ("README.md", "CHANGELOG.md"))


def test_every_option_stands_in_the_guide() -> None:
    table = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs/quantizing.md").read_text(), re.MULTILINE)
    assert {name for row in table for name in re.findall(r"`(\w+)`", row)} == set(QuantConfig.__dataclass_fields__)


def test_links_in_documents_lead_somewhere() -> None:
    for page in [*PAGES, *ROOT.glob("examples/*.md"), *ROOT.glob("kernels/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
