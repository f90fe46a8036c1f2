"""Loading a 4-bit checkpoint and the float one that it was made from, each in a process of its own, in turns.

Claim: in transformers a quantized checkpoint loads in less memory than the float one, since packed words stay packed.
`load_gptq` unpacks codes to a byte each, and needs more. Prints medians: seconds from the call to the loaded model (imports
apart), and how far the peak of the resident memory rose over what the imports took. Pages of mapped files count as resident.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict

PROGRAMS = {
    "float, transformers": "from transformers import AutoModelForCausalLM\nload = AutoModelForCausalLM.from_pretrained",
    "4-bit, transformers with gptq_fn": (
        "import gptq_fn.interop\nfrom transformers import AutoModelForCausalLM\nload = AutoModelForCausalLM.from_pretrained"
    ),
    "4-bit, gptq_fn.load_gptq": "from gptq_fn.interop import load_gptq as load",
    "4-bit, GPTQModel": (
        "from gptqmodel import BACKEND, GPTQModel\n"
        "load = lambda directory: GPTQModel.load(directory, device='cpu', backend=BACKEND.GPTQ_TORCH)"
    ),
}

MEASURE = """
import json, resource, time
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
held = load({directory!r})
seconds = time.perf_counter() - began
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, (after - before) / 2**10]))
"""


def measured(python: str, program: str, directory: str) -> tuple[float, float]:
    """Seconds, and MiB that the peak rose by."""
    code = program + MEASURE.format(directory=directory)
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode:
        sys.exit(f"{python} failed: {done.stderr.strip().splitlines()[-1]}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("float", help="directory of the float checkpoint")
    parser.add_argument("quantized", help="directory of the quantized one")
    parser.add_argument("--gptqmodel-python", help="a Python that has gptqmodel, to measure its loader, too")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    names = [name for name in PROGRAMS if args.gptqmodel_python or "GPTQModel" not in name]
    found = defaultdict(list)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    for _ in range(args.runs):
        for name in names:
            python = args.gptqmodel_python if "GPTQModel" in name else sys.executable
            found[name].append(measured(python, PROGRAMS[name], args.float if name.startswith("float") else args.quantized))
    for name in names:
        seconds, mib = (statistics.median(column) for column in zip(*found[name], strict=True))
        low, high = min(x for x, _ in found[name]), max(x for x, _ in found[name])
        print(f"{name:34} {seconds:6.2f} s ({low:.2f} to {high:.2f})   peak + {mib:6.0f} MiB", flush=True)
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
