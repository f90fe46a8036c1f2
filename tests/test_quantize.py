"""Whole models: every linear is textbook GPTQ on what enters it once the linears before it were rounded."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Following, gptq, problem

from gptq_fn import (
    AttentionSpec,
    BlockSpec,
    LinearSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    QuantConfig,
    Quantized,
    QuantizedLinear,
    RopeSpec,
    Rule,
    Runtime,
    add_rows,
    block,
    check,
    dequantize,
    embed_batches,
    empty,
    forward,
    quantize,
    quantize_blocks,
    quantize_linears,
    round_to_nearest,
)
from gptq_fn.check import check_tokens
from gptq_fn.spec import TAPS

WIDTH, HIDDEN, VOCAB = 32, 48, 61

GATED = BlockSpec(
    AttentionSpec(heads=4, kv_heads=4, head_dim=8, position=RopeSpec(8)),
    MlpSpec("silu", "gated"),
    NormSpec("rms", 1e-6),
    (
        LinearSpec("q", "q", "attn_in"),
        LinearSpec("k", "k", "attn_in"),
        LinearSpec("v", "v", "attn_in"),
        LinearSpec("o", "o", "o_in"),
        LinearSpec("gate", "gate", "mlp_in"),
        LinearSpec("up", "up", "mlp_in"),
        LinearSpec("down", "down", "down_in"),
    ),
    (("attn_in", "norm1"), ("mlp_in", "norm2")),
)
PARALLEL = BlockSpec(
    AttentionSpec(heads=4, kv_heads=4, head_dim=8, qkv="concat"),
    MlpSpec("relu"),
    NormSpec("layer", 1e-5),
    (
        LinearSpec("qkv", "qkv", "attn_in"),
        LinearSpec("up", "up", "attn_in"),  # reads what attention reads
        LinearSpec("o", "o", "o_in"),
        LinearSpec("down", "down", "down_in"),
    ),
    (("attn_in", "norm"),),
    parallel=True,
)
TOP = (("embed", "embed"), ("final_norm", "norm"), ("head", "head"))


def model(kind: BlockSpec, blocks: int) -> ModelSpec:
    return ModelSpec((kind,) * blocks, "blocks.{i}.", TOP, kind.norm)


def random_params(spec: ModelSpec) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def leaf(*shape: int, bias: bool = True) -> dict[str, jax.Array]:
        weight = rng.normal(size=shape) / np.sqrt(shape[-1]) if len(shape) == 2 else 1 + 0.3 * rng.normal(size=shape)
        found = {"weight": jnp.asarray(weight, jnp.float32)}
        return {**found, "bias": jnp.asarray(0.1 * rng.normal(size=shape[0]), jnp.float32)} if bias else found

    def of_block(block: BlockSpec) -> dict[str, Any]:
        q, kv = block.attn.heads * block.attn.head_dim, block.attn.kv_heads * block.attn.head_dim
        out = {"q": q, "k": kv, "v": kv, "qkv": q + 2 * kv, "o": WIDTH, "gate": HIDDEN, "up": HIDDEN, "down": WIDTH}
        p = {x.role: leaf(out[x.role], HIDDEN if x.role == "down" else WIDTH, bias=x.role in ("q", "up", "o")) for x in block.linears}
        return p | {slot: leaf(WIDTH, bias=block.norm.kind == "layer") for slot, _ in block.norms}

    top = {"embed": leaf(VOCAB, WIDTH, bias=False), "final_norm": leaf(WIDTH, bias=False), "head": leaf(VOCAB, WIDTH, bias=False)}
    return {"top": top, "blocks": [of_block(b) for b in spec.blocks]}


def floats(p: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with dequantized weights."""

    def dense(leaf: Any) -> Any:
        if not isinstance(leaf, QuantizedLinear):
            return leaf
        return {"weight": dequantize(leaf)} | ({} if leaf.bias is None else {"bias": leaf.bias})

    return {role: dense(leaf) for role, leaf in p.items()}


run = jax.jit(block, static_argnums=0)


class Case(NamedTuple):
    spec: ModelSpec
    params: dict[str, Any]
    calib: np.ndarray
    config: QuantConfig
    quantized: Quantized


RULES = (Rule(r"blocks\.1\.down"), Rule(r"blocks\.\d\.(k|down)", QuantConfig(8, None, order="natural", grid="minmax")))
CASES = {
    "sequential": (GATED, QuantConfig(4, 16, sym=False, grid="mse")),
    "all-at-once": (GATED, QuantConfig(3, 16, sym=True, grid="minmax", order="act", sequential=False)),
    "parallel-with-rules": (PARALLEL, QuantConfig(4, 20, sym=False, grid="minmax", static_groups=True, rules=RULES)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    kind, config = CASES[request.param]
    spec = model(kind, 2)
    params = random_params(spec)
    calib = np.random.default_rng(1).integers(0, VOCAB, (6, 24)).astype(np.int32)
    return Case(spec, params, calib, config, quantize(params, spec, jnp.asarray(calib), config))


def test_every_linear_is_textbook_gptq_on_what_enters_it(case):
    """And the report says how far off its output is, in float64 too."""
    reports = {report.name: report for report in case.quantized.report.linears}
    ((x, keep, *_),) = embed_batches(case.spec, case.params["top"], case.calib)
    assert keep.all()
    for i, (spec, p, q) in enumerate(zip(case.spec.blocks, case.params["blocks"], case.quantized.params["blocks"], strict=True)):
        so_far = dict(p)
        for tap, roles in spec.stages:
            entering = run(spec, so_far, x)[1][tap]
            h = add_rows(empty(entering.shape[-1]), entering)
            for role in roles:
                name = f"blocks.{i}.{role}"
                config = case.config.resolve(name)
                if config is None:
                    assert q[role] is p[role]
                    assert name not in reports
                    continue
                assert q[role].bits == reports[name].bits == config.bits
                assert q[role].bias is p[role].get("bias")
                weight = np.asarray(p[role]["weight"])
                follow = Following(config, q[role], slack=4e-6 * 2**config.bits)
                found = gptq(problem(weight, np.asarray(h.xx), config, reports[name].damp), follow)
                np.testing.assert_array_equal(q[role].group_of, found.group_of)
                assert found.strayed <= 0.01 * weight.size
                assert_report_is_true(reports[name], p[role]["weight"], q[role], np.asarray(entering, np.float64), config)
                if case.config.sequential:
                    so_far[role] = floats(q)[role]
        x = run(spec, floats(q), x)[0]
    assert len(reports) == sum(case.config.resolve(name) is not None for name in names(case.spec))


def names(spec: ModelSpec) -> list[str]:
    return [spec.name_of(i, linear) for i, b in enumerate(spec.blocks) for linear in b.linears]


def assert_report_is_true(report, w, q, x, config) -> None:
    def error(found: QuantizedLinear) -> float:
        flat, weight = x.reshape(-1, x.shape[-1]), np.asarray(w, np.float64)
        return float(np.linalg.norm((weight - np.asarray(dequantize(found), np.float64)) @ flat.T) / np.linalg.norm(weight @ flat.T))

    np.testing.assert_allclose(report.error, error(q), rtol=1e-3)
    np.testing.assert_allclose(report.rtn_error, error(round_to_nearest(w, config)), rtol=1e-3)
    dead = int((x == 0).all((0, 1)).sum())
    assert (report.shape, report.rows, report.dead, report.group_size) == (w.shape, x[..., 0].size, dead, config.group_size)
    assert report.damp == np.float32(min(1, max(0.01, w.shape[1] / report.rows)))


def test_quantized_leaves_compute_what_their_weights_compute(case):
    tokens = jnp.asarray(case.calib[:2])
    dense = {"top": case.params["top"], "blocks": [floats(p) for p in case.quantized.params["blocks"]]}
    expected = np.asarray(forward(case.spec, dense, tokens))
    np.testing.assert_allclose(forward(case.spec, case.quantized.params, tokens), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_report_lists_linears_in_forward_order(case):
    report = case.quantized.report
    order = {name: i for i, name in enumerate(names(case.spec))}
    listed = [r.name for r in report.linears]
    taps = {case.spec.name_of(i, x): (i, TAPS.index(x.tap)) for i, b in enumerate(case.spec.blocks) for x in b.linears}
    assert [taps[name] for name in listed] == sorted(taps[name] for name in order if name in listed)
    worst = report.worst(3)
    assert [r.error for r in worst] == sorted((r.error for r in report.linears), reverse=True)[:3]
    assert [line.split()[0] for line in report.table().splitlines()] == ["linear", *listed]
    assert [line.split()[0] for line in report.table(worst).splitlines()] == ["linear", *(r.name for r in worst)]


def test_bits_are_counted_with_scales_and_zero_points(case):
    stored = weights = 0
    for i, (p, spec) in enumerate(zip(case.params["blocks"], case.spec.blocks, strict=True)):
        for linear in spec.linears:
            if config := case.config.resolve(case.spec.name_of(i, linear)):
                out, inputs = p[linear.role]["weight"].shape
                groups = len({column // (config.group_size or inputs) for column in range(inputs)})
                stored += out * (inputs * config.bits + groups * (16 + config.bits))
                weights += out * inputs
    assert case.quantized.report.bits_per_weight == stored / weights


BY_HAND = QuantConfig(3, 20, order="natural", grid="minmax")


def test_a_hand_written_spec_passes_its_check():
    for kind in (GATED, PARALLEL):
        spec = model(kind, 2)
        params = random_params(spec)
        shapes = {f"{name}.{leaf}": a.shape for role, name in spec.tensors for leaf, a in params["top"][role].items()}
        for i, p in enumerate(params["blocks"]):
            modules = dict(kind.norms) | {x.role: x.name for x in kind.linears}
            shapes |= {f"blocks.{i}.{modules[role]}.{leaf}": a.shape for role, leaves in p.items() for leaf, a in leaves.items()}
        assert check(spec, shapes) == ()


def test_linears_marked_so_stay_as_they_are():
    q_only = replace(GATED, linears=tuple(replace(x, quantize=x.role == "q") for x in GATED.linears))
    spec = model(q_only, 1)
    params = random_params(spec)
    quantized = quantize(params, spec, jnp.ones((1, 2), jnp.int32), BY_HAND)
    assert [r.name for r in quantized.report.linears] == ["blocks.0.q"]
    assert all(quantized.params["blocks"][0][x.role] is params["blocks"][0][x.role] for x in q_only.linears if not x.quantize)


def test_models_in_bfloat16_are_quantized_as_they_are():
    spec = model(PARALLEL, 1)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), random_params(spec))
    calib = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (6, 24)), jnp.int32)
    quantized = quantize(params, spec, calib, QuantConfig(8, 16, grid="minmax", order="natural", rules=(Rule(r".*\.(o|down)"),)))
    assert len(quantized.report.linears) == 2
    assert max(r.error for r in quantized.report.linears) < 0.01
    assert forward(spec, quantized.params, calib).dtype == jnp.bfloat16


@pytest.mark.parametrize(("samples", "time"), [(1, 5000), (6, 1024), (7, 1024), (5, 100), (64, 128)])
def test_batches_hold_all_samples_in_order(samples, time):
    spec = model(GATED, 0)
    tokens = np.arange(samples * time).reshape(samples, time) % VOCAB
    top = random_params(spec)["top"]
    batches = embed_batches(spec, top, tokens)
    np.testing.assert_array_equal(
        np.concatenate([np.asarray(batch.x)[: len(batch.samples)] for batch in batches]), np.asarray(top["embed"]["weight"])[tokens]
    )
    assert [n for batch in batches for n in batch.samples] == list(range(samples))
    assert len({batch.x.shape for batch in batches}) == 1
    assert all(len(batch.x) == 1 or batch.x.shape[0] * time <= 4096 for batch in batches)


def test_batches_of_samples_of_any_lengths_have_few_shapes_and_mark_what_counts():
    spec = model(GATED, 0)
    top = random_params(spec)["top"]
    lengths = np.random.default_rng(2).integers(1, 700, 60)
    samples = [np.full(length, n % VOCAB) for n, length in enumerate(lengths)]
    batches = embed_batches(spec, top, samples)
    found = {n: x[k] for batch in batches for n, x, k in zip(batch.samples, np.asarray(batch.x), np.asarray(batch.keep), strict=False)}
    assert sum(int(batch.keep.sum()) for batch in batches) == lengths.sum()
    assert len({batch.x.shape[1] for batch in batches}) <= 11
    for n, sample in enumerate(samples):
        np.testing.assert_array_equal(found[n], np.asarray(top["embed"]["weight"])[sample])


def test_how_many_tokens_pass_at_once_changes_little(case):
    """Sums are rounded in another order, so that a code at a tie may flip, and those after it."""
    found = quantize(case.params, case.spec, case.calib, case.config, runtime=Runtime(tokens_per_call=64))
    assert len(embed_batches(case.spec, case.params["top"], case.calib, Runtime(tokens_per_call=64))) == 3
    for i, limit in enumerate((1e-3, 1e-2)):
        mine, wanted = found.params["blocks"][i], case.quantized.params["blocks"][i]
        flips = [np.asarray(mine[role].codes != q.codes).reshape(-1) for role, q in wanted.items() if isinstance(q, QuantizedLinear)]
        assert np.concatenate(flips).mean() <= limit
    for report, wanted in zip(found.report.linears, case.quantized.report.linears, strict=True):
        np.testing.assert_allclose(report.error, wanted.error, rtol=5e-3)


@pytest.mark.parametrize("name", ["sequential", "all-at-once"])
def test_padding_counts_for_nothing(name):
    """Samples of several lengths give what each gives on its own."""
    kind, config = CASES[name]
    spec = model(kind, 2)
    params = random_params(spec)
    samples = [np.random.default_rng(n).integers(0, VOCAB, length) for n, length in enumerate((5, 12, 7, 12))]
    alone = [embed_batches(spec, params["top"], [sample])[0] for sample in samples]
    batches = embed_batches(spec, params["top"], samples)
    assert any(not batch.keep.all() for batch in batches)
    assert all(batch.keep.all() for batch in alone)
    for (p, told, _), (expected, expected_told, _) in zip(
        quantize_blocks(spec, params["blocks"], batches, config), quantize_blocks(spec, params["blocks"], alone, config), strict=True
    ):
        assert [report.rows for report in told] == [report.rows for report in expected_told] == [36] * len(told)
        for found, wanted in zip(jax.tree.leaves(p), jax.tree.leaves(expected), strict=True):
            assert (np.asarray(found) != np.asarray(wanted)).mean() < 0.02  # ties
            if jnp.issubdtype(found.dtype, jnp.floating):
                np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    spec = model(GATED, 2)
    params = random_params(spec)
    params["blocks"][0]["v"]["weight"] = params["blocks"][0]["v"]["weight"].at[3, 4].set(value)
    with pytest.raises(ValueError, match=r"blocks\.0\.v: its weight holds infinite or NaN values"):
        quantize(params, spec, jnp.ones((1, 2), jnp.int32), BY_HAND)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_sample_that_is_not_finite_is_named(value):
    spec = model(GATED, 1)
    params = random_params(spec)
    params["top"]["embed"]["weight"] = params["top"]["embed"]["weight"].at[7, 4].set(value)
    tokens = np.ones((60, 100), np.int32)
    tokens[44, 90] = 7
    assert len(embed_batches(spec, params["top"], tokens)) > 1
    with pytest.raises(ValueError, match=r"blocks\.0\.q: calibration sample 44 makes its input infinite or NaN"):
        quantize(params, spec, jnp.asarray(tokens), BY_HAND)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (np.ones((2, 8), np.float32), r"whole numbers \[samples, time\], .*; got a sample of float32 \[8\]"),
        (np.ones(8, np.int32), r"got a sample of int32 \[\]"),
        (["text"], r"got a sample of <U4 \[\]"),
        (np.ones((0, 8), np.int32), "There are no calibration samples"),
        (np.full((2, 8), 50), "reach from 50 to 50 but the model knows 50: another tokenizer"),
        ([np.asarray([0, -1])], "reach from -1 to 0"),
    ],
)
def test_what_is_no_tokens_of_the_model_is_refused(tokens, said):
    with pytest.raises(ValueError, match=said):
        check_tokens(tokens, 50)


def test_a_models_own_vocabulary_counts():
    spec = model(GATED, 1)
    with pytest.raises(ValueError, match="reach from 1000 to 1000 but the model knows"):
        quantize(random_params(spec), spec, np.full((2, 8), 1000), BY_HAND)


def test_what_is_quantized_is_not_quantized_again():
    spec = model(GATED, 1)
    params = random_params(spec)
    again = {**params["blocks"][0], "q": round_to_nearest(params["blocks"][0]["q"]["weight"], BY_HAND)}
    with pytest.raises(ValueError, match="quantized already; quantize the float ones"):
        quantize({**params, "blocks": [again]}, spec, np.ones((1, 2), np.int32), BY_HAND)


def test_a_weight_that_lies_the_wrong_way_is_named():
    spec = model(PARALLEL, 1)
    params = random_params(spec)
    params["blocks"][0]["qkv"]["weight"] = params["blocks"][0]["qkv"]["weight"].T
    only = QuantConfig(4, 16, rules=(Rule(r".*up"),))
    with pytest.raises(ValueError, match=r"blocks\.0\.qkv: its weight is \[32, 96\] but 32 features enter it\. Weights are \[out, in\]"):
        quantize(params, spec, jnp.ones((1, 2), jnp.int32), only)


def test_a_weight_of_another_width_is_named_wherever_it_stands():
    spec = model(GATED, 1)
    params = random_params(spec)
    params["blocks"][0]["up"]["weight"] = params["blocks"][0]["up"]["weight"][:, 1:]
    p, x = params["blocks"][0], jnp.ones((40, WIDTH))
    plan = {"gate": BY_HAND, "up": BY_HAND}
    with pytest.raises(ValueError, match=r"up: its weight is \[48, 31\] but 32 features enter it"):
        next(quantize_linears({name: p[name] for name in plan}, add_rows(empty(WIDTH), x), plan))


def test_a_sample_longer_than_the_learned_positions_is_refused():
    spec = model(GATED, 0)
    top = random_params(spec)["top"]
    top["positions"] = {"weight": jnp.ones((10, WIDTH))}
    spec = replace(spec, position_offset=2)
    assert embed_batches(spec, top, np.ones((2, 8), np.int32))
    with pytest.raises(ValueError, match="sample has 9 tokens, but the model has learned 8 positions"):
        embed_batches(spec, top, [np.ones(9, np.int32), np.ones(4, np.int32)])


def test_parameters_of_another_number_of_blocks_are_refused_before_any_work():
    spec = model(GATED, 2)
    params = random_params(spec)
    for blocks in (params["blocks"][:1], params["blocks"] * 2):
        with pytest.raises(ValueError, match=rf"The parameters have {len(blocks)} blocks but the spec describes 2"):
            quantize({**params, "blocks": blocks}, spec, np.ones((1, 2), np.int32), BY_HAND)


def test_parameters_without_a_linear_of_the_spec_are_refused_before_any_work():
    spec = model(GATED, 2)
    params = random_params(spec)
    whole, part = params["blocks"]
    blocks = [whole, {role: leaf for role, leaf in part.items() if role not in ("up", "o")}]
    with pytest.raises(ValueError, match=r"Block 1 of the parameters has no o and no up, of which the spec tells"):
        quantize({**params, "blocks": blocks}, spec, np.ones((1, 2), np.int32), BY_HAND)


def test_a_weight_too_large_for_a_float16_scale_is_named():
    spec = model(GATED, 1)
    params = random_params(spec)
    params["blocks"][0]["q"]["weight"] = params["blocks"][0]["q"]["weight"] * 1e6
    with pytest.raises(ValueError, match=r"blocks\.0\.q: a scale overflows float16"):
        quantize(params, spec, jnp.ones((1, 2), jnp.int32), BY_HAND)


def test_activations_too_large_for_float32_are_named():
    spec = model(GATED, 1)
    params = random_params(spec)
    params["blocks"][0]["attn_in"]["weight"] = params["blocks"][0]["attn_in"]["weight"] * 1e25
    with pytest.raises(ValueError, match=r"blocks\.0\.q: its Hessian cannot be factorized at any damping"):
        quantize(params, spec, jnp.ones((1, 2), jnp.int32), BY_HAND)
