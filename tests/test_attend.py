"""The Triton kernel of a step's attention is the plain step: in Triton's interpreter, compiled without a GPU, and on one."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_fn_kernels.jax import attention as by_kernel
from interpreter import interpreter
from jax.typing import DTypeLike
from test_families import built as built  # the fixture
from test_flax import rounded

from gptq_fn import QuantConfig, forward, generate, kernels
from gptq_fn.kernels import AttendByKernel, _attend
from gptq_fn.model.attention import Asked, Cache, _attended
from gptq_fn.spec import LinearScaling, RopeSpec

ROPE = RopeSpec(16)


@dataclass(frozen=True)
class Case:
    """Sizes of an attention, and what is special about it."""

    heads: int = 4
    kv_heads: int = 4
    dim: int = 16
    length: int = 40
    used: tuple[int, ...] = (9, 0, 39)
    rope: RopeSpec | None = ROPE
    window: int | None = None
    softcap: float | None = None
    bias: bool = False
    sinks: bool = False
    dtype: DTypeLike = jnp.float32

    def asked(self) -> Asked:
        """Random queries, keys and values; what is not used of the cache is not a number."""
        rng, batch = np.random.default_rng(0), len(self.used)

        def drawn(*shape: int) -> jax.Array:
            return jnp.asarray(rng.normal(size=shape), self.dtype)

        there = (np.arange(self.length) < np.asarray(self.used)[:, None])[:, None, :, None]
        keys, values = (jnp.where(there, drawn(batch, self.kv_heads, self.length, self.dim), jnp.nan) for _ in range(2))
        cache = Cache(keys, values, jnp.asarray(self.used, jnp.int32))
        q, k, v = drawn(batch, 1, self.heads, self.dim), *(drawn(batch, 1, self.kv_heads, self.dim) for _ in range(2))
        bias = jnp.asarray(rng.normal(size=(self.heads, self.length)), jnp.float32) if self.bias else None
        sinks = drawn(self.heads) if self.sinks else None
        return Asked(q, k, v, cache, bias, sinks, self.rope, 0.3, self.window, self.softcap)


CASES = {
    "llama": Case(),
    "shared heads": Case(heads=6, kv_heads=2, dtype=jnp.float16),
    "neighbours are pairs": Case(rope=RopeSpec(8, interleaved=True)),
    "a part is rotated": Case(rope=RopeSpec(6, scaling=LinearScaling(2.0))),
    "odd heads": Case(heads=2, kv_heads=1, dim=20, rope=RopeSpec(20)),
    "a window": Case(window=5),
    "a window of one": Case(window=1),
    "softcap and sinks": Case(softcap=2.0, sinks=True),
    "alibi": Case(rope=None, bias=True),
    "several programs": Case(length=100, used=(99, 3, 50), sinks=True, window=70),
    "several programs in bfloat16": Case(length=200, used=(150, 10, 64), heads=8, dtype=jnp.bfloat16),
}


def assert_alike(found: tuple[jax.Array, Cache], asked: Asked) -> None:
    (mixed, after), cache = found, asked.cache
    assert cache is not None
    exact, expected = jax.jit(_attended)(
        jax.tree.map(lambda a: jnp.nan_to_num(a.astype(jnp.float32)) if a.dtype != jnp.int32 else a, asked)
    )
    eps = float(jnp.finfo(asked.q.dtype).eps)
    assert mixed.dtype == asked.q.dtype
    np.testing.assert_allclose(mixed.astype(jnp.float32), exact, rtol=0, atol=8 * eps)
    np.testing.assert_array_equal(after.used, expected.used)
    for ours, theirs, before in zip(after[:2], expected[:2], cache[:2], strict=True):
        assert ours.dtype == before.dtype
        for n, used in enumerate(np.asarray(cache.used)):
            np.testing.assert_allclose(ours[n, :, used].astype(jnp.float32), theirs[n, :, used], rtol=0, atol=4 * eps)
            others = np.arange(ours.shape[2]) != used
            now, then = (np.asarray(a[n], np.float32)[:, others] for a in (ours, before))
            np.testing.assert_array_equal(now, then)


# in the interpreter


def _launched(
    kernel: str,
    inputs: dict[str, Any],
    outs: list[Any],
    grid: tuple[int, ...],
    constants: dict[str, Any],
    *,
    warps: int,
    inside: dict[str, int],
) -> Any:
    """What `launch` does, by Triton's interpreter, called back from JAX programs."""
    import torch
    from gptq_fn_kernels.triton import attention

    assert kernel == "attention.attend"
    assert inside == {"keys": 2, "values": 3}
    given = {name: a for name, a in inputs.items() if a is not None}

    def tensor(a: np.ndarray) -> torch.Tensor:
        a = np.asarray(a)
        return torch.tensor(a.astype(np.float32)).bfloat16() if a.dtype == jnp.bfloat16 else torch.tensor(a)

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        tensors = dict.fromkeys(inputs) | {name: tensor(a) for name, a in zip(given, arrays, strict=True)}
        fresh = [tensor(np.full(out.shape, np.nan, out.dtype)) for out in outs[:2]]
        results = [*fresh, tensors["keys"], tensors["values"]]
        attention.attend[grid](**tensors, **dict(zip(("mixed", "logs", "keys_after", "values_after"), results, strict=True)), **constants)
        return [np.asarray(result.float().numpy(), out.dtype) for result, out in zip(results, outs, strict=True)]

    return jax.pure_callback(call, outs, *given.values())


@interpreter
@pytest.mark.parametrize("name", CASES)
def test_a_step_in_the_interpreter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_kernel, "launch", _launched)
    monkeypatch.setattr(by_kernel, "TILE", 16 * 16 * 2)
    if name.startswith("several"):
        monkeypatch.setattr(by_kernel, "TOKENS", 32)
    asked = CASES[name].asked()
    assert_alike(jax.jit(_attend)(asked), asked)


@interpreter
def test_nothing_is_written_behind_the_end_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` may make some steps more than a cache has room for, whose results it drops."""
    monkeypatch.setattr(by_kernel, "launch", _launched)
    asked = Case(used=(40, 47, 3), bias=True, rope=None).asked()
    mixed, after = jax.jit(_attend)(asked)
    assert asked.cache is not None
    assert jnp.isfinite(mixed).all()
    for ours, before in zip(after[:2], asked.cache[:2], strict=True):
        np.testing.assert_array_equal(ours[:2], before[:2])


# compiled


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dim", "pairs", "softcap"), [(128, 64, None), (80, 16, None), (256, 0, 50.0)])
def test_the_kernel_compiles_for_gpus_that_are_not_here(dim: int, pairs: int, softcap: float | None, capability: int) -> None:
    import triton
    from gptq_fn_kernels.jax.launch import source_of
    from triton.backends.compiler import GPUTarget

    numbers = by_kernel.constants_of(
        (32, 8, 4096, dim), pairs, False, scale=0.1, softcap=softcap, window=None, itemsize=2, shared=by_kernel.SHARED
    )
    turns = [("cos", "*fp32"), ("sin", "*fp32")] if pairs else []
    absent = dict.fromkeys(["bias", "sinks"] + ([] if pairs else ["cos", "sin"]))
    inputs = [("qkv", "*fp16"), ("keys", "*fp16"), ("values", "*fp16"), ("used", "*i32"), *turns]
    source = source_of("attention.attend", inputs, ["*fp32", "*fp32", "*fp16", "*fp16"], list((numbers | absent).items()))
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": by_kernel.WARPS})
    assert "cp.async.cg" in made.asm["ptx"]  # rows of keys come 16 bytes at a time, ahead
    assert made.metadata.shared <= by_kernel.SHARED
    assert ".local " not in made.asm["ptx"]  # sums stay in registers


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_step_on_a_gpu(name: str) -> None:
    asked = CASES[name].asked()
    assert_alike(jax.jit(AttendByKernel(), static_argnums=1)(asked, _attended), asked)
    longer = replace(CASES[name], length=2500, used=(2100, 1100, 7), dim=64, rope=RopeSpec(64)).asked()
    assert_alike(jax.jit(AttendByKernel(), static_argnums=1)(longer, _attended), longer)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["llama", "qwen2", "bloom", "gemma2"])
def test_texts_on_a_gpu_are_those_without_the_kernel(case, built) -> None:
    """Of tokens that are each the likeliest after those before it, by a forward pass; and the caches are written in place."""
    params, spec, *_ = rounded(case, built, QuantConfig(group_size=16))
    packed = kernels.pack(params)
    assert all(isinstance(p["attend"], AttendByKernel) for p in packed["blocks"])
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 97, (1, 9)), jnp.int32)
    text = generate(spec, packed, tokens, 12)
    np.testing.assert_array_equal(text[0, -12:], forward(spec, params, text)[0].argmax(-1)[-13:-1])
