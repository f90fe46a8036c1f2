"""Claim: what compiling costs does not grow with a model's depth, but with its distinct blocks.

Prints the programs compiled, and the seconds that took, for quantizing models of 2, 8 and 32 equal blocks and Gemma 3's
alternating ones. Each runs in a process of its own, so that nothing is compiled already.
"""

import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from tyro.conf import Positional

from gptq_fn import ModelSpec, QuantConfig, quantize, spec_from_config
from gptq_fn.check import roles_of

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512}
MODELS = {
    "llama-2": {"model_type": "llama", "num_hidden_layers": 2},
    "llama-8": {"model_type": "llama", "num_hidden_layers": 8},
    "llama-32": {"model_type": "llama", "num_hidden_layers": 32},
    "gemma3-26": {"model_type": "gemma3_text", "num_hidden_layers": 26, "head_dim": 32, "sliding_window": 32},
}


def random_params(spec: ModelSpec, width: int, hidden: int, vocabulary: int) -> dict:
    """Parameters of the shapes that the spec asks for."""
    keys = iter(jax.random.split(jax.random.key(0), 9 * len(spec.blocks) + 9))

    def weight(*shape: int) -> dict:
        return {"weight": jax.random.normal(next(keys), shape) * shape[-1] ** -0.5}

    def of_block(block) -> dict:
        linears = {role: weight(out, inputs) for role, (_, out, inputs) in roles_of(block, width, hidden, 0).items()}
        return linears | {slot: {"weight": jnp.ones(block.attn.norms.get(slot, (1, width))[1])} for slot, _ in block.norms}

    top = {"embed": weight(vocabulary, width), "final_norm": {"weight": jnp.ones(width)}, "head": weight(vocabulary, width)}
    return {"top": top, "blocks": [of_block(block) for block in spec.blocks]}


def run(name: str) -> None:
    counts: Counter[str] = Counter()
    seconds: dict[str, float] = defaultdict(float)

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        counts[event] += 1
        seconds[event] += duration_secs

    spec = spec_from_config({**SMALL, **MODELS[name]})
    params = random_params(spec, SMALL["hidden_size"], SMALL["intermediate_size"], SMALL["vocab_size"])
    calib = jax.random.randint(jax.random.key(1), (8, 64), 0, SMALL["vocab_size"])
    jax.monitoring.register_event_duration_secs_listener(listen)
    began = time.perf_counter()
    quantize(params, spec, calib, QuantConfig(4, 128))
    event = "/jax/core/compile/backend_compile_duration"
    whole = time.perf_counter() - began
    print(f"{name:10} {len(set(spec.blocks))} distinct of {len(spec.blocks):2} blocks: {counts[event]:3} programs", end="")
    print(f" compiled in {seconds[event]:5.1f} s, of {whole:5.1f} s")


@dataclass(frozen=True)
class Options:
    names: Annotated[tuple[str, ...], Positional] = tuple(MODELS)


if __name__ == "__main__":
    names = tyro.cli(Options, description=__doc__).names
    if len(names) == 1:
        run(names[0])
    for name in names if len(names) > 1 else ():
        subprocess.run([sys.executable, __file__, name], check=True)
