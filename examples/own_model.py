"""Your own model: describe it, quantize it, use it. No file, no torch, and no row in any table.

The model below exists nowhere: sequential blocks with layer norms before each half, rotary
positions on half of each head, two key-value heads for four query heads, and a plain GELU MLP.
"""

import jax
import jax.numpy as jnp

import gptq_fn
from gptq_fn import AttentionSpec, BlockSpec, LinearSpec, MlpSpec, ModelSpec, NormSpec, QuantConfig, RopeSpec, Rule

WIDTH, HIDDEN, VOCABULARY, HEADS, KV_HEADS, DIM = 96, 256, 128, 4, 2, 24

norm = NormSpec("layer", eps=1e-5)
block = BlockSpec(
    attn=AttentionSpec(HEADS, KV_HEADS, DIM, position=RopeSpec(dim=DIM // 2)),
    ffn=MlpSpec("gelu"),
    norm=norm,
    linears=(
        LinearSpec("q", "attention.query", "attn_in"),
        LinearSpec("k", "attention.key", "attn_in"),
        LinearSpec("v", "attention.value", "attn_in"),
        LinearSpec("o", "attention.out", "o_in"),
        LinearSpec("up", "mlp.up", "mlp_in"),
        LinearSpec("down", "mlp.down", "down_in"),
    ),
    norms=(("attn_in", "norm_1"), ("mlp_in", "norm_2")),
)
spec = ModelSpec(
    blocks=(block,) * 3,
    prefix="layers.{i}.",
    tensors=(("embed", "embedding"), ("final_norm", "norm"), ("head", "head")),
    norm=norm,
)


def random_params(key: jax.Array) -> dict:
    """Parameters as the spec names them: weights are [out, in]."""
    keys = iter(jax.random.split(key, 64))

    def linear(out: int, inputs: int) -> dict:
        return {"weight": jax.random.normal(next(keys), (out, inputs)) * inputs**-0.5, "bias": jnp.zeros(out)}

    def norm() -> dict:
        return {"weight": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}

    def one_block() -> dict:
        q, kv = HEADS * DIM, KV_HEADS * DIM
        linears = {"q": linear(q, WIDTH), "k": linear(kv, WIDTH), "v": linear(kv, WIDTH), "o": linear(WIDTH, q)}
        return {**linears, "up": linear(HIDDEN, WIDTH), "down": linear(WIDTH, HIDDEN), "attn_in": norm(), "mlp_in": norm()}

    top = {"embed": {"weight": jax.random.normal(next(keys), (VOCABULARY, WIDTH))}, "final_norm": norm(), "head": linear(VOCABULARY, WIDTH)}
    return {"top": top, "blocks": [one_block() for _ in spec.blocks]}


def main() -> None:
    params = random_params(jax.random.key(0))
    calib = jax.random.randint(jax.random.key(1), (16, 64), 0, VOCABULARY)
    config = QuantConfig(bits=4, group_size=32, rules=(Rule(r".*mlp\.down", QuantConfig(bits=8, group_size=32)),))

    quantized = gptq_fn.quantize(params, spec, calib, config)

    print(quantized.report.table())
    tokens = jax.random.randint(jax.random.key(2), (1, 32), 0, VOCABULARY)
    exact, close = (gptq_fn.forward(spec, p, tokens) for p in (params, quantized.params))
    print(f"logits moved by {jnp.linalg.norm(close - exact) / jnp.linalg.norm(exact):.3f} of their norm")
    print("continued:", gptq_fn.generate(spec, quantized.params, tokens[:, :4], 8)[0, 4:].tolist())


if __name__ == "__main__":
    main()
