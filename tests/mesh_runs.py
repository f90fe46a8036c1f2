"""Runs on eight devices simulated on the CPU, each against the same run on one: prints how they differ.

A script, for the number of devices is chosen before JAX starts.
"""

import json
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("NPROC", "16")  # threads of XLA: where there are fewer than devices, these may wait for each other for ever

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import test_quantize
from test_experts import CONFIG
from test_experts import model as experts_model
from test_experts import random_params as experts_params
from test_quantize import PARALLEL, WIDTH, model, random_params

from gptq_fn import ON_HOST, QuantConfig, Quantized, QuantizedLinear, Rule, Runtime, data_mesh, embed_batches, preset, quantize

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

test_quantize.VOCAB = VOCAB = WIDTH  # the head has the shape of another linear, and its program
rng = np.random.default_rng(3)
MIXED = [rng.integers(0, VOCAB, length) for length in (9, 12, 10, 12, 11, 9, 10)]
ODD = rng.integers(0, VOCAB, (11, 16))


def mesh(devices: int) -> Any:
    return data_mesh(jax.devices()[:devices])


def difference(found: Quantized, wanted: Quantized) -> dict[str, Any]:
    """The largest relative change of an error, the share of codes that differ, and whether all else is the same."""
    leaves = [
        [leaf for block in (*q.params["blocks"], q.params["top"]) for leaf in block.values() if isinstance(leaf, QuantizedLinear)]
        for q in (found, wanted)
    ]
    codes = [np.concatenate([np.asarray(leaf.codes).reshape(-1) for leaf in mine]) for mine in leaves]
    reports = list(zip(found.report.linears, wanted.report.linears, strict=True))
    return {
        "codes": float((codes[0] != codes[1]).mean()),
        "error": max(abs(a.error / b.error - 1) for a, b in reports),
        "told": all((a.name, a.rows, a.dead, a.shape) == (b.name, b.rows, b.dead, b.shape) for a, b in reports),
    }


def dense() -> Iterator[dict[str, Any]]:
    """Samples of several lengths, an input that two groups of linears read, activations that wait on the host."""
    spec, config = model(PARALLEL, 1), QuantConfig(4, 16, sym=False, grid="minmax", rules=(Rule(r".*down$"),))
    params = random_params(spec)
    alone = quantize(params, spec, MIXED, config)
    yield difference(quantize(params, spec, MIXED, config, runtime=Runtime(mesh=mesh(8), store=ON_HOST)), alone)


def at_once() -> Iterator[dict[str, Any]]:
    """Not sequential, rows that the devices do not divide, and the head."""
    spec = model(PARALLEL, 1)
    base = QuantConfig(3, 16, order="act", grid="minmax", sequential=False)
    config = replace(base, rules=(Rule(r".*(down|up|qkv)$"), Rule("head", base)))
    params = random_params(spec)
    alone = quantize(params, spec, ODD, config)
    yield difference(quantize(params, spec, ODD, config, runtime=Runtime(mesh=mesh(3), tokens_per_call=32)), alone)


def refined() -> Iterator[dict[str, Any]]:
    """The float stream beside, an alpha that all devices choose together, products in both orders, and refinements."""
    spec = model(PARALLEL, 1)
    config = preset("best", bits=3, group_size=16, refine=("descent", "refit"), rules=(Rule(r".*(down|up)$"),))
    params = random_params(spec)
    alone = quantize(params, spec, MIXED, config)
    found = quantize(params, spec, MIXED, config, runtime=Runtime(mesh=mesh(4)))
    assert any(linear.alpha > 0 for linear in alone.report.linears)
    yield difference(found, alone)


def experts() -> Iterator[dict[str, Any]]:
    """Six experts on devices that divide them, and on others."""
    spec = experts_model()
    config = replace(CONFIG, rules=(Rule(r"blocks\.0\.(.|shared\..*|.*down)$"),))
    params = experts_params(spec)
    seen: list[list[Any]] = []

    def run(runtime: Runtime) -> Quantized:
        seen.append([])
        return quantize(
            params, spec, ODD, config, runtime=replace(runtime, observe=lambda names, h: seen[-1].append((names, np.asarray(h.xx))))
        )

    alone = run(Runtime())
    for devices in (3, 4):
        found = difference(run(Runtime(mesh=mesh(devices))), alone)
        hessians = zip(seen[-1], seen[0], strict=True)
        yield {**found, "hessians": max(float(abs(a - b).max() / abs(b).max()) if x == y else 9.0 for (x, a), (y, b) in hessians)}


def layout() -> Iterator[dict[str, Any]]:
    """How batches lie on eight devices."""
    spec = model(PARALLEL, 0)
    runtime = Runtime(mesh=mesh(8), tokens_per_call=24)
    batches = embed_batches(spec, random_params(spec)["top"], MIXED * 9, runtime)
    for batch in batches:
        yield {
            "samples": batch.samples,
            "kept": int(batch.keep.sum()),
            "shape": batch.x.shape,
            "parts": sorted({shard.data.shape for shard in batch.x.addressable_shards}),
            "devices": len({shard.device for shard in batch.keep.addressable_shards}),
        }


if __name__ == "__main__":
    print(json.dumps({run.__name__: list(run()) for run in (dense, at_once, refined, experts, layout)}))
