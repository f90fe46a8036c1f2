"""The pages of docs run as they are."""

import re
from pathlib import Path

import pytest
import transformers
from gptq_fn_interop.request import FIELDS
from tiny import save_tiny_llama

ROOT = Path(__file__).parent.parent


def programs(page: Path) -> str:
    """The Python of a page, at its own line numbers."""
    lines, inside, found = page.read_text().splitlines(), False, []
    for line in lines:
        fence = line.startswith("```")
        inside = line == "```python" if fence else inside
        found.append("" if fence or not inside else line)
    return "\n".join(found)


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


def test_every_field_of_a_config_stands_in_the_page_on_transformers() -> None:
    page = (ROOT / "docs" / "transformers.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| `")] == [f"| `{name}` | {what} |" for name, what in FIELDS.items()]


def test_links_in_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
