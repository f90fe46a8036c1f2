"""The gptq-fn command."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import tyro
from rich.table import Table
from tyro.conf import Positional, arg

from gptq_fn import FAMILIES, __version__
from gptq_fn_interop.cli_kernels import kernels
from gptq_fn_interop.cli_quantize import Engine, quantize, say, torch_model
from gptq_fn_interop.cli_report import report
from gptq_fn_interop.cli_sweep import sweep
from gptq_fn_interop.compile_cache import keep_programs
from gptq_fn_interop.console import out, problems, progress


def _predictor(directory: Path) -> Any:
    """What predicts as the model in this directory does."""
    from gptq_fn_interop.checkpoint import Checkpoint
    from gptq_fn_interop.stream import load_gptq

    if Checkpoint(directory).config.get("model_type") in FAMILIES:
        return load_gptq(directory)
    import torch

    from gptq_fn_interop.tensors import to_jax

    model = torch_model(directory)

    @torch.no_grad()
    def predict(tokens: Any) -> Any:
        return to_jax(model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.float())

    return predict


def evaluate(
    model: Positional[str],
    data: str = "pydoc",
    reference: str | None = None,
    samples: int = 32,
    length: int = 512,
) -> None:
    """Measure perplexity on held-out text and, against a float model, the divergence of the predictions.

    Args:
        model: A directory with a float or quantized checkpoint, or the name of a model on the hub.
        data: Held-out text: a text file, "pydoc" (the half that calibration never sees), wikitext2, c4 or any hub dataset.
        reference: The float model, for KL(reference || model) per token and top-1 agreement.
        samples: Number of samples.
        length: Tokens of a sample.
    """
    from gptq_fn_interop import evaluation
    from gptq_fn_interop.calib import tokens
    from gptq_fn_interop.hub import local

    directory = local(model)
    other = None if reference is None else _predictor(local(reference))
    text = tokens(data, directory, samples=samples, length=length, split="evaluation", seed=None)
    with progress("Evaluating samples") as advance:
        found = evaluation.evaluate(_predictor(directory), text, other, progress=advance)
    table = Table("measure", "value", title=f"{model} on {found.tokens} tokens of {data}")
    table.add_row("perplexity", f"{found.perplexity:.3f}")
    table.add_row("negative log likelihood, nats a token", f"{found.nll:.4f}")
    if found.kl is not None:
        table.add_row("KL from the reference, nats a token", f"{found.kl:.4f} ± {found.kl_error:.4f}")
        table.add_row("top-1 agreement", f"{found.agreement:.1%}")
    out.print(table)


def inspect(model: Positional[str], engine: Annotated[Engine | None, arg(name="for")] = None) -> None:
    """Tell what a quantized checkpoint holds and which engines would load it.

    Args:
        model: A directory with a quantized checkpoint, or the name of one on the hub.
        engine: Tell of this engine alone, with every reason, and exit with status 1 if it does not load the checkpoint.
    """
    from gptq_fn_interop import inspection
    from gptq_fn_interop.engines import ENGINES, refusals
    from gptq_fn_interop.hub import local

    found = inspection.inspect(local(model))
    if engine:
        return say(engine, found, model)
    for scheme, count in found.schemes().most_common():
        out.print(f"{count} linears: {scheme}", highlight=False)
    size = sum(x.bytes for x in found.linears)
    out.print(f"{size / 1e6:.1f} MB quantized, {found.other_bytes / 1e6:.1f} MB of other tensors", highlight=False)
    out.print(f"zero points: {', '.join(sorted({x.zeros for x in found.linears}))}", highlight=False)
    table = Table("engine", "loads it", "why not")
    for name in ENGINES:
        reasons = refusals(name, found)
        more = f"; and {len(reasons) - 1} more, told by --for {name}" if len(reasons) > 1 else ""
        table.add_row(name, "no" if reasons else "yes", f"{reasons[0]}{more}" if reasons else "")
    out.print(table)


COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "eval": evaluate,
    "report": report,
    "inspect": inspect,
    "kernels": kernels,
    "sweep": sweep,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; errors are one sentence and exit status 1."""
    if list(sys.argv[1:] if args is None else args) == ["--version"]:
        return out.print(f"gptq-fn {__version__}", highlight=False)
    keep_programs()
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="gptq-fn", description="GPTQ quantization of language models.", args=args)
    except (ValueError, OSError) as error:
        _fail(f"gptq-fn: {error}", error, 1)
    except ModuleNotFoundError as error:
        _fail(f"gptq-fn: this needs {error.name}, which is not installed: pip install 'gptq-fn[all]'.", error, 1)
    except KeyboardInterrupt as error:
        _fail("gptq-fn: interrupted.", error, 130)


def _fail(said: str, error: BaseException, status: int) -> NoReturn:
    """Tell what went wrong, and what was noted on the way, and exit."""
    problems.print(" ".join([said, *getattr(error, "__notes__", ())]), style="red", highlight=False, markup=False)
    sys.exit(status)


if __name__ == "__main__":
    main()
