"""The gptq-fn command."""

import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import Annotated, NoReturn

import tyro
from rich.table import Table
from tyro.conf import Positional, arg

from gptq_fn import __version__
from gptq_fn_interop.cli_cuda import build, listed
from gptq_fn_interop.cli_eval import evaluate
from gptq_fn_interop.cli_kernels import kernels
from gptq_fn_interop.cli_quantize import Engine, quantize, say
from gptq_fn_interop.cli_report import report
from gptq_fn_interop.cli_sweep import sweep
from gptq_fn_interop.compile_cache import keep_programs
from gptq_fn_interop.console import insisting, out, problems


def inspect(model: Annotated[Positional[str], arg(metavar="MODEL")], engine: Annotated[Engine | None, arg(name="for")] = None) -> None:
    """Tell what a quantized checkpoint holds and which engines would load it.

    Args:
        model: A directory with a quantized checkpoint, or the name of one on the hub.
        engine: Tell of this engine alone, with every reason, and exit with status 1 if it does not load the checkpoint.
    """
    from gptq_fn_interop import inspection
    from gptq_fn_interop.engines import ENGINES, caution, refusals
    from gptq_fn_interop.hub import local

    found = inspection.inspect(local(model))
    if engine:
        return say(engine, found, model)
    for scheme, count in found.schemes().most_common():
        out.print(f"{count} linears: {scheme}", highlight=False)
    size = sum(x.bytes for x in found.linears)
    out.print(f"{size / 1e6:.1f} MB quantized, {found.other_bytes / 1e6:.1f} MB of other tensors", highlight=False)
    out.print(f"zero points: {', '.join(sorted({x.zeros for x in found.linears}))}", highlight=False)
    table = Table("engine", "loads it", "why not, or what to know")
    for name in ENGINES:
        reasons = refusals(name, found)
        more = f"; and {len(reasons) - 1} more, told by --for {name}" if len(reasons) > 1 else ""
        table.add_row(name, "no" if reasons else "yes", f"{reasons[0]}{more}" if reasons else caution(name, found) or "")
    out.print(table)


COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "eval": evaluate,
    "report": report,
    "inspect": inspect,
    "kernels": kernels,
    "kernels-build": build,
    "kernels-list": listed,
    "sweep": sweep,
}


ABOUT = "GPTQ quantization of language models. Options of a command: gptq-fn quantize --help. The version: gptq-fn --version."


def joined(args: Sequence[str]) -> list[str]:
    """The arguments with a command of two words as one: `kernels build` is a command beside `kernels DIRECTORY`."""
    command = "-".join(args[:2])
    return [command, *args[2:]] if command in COMMANDS else list(args)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; errors are one sentence and exit status 1."""
    args = joined(sys.argv[1:] if args is None else args)
    if args == ["--version"]:
        return out.print(f"gptq-fn {__version__}", highlight=False)
    keep_programs()
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show is no reason to lose a result
    try:
        with insisting():
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="gptq-fn", description=ABOUT, args=args)
    except (ValueError, OSError) as error:
        _fail(f"gptq-fn: {_told(error)}", error, 1)
    except ModuleNotFoundError as error:
        _fail(f"gptq-fn: this needs {error.name}, which is not installed: pip install 'gptq-fn[all]'.", error, 1)
    except KeyboardInterrupt as error:
        _fail("gptq-fn: interrupted.", error, 130)


def _told(error: ValueError | OSError) -> str:
    """The error in words: of one that the system raised, what it is about and what the system calls it."""
    if isinstance(error, OSError) and error.errno and error.strerror:
        about = " and ".join(str(path) for path in (error.filename, error.filename2) if path is not None)
        return f"{about}: {error.strerror}." if about else f"{error.strerror}."
    return str(error)


def _fail(said: str, error: BaseException, status: int) -> NoReturn:
    """Tell what went wrong, and what was noted on the way, and exit."""
    problems.print(" ".join([said, *getattr(error, "__notes__", ())]), style="red", highlight=False)
    sys.exit(status)


if __name__ == "__main__":
    main()
