"""Experts: routing, one program for all of them, and each quantized by the tokens routed to it."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptq_fn import (
    AttentionSpec,
    BlockSpec,
    LinearSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    QuantConfig,
    QuantizedLinear,
    Rule,
    add_rows,
    dequantize,
    embed_batches,
    empty,
    factor,
    forward,
    quantize,
    round_to_nearest,
    solve,
)
from gptq_fn.model.block import advance, enter
from gptq_fn.model.moe import mix_experts, route
from gptq_fn.testing import assert_equal_up_to_ties

WIDTH, HIDDEN, EXPERTS, VOCAB = 32, 24, 6, 40
MOE = MoeSpec(EXPERTS, 2, MlpSpec("silu", "gated"), shared=MlpSpec("relu"), shared_gate=True)
NORM = NormSpec("rms", 1e-6)
LINEARS = (
    *(LinearSpec(role, role, "attn_in") for role in "qkv"),
    LinearSpec("o", "o", "o_in"),
    LinearSpec("router", "router", "router_in", quantize=False),
    LinearSpec("shared_gate", "shared_gate", "router_in", quantize=False),
    LinearSpec("experts.gate", "experts.{n}.gate", "expert_in"),
    LinearSpec("experts.up", "experts.{n}.up", "expert_in"),
    LinearSpec("experts.down", "experts.{n}.down", "expert_down_in"),
    LinearSpec("shared.up", "shared.up", "mlp_in"),
    LinearSpec("shared.down", "shared.down", "down_in"),
)
BLOCK = BlockSpec(AttentionSpec(4, 4, 8), MOE, NORM, LINEARS, (("attn_in", "n1"), ("mlp_in", "n2")))
CONFIG = QuantConfig(4, 8, sym=False, grid="minmax", order="natural", min_rows=8)
EXPERT_ROLES = ("experts.gate", "experts.up", "experts.down")


def model(block: BlockSpec = BLOCK, blocks: int = 1) -> ModelSpec:
    return ModelSpec((block,) * blocks, "blocks.{i}.", (("embed", "embed"), ("final_norm", "norm"), ("head", "head")), NORM)


def random_params(spec: ModelSpec, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def leaf(*shape: int) -> dict[str, jax.Array]:
        return {"weight": jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), jnp.float32)}

    def scale() -> dict[str, jax.Array]:
        return {"weight": jnp.asarray(1 + 0.3 * rng.normal(size=WIDTH), jnp.float32)}

    shapes = dict.fromkeys(("q", "k", "v", "o"), (WIDTH, WIDTH)) | {"router": (EXPERTS, WIDTH), "shared_gate": (1, WIDTH)}
    shapes |= {"experts.gate": (EXPERTS, HIDDEN, WIDTH), "experts.up": (EXPERTS, HIDDEN, WIDTH), "experts.down": (EXPERTS, WIDTH, HIDDEN)}
    shapes |= {"shared.up": (HIDDEN, WIDTH), "shared.down": (WIDTH, HIDDEN)}
    blocks = [{role: leaf(*shape) for role, shape in shapes.items()} | {"attn_in": scale(), "mlp_in": scale()} for _ in spec.blocks]
    return {"top": {"embed": leaf(VOCAB, WIDTH), "final_norm": scale(), "head": leaf(VOCAB, WIDTH)}, "blocks": blocks}


CALIB = np.random.default_rng(1).integers(0, VOCAB, (8, 16)).astype(np.int32)


def state_at(stop: str, p: dict[str, Any], x: jax.Array, block: BlockSpec = BLOCK) -> Any:
    state = enter(block, p, x)
    for passed in block.stops[: block.stops.index(stop)]:
        state = advance(block, p, state, passed)[0]
    return state


def slow_route(spec: MoeSpec, logits: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The weight of every expert for one token, by the definition, in float64."""
    scores = np.exp(logits) / np.exp(logits).sum() if spec.score == "softmax" else 1 / (1 + np.exp(-logits))
    wanted = scores if bias is None else scores + bias
    groups = wanted.reshape(spec.groups, -1)
    goodness = [sum(sorted(group)[-(1 if spec.group_score == "best" else 2) :]) for group in groups]
    allowed = sorted(range(spec.groups), key=lambda g: -goodness[g])[: spec.top_groups]
    candidates = [n for n in range(spec.experts) if n // len(groups[0]) in allowed]
    chosen = sorted(candidates, key=lambda n: -wanted[n])[: spec.top_k]
    total = sum(scores[n] for n in chosen) if spec.renormalise else 1
    return np.array([spec.scale * scores[n] / total if n in chosen else 0 for n in range(spec.experts)])


@pytest.mark.parametrize(
    ("spec", "biased"),
    [
        (MOE, False),
        (replace(MOE, score="sigmoid", top_k=3, renormalise=False, scale=2.5), True),
        (replace(MOE, groups=3, top_groups=2, top_k=3, renormalise=False), False),
        (replace(MOE, score="sigmoid", groups=3, top_groups=2, group_score="best_two", scale=0.5), True),
    ],
)
def test_tokens_go_where_the_definition_sends_them(spec, biased):
    rng = np.random.default_rng(2)
    h = rng.normal(size=(2, 9, WIDTH))
    router, bias = rng.normal(size=(EXPERTS, WIDTH)), rng.normal(size=EXPERTS) if biased else None
    p = {"router": {"weight": jnp.asarray(router, jnp.float32)}} | ({} if bias is None else {"route_bias": jnp.asarray(bias, jnp.float32)})
    to = route(spec, p, jnp.asarray(h, jnp.float32))
    found = np.stack([to.share(n) for n in range(EXPERTS)], -1)
    expected = np.array([[slow_route(spec, router @ x, bias) for x in row] for row in h])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert int(sum(to.chosen(n).sum() for n in range(EXPERTS))) == 2 * 9 * spec.top_k


@pytest.mark.parametrize("tokens", [1, 2, 3, 16], ids=lambda n: f"{n}-tokens")
def test_few_tokens_and_many_are_mixed_alike(tokens):
    """With fewer tokens than experts, another program runs; both are the plain sum."""
    p = random_params(model())["blocks"][0]
    h = jax.random.normal(jax.random.key(0), (1, tokens, WIDTH))
    to = route(MOE, p, h)
    x, gate, up, down = (np.asarray(a, np.float64) for a in (h[0], *(p[role]["weight"] for role in EXPERT_ROLES)))
    expected = np.zeros_like(x)
    for n in range(EXPERTS):
        opened = x @ gate[n].T
        expected += np.asarray(to.share(n))[0, :, None] * ((opened / (1 + np.exp(-opened)) * (x @ up[n].T)) @ down[n].T)
    np.testing.assert_allclose(mix_experts(MOE, p, h, to)[0], expected, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, experts="all"), replace(CONFIG, sequential=False, order="act")], ids=repr)
def test_every_expert_is_quantized_by_the_tokens_routed_to_it(config):
    spec = model()
    params = random_params(spec)
    result = quantize(params, spec, jnp.asarray(CALIB), config)
    p, q = params["blocks"][0], result.params["blocks"][0]
    reports = {r.name: r for r in result.report.linears}
    ((x, *_),) = embed_batches(spec, params["top"], CALIB)
    assert not any(r.rounded for r in result.report.linears)
    so_far = dict(p)
    if config.sequential:
        so_far |= {role: {"weight": dequantize(q[role])} for role in "qkvo"}
    state = state_at("mlp_in", so_far, x)
    h, to = state.taps["mlp_in"], state.held["route"]
    for n in range(EXPERTS):
        keep = jnp.ones(h.shape[:2], bool) if config.experts == "all" else to.chosen(n)
        rows = h[keep]
        mine = {role: leaf_of(q[role], n) for role in EXPERT_ROLES}
        opening = [mine[role] if config.sequential else p[role]["weight"][n] for role in ("experts.gate", "experts.up")]
        gate, up = (dequantize(leaf) if isinstance(leaf, QuantizedLinear) else leaf for leaf in opening)
        inner = jax.nn.silu(rows @ gate.T) * (rows @ up.T)
        for role, entering in (("experts.gate", rows), ("experts.up", rows), ("experts.down", inner)):
            w = p[role]["weight"][n]
            expected = solve(w, factor(add_rows(empty(w.shape[1]), entering), config), config)[0]
            assert_close_codes(mine[role], expected, w)
            report = reports[f"blocks.0.{role.replace('experts.', f'experts.{n}.')}"]
            assert report.rows == len(rows)
            assert report.shape == w.shape
            error = np.linalg.norm((w - dequantize(mine[role])) @ entering.T) / np.linalg.norm(w @ entering.T)
            np.testing.assert_allclose(report.error, error, rtol=1e-3)


def leaf_of(q: QuantizedLinear, n: int) -> QuantizedLinear:
    return jax.tree.map(lambda a: a[n], q)


def assert_close_codes(found: QuantizedLinear, expected: QuantizedLinear, w: jax.Array) -> None:
    """The same codes but for those near a tie: sums in another order may carry an error to the next columns."""
    np.testing.assert_array_equal(found.group_of, expected.group_of)
    np.testing.assert_allclose(found.scale, expected.scale, rtol=2e-3)
    assert (np.asarray(found.codes) != np.asarray(expected.codes)).mean() < 0.01


def test_experts_that_few_tokens_reach_are_rounded_and_named():
    spec = model()
    params = random_params(spec)
    plain = quantize(params, spec, jnp.asarray(CALIB), CONFIG)
    rows = {r.name: r.rows for r in plain.report.linears if ".experts." in r.name}
    limit = sorted(rows.values())[len(rows) // 2]
    result = quantize(params, spec, jnp.asarray(CALIB), replace(CONFIG, min_rows=limit))
    named = {r.name for r in result.report.rounded}
    assert named
    for n in range(EXPERTS):
        for role in EXPERT_ROLES[:2]:  # what enters the others depends on how these were quantized
            name, w = f"blocks.0.{role.replace('experts.', f'experts.{n}.')}", params["blocks"][0][role]["weight"][n]
            found = leaf_of(result.params["blocks"][0][role], n)
            assert (name in named) == (rows[name] < limit)
            if name in named:
                assert_equal_up_to_ties(found, round_to_nearest(w, CONFIG), w)
            else:
                assert_close_codes(found, leaf_of(plain.params["blocks"][0][role], n), w)


def test_experts_of_one_chunk_are_those_of_many(monkeypatch):
    """Hessians of many experts need not fit into memory at once."""
    spec = model()
    params = random_params(spec)
    whole = quantize(params, spec, jnp.asarray(CALIB), CONFIG)
    monkeypatch.setattr("gptq_fn._experts.HESSIAN_BYTES", 2 * 4 * WIDTH**2)
    parts = quantize(params, spec, jnp.asarray(CALIB), CONFIG)
    for role in EXPERT_ROLES:
        np.testing.assert_array_equal(parts.params["blocks"][0][role].codes, whole.params["blocks"][0][role].codes)
    for one, other in zip(parts.report.linears, whole.report.linears, strict=True):
        assert (one.name, one.rows, one.damp, one.rounded) == (other.name, other.rows, other.damp, other.rounded)
        np.testing.assert_allclose((one.error, one.rtn_error, one.energy), (other.error, other.rtn_error, other.energy), rtol=1e-5)


def test_the_router_is_quantized_only_where_a_rule_asks():
    spec = model()
    params = random_params(spec)
    plain = quantize(params, spec, jnp.asarray(CALIB), CONFIG)
    assert plain.params["blocks"][0]["router"] is params["blocks"][0]["router"]
    asked = quantize(params, spec, jnp.asarray(CALIB), replace(CONFIG, rules=(Rule(r".*\.router$", replace(CONFIG, bits=8)),)))
    assert asked.params["blocks"][0]["router"].bits == 8
    assert next(r for r in asked.report.linears if r.name == "blocks.0.router").rows == CALIB.size
    logits = [np.asarray(forward(spec, q.params, jnp.asarray(CALIB))) for q in (plain, asked)]
    assert not np.array_equal(*logits)


def test_rules_that_divide_experts_are_refused():
    rules = (Rule(r".*experts\.3\.up"),)
    with pytest.raises(ValueError, match=r"blocks\.0\.experts\.\{n\}\.up: the rules treat its experts differently"):
        quantize(random_params(model()), model(), jnp.asarray(CALIB), replace(CONFIG, rules=rules))


def test_an_expert_that_is_not_finite_is_named():
    params = random_params(model())
    broken = params["blocks"][0]["experts.up"]["weight"].at[4, 1, 1].set(jnp.nan)
    params["blocks"][0]["experts.up"] = {"weight": broken}
    with pytest.raises(ValueError, match=r"blocks\.0\.experts\.4\.up: its weight holds infinite or NaN values"):
        quantize(params, model(), jnp.asarray(CALIB), CONFIG)


def test_impossible_routing_is_refused():
    with pytest.raises(ValueError, match="A token cannot go to 7 of 6 experts"):
        replace(MOE, top_k=7)
    with pytest.raises(ValueError, match="2 of 4 groups cannot be chosen among 6 experts"):
        replace(MOE, groups=4, top_groups=2)
