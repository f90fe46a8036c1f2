"""Budgets: the best choice there is, what it is chosen by, and the rules that it becomes."""

import io
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_fn_interop import budget as budgets
from gptq_fn_interop import cli_budget
from gptq_fn_interop.budget import Measured, groups_of, kept, measure, run_of, settings
from gptq_fn_interop.calib import tokens
from gptq_fn_interop.cli import main
from gptq_fn_interop.gptq_format import scheme_of
from gptq_fn_interop.spoken import spoken
from gptq_fn_interop.stream import load_gptq, open_source, quantize_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_tiny_llama

from gptq_fn import QuantConfig, Rule, allocate, forward, spec_from_config

CALIB = np.random.default_rng(0).integers(2, 97, (8, 32)).astype(np.int32)
PROBES = np.random.default_rng(1).integers(2, 97, (8, 32)).astype(np.int32)
OTHER = np.tile(np.random.default_rng(2).integers(2, 97, (4, 8)), (1, 4)).astype(np.int32)
"""Text that repeats itself."""
CONFIG = QuantConfig(
    group_size=32,
    grid="minmax",
    order="natural",
    rules=(Rule(".*[.]1[.].*o_proj"), Rule(".*[.]1[.].*down_proj", QuantConfig(8, 32, grid="minmax", order="natural"))),
)
SETTINGS = settings(CONFIG, (2, 4), (32,))


@st.composite
def problems(draw: st.DrawFn, groups: int = 5, choices: int = 4) -> tuple[np.ndarray, np.ndarray, float]:
    """Costs and losses of a few groups, with ties, and a budget that can be kept."""
    shape = draw(st.integers(1, groups)), draw(st.integers(1, choices))
    numbers = st.lists(st.integers(0, 12), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    costs, losses = (np.asarray(draw(numbers), np.float64).reshape(shape) for _ in range(2))
    return costs, losses, float(costs.min(1).sum() + draw(st.integers(0, 20)))


def total(table: np.ndarray, chosen: np.ndarray) -> float:
    return float(table[np.arange(len(chosen)), chosen].sum())


@given(problems())
def test_a_choice_is_the_best_of_all(problem: tuple[np.ndarray, np.ndarray, float]) -> None:
    costs, losses, budget = problem
    chosen = allocate(costs, losses, budget)
    every = [np.asarray(each) for each in itertools.product(range(costs.shape[1]), repeat=len(costs))]
    assert total(costs, chosen) <= budget
    assert total(losses, chosen) == min(total(losses, each) for each in every if total(costs, each) <= budget)


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95), st.floats(0, 0.3))
def test_more_never_loses_more_and_no_setting_for_all_is_better(seed: int, part: float, more: float) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 9, (40, 1)) * np.asarray([2.5, 3.1, 3.6, 4.2, 8.1])
    losses = np.exp(rng.normal(0, 1, (40, 1)) + rng.normal(0, 0.1, (40, 5))) * np.asarray([16, 4, 3, 1, 0.01])
    budgets = [costs[:, 0].sum() + x * (costs[:, 4] - costs[:, 0]).sum() for x in (part, part + more)]
    found = [allocate(costs, losses, budget) for budget in budgets]
    assert total(losses, found[1]) <= total(losses, found[0])
    for chosen, budget in zip(found, budgets, strict=True):
        assert total(costs, chosen) <= budget
        assert total(losses, chosen) <= min(losses[:, s].sum() for s in range(5) if costs[:, s].sum() <= budget)


def test_many_groups_are_chosen_near_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """No choice has less than Lagrange's bound; with few states, the result is still one that fits."""
    rng = np.random.default_rng(3)
    costs = np.tile([5, 3, 16, 8], 80)[:, None] * np.asarray([2.56, 3.15, 3.59, 4.16, 8.19])
    losses = np.exp(rng.normal(0, 1.2, (320, 1))) * np.asarray([16, 5, 3.5, 1, 0.01])
    budget = 3.5 * 32 * 80
    chosen = allocate(costs, losses, budget)
    bound = max(float((losses + price * costs).min(1).sum() - price * budget) for price in np.geomspace(1e-3, 10, 4000))
    assert total(costs, chosen) <= budget
    assert bound <= total(losses, chosen) <= 1.002 * bound
    monkeypatch.setattr("gptq_fn._allocate.STATES", 10)
    few = allocate(costs, losses, budget)
    assert total(costs, few) <= budget
    assert total(losses, chosen) <= total(losses, few) <= 1.01 * bound


def test_budgets_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(ValueError, match="the least that the groups can cost is 3"):
        allocate(np.asarray([[1.0, 2.0], [2.0, 3.0]]), np.zeros((2, 2)), 2.5)
    with pytest.raises(ValueError, match="finite"):
        allocate(np.asarray([[1.0, 2.0]]), np.asarray([[np.nan, 0.0]]), 2.5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("budget") / "model")


@pytest.fixture(scope="module")
def measured(source: Path) -> Measured:
    return measure(source, CALIB, (PROBES, OTHER), CONFIG, SETTINGS)


def test_what_is_measured(measured: Measured) -> None:
    firsts = [group.linears[0].rpartition(".")[2] for group in measured.groups]
    assert firsts == [
        "q_proj", "o_proj", "gate_proj", "down_proj", "q_proj", "gate_proj"
    ]  # fmt: skip
    assert measured.groups[0].linears == tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    assert all(group.errors[0] > 4 * group.errors[1] > 0 and min(group.kl) > 0 for group in measured.groups)
    assert measured.tried == 1
    for text in range(2):
        assert measured.uniform[0][text] > 4 * measured.uniform[1][text] > 0
        np.testing.assert_allclose(measured.alone[text].sum(0)[1], measured.uniform[1][text], rtol=0.5)  # small errors add up
    for n, kl in enumerate(measured.uniform):
        assert measured.summary(np.full(6, n))[1] == pytest.approx(kl)


def test_each_text_is_measured_by_itself(source: Path, measured: Measured) -> None:
    """What a text costs does not depend on the texts beside it, nor on their order; of one text, losses are its KLs."""
    for text, probes in enumerate((PROBES, OTHER)):
        told = []
        one = measure(source, CALIB, (probes,), CONFIG, SETTINGS, progress=lambda *at, told=told: told.append(at))
        assert told == [(step + 1, 2 + len(probes)) for step in range(2 + len(probes))]
        np.testing.assert_allclose(one.alone[0], measured.alone[text], rtol=1e-3)
        np.testing.assert_allclose([kl for (kl,) in one.uniform], [kl[text] for kl in measured.uniform], rtol=1e-3)
        np.testing.assert_allclose(one.losses * one.among[0, :, 1].sum(), one.among[0], rtol=1e-9)


def test_a_setting_that_breaks_models_costs_more_than_its_groups_alone(measured: Measured) -> None:
    """Halfway, in logarithms, to what it costs where all groups have it; what was tried on each group costs as much as there."""
    sums, whole = measured.alone.sum(1), np.asarray(measured.uniform).T
    broken = replace(measured, uniform=(tuple(16 * kl for kl in sums[:, 0] * whole[:, 1] / sums[:, 1]), measured.uniform[1]))
    np.testing.assert_allclose(broken.among[:, :, 0], 4 * measured.alone[:, :, 0], rtol=1e-9)
    np.testing.assert_allclose(broken.among[:, :, 1], measured.alone[:, :, 1], rtol=1e-9)


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_texts_count_alike_however_far_the_model_strays_on_them(measured: Measured, seed: int, factor: float) -> None:
    """What counts is the share of a group, on average over the texts: neither their order nor a factor of all KLs of one matters."""
    kl = np.exp(np.random.default_rng(seed).normal(-5, 1.5, (6, 2)))

    def losses(kl: np.ndarray) -> np.ndarray:
        groups = tuple(replace(group, kl=tuple(each)) for group, each in zip(measured.groups, kl.tolist(), strict=True))
        return replace(measured, groups=groups).losses

    np.testing.assert_allclose(losses(kl * [1, factor]), losses(kl), rtol=1e-9)
    np.testing.assert_allclose(losses(kl[:, ::-1]), losses(kl), rtol=1e-9)
    np.testing.assert_allclose(losses(kl)[:, 1], np.sqrt((kl / kl.sum(0)).prod(1)), rtol=1e-9)


def test_a_group_that_other_text_needs_keeps_its_bits(measured: Measured) -> None:
    """Two groups of one size: what matters on the other text alone outweighs what matters little on both."""
    one, two = (replace(measured.groups[0], errors=(0.1, 0.01), kl=kl) for kl in ((0.10, 0.10), (0.09, 0.90)))
    pair = replace(measured, groups=(one, two), fixed=(0, 0))
    room = (one.bits[0] + one.bits[1]) / pair.weights
    assert pair.within(room).tolist() == [0, 1]
    alike = replace(pair, groups=tuple(replace(group, kl=group.kl[:1]) for group in pair.groups))
    assert alike.within(room).tolist() == [1, 0]


def test_kl_of_a_group_alone_is_that_of_the_model_with_it_quantized(source: Path, measured: Measured, tmp_path: Path) -> None:
    """Of the last group nothing follows, so its Hessian is all that 8 bits before it change."""
    from gptq_fn_interop.evaluation import evaluate

    only = replace(SETTINGS[1], rules=(Rule("(?!.*[.]1[.]mlp[.](gate|up))"),))
    quantize_checkpoint(source, tmp_path / "one", CALIB, only)
    found = evaluate(load_gptq(tmp_path / "one"), np.pad(PROBES, ((0, 0), (0, 1))), load_gptq(source))
    assert found.kl == pytest.approx(measured.groups[-1].kl[0], rel=0.05)


def test_a_budget_is_kept_to_the_bit(source: Path, measured: Measured, tmp_path: Path) -> None:
    chosen = measured.within(4.0)
    assert len(set(chosen.tolist())) == 2
    bits, kl = measured.summary(chosen)
    config = measured.config_of(chosen)
    report = quantize_checkpoint(source, tmp_path / "q", CALIB, config)
    assert report.bits_per_weight == pytest.approx(bits, rel=1e-12)
    assert 3.5 < bits <= 4.0
    for group, n in zip(measured.groups, chosen.tolist(), strict=True):
        assert {x.bits for x in report.linears if x.name in group.linears} == {SETTINGS[n].bits}
    assert measured.summary(measured.reaching(kl[0] * (1 + 1e-9)))[0] <= bits
    described = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    wanted = {
        group.linears[0].rpartition(".")[0]: n for group, n in zip(measured.groups, chosen.tolist(), strict=True) if len(group.linears) > 1
    }
    for parent, n in wanted.items():  # by the names that engines give what they fuse
        scheme = scheme_of(f"{parent}.{'qkv_proj' if 'attn' in parent else 'gate_up_proj'}", described)
        assert scheme is not None
        assert scheme["bits"] == SETTINGS[n].bits


def test_budgets_that_are_too_small_are_refused(measured: Measured) -> None:
    with pytest.raises(ValueError, match=r"the smallest settings need \d[.]\d+"):
        measured.within(2.0)
    with pytest.raises(ValueError, match="cannot be reached"):
        measured.reaching(1e-9)


@given(st.floats(0, 1))
def test_a_kl_is_reached_with_no_bits_to_spare(measured: Measured, part: float) -> None:
    """It is that of text like the calibration. Where this is all there is, no smaller choice reaches it."""
    least, most = (measured.summary(np.full(6, n))[1][0] for n in (1, 0))
    kl = least ** (1 - part) * most**part * (1 + 1e-9)
    assert measured.summary(measured.reaching(kl))[1][0] <= kl
    groups = tuple(replace(group, kl=group.kl[:1]) for group in measured.groups)
    one = replace(measured, groups=groups, uniform=tuple(each[:1] for each in measured.uniform))
    bits, (found,) = one.summary(one.reaching(kl))
    assert found <= kl
    every = [one.summary(np.asarray(choice)) for choice in itertools.product(range(2), repeat=6)]
    assert bits == min(size for size, (other,) in every if other <= kl)


def test_measurements_are_kept(source: Path, measured: Measured, tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    run = run_of(source, CALIB, PROBES, CONFIG, SETTINGS)
    assert kept(file, run, lambda: measured) == measured
    assert kept(file, run, pytest.fail) == measured
    with pytest.raises(ValueError, match="differ in other text"):
        kept(file, run_of(source, CALIB, PROBES, CONFIG, SETTINGS, "spoken"), pytest.fail)
    with pytest.raises(ValueError, match="differ in settings"):
        kept(file, run_of(source, CALIB, PROBES, CONFIG, SETTINGS[:1]), pytest.fail)
    with pytest.raises(ValueError, match="differ in calibration tokens"):
        kept(file, run_of(source, CALIB[:4], PROBES, CONFIG, SETTINGS), pytest.fail)


def test_a_model_speaks_as_it_predicts(source: Path) -> None:
    """Tokens drawn at temperature 1 are on average as unlikely as the predictions are uncertain; likeliest ones would be likelier."""
    params, spec = load_gptq(source)
    text = spoken(source, samples=16, length=64, seed=3)
    assert text.shape == (16, 64)
    log_p = np.asarray(jax.nn.log_softmax(forward(spec, params, jnp.asarray(text))), np.float64)[:, :-1]
    unlikely = -np.take_along_axis(log_p, text[:, 1:, None], axis=2)[..., 0]
    excess = unlikely + (np.exp(log_p) * log_p).sum(-1)
    assert abs(excess.mean()) < 4 * excess.std() / excess.size**0.5
    assert len(set(text[:, 0].tolist())) > 8
    np.testing.assert_array_equal(spoken(source, samples=16, length=64, seed=3), text)
    assert (spoken(source, samples=16, length=64, seed=4) != text).mean() > 0.9


def test_it_shows_how_far_the_model_has_spoken(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Screen())
    text = cli_budget._samples("spoken", source, samples=2, length=16, seed=0)
    np.testing.assert_array_equal(text, spoken(source, samples=2, length=16))
    assert re.search(r"Letting the model speak.*15/15", sys.stderr.getvalue())  # pyright: ignore[reportAttributeAccessIssue] - a Screen


def test_probes_are_in_no_calibration(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other text is spoken only where something is measured; that of the calibration again is no other text."""
    seen = []

    def instead(*args: object, **_: object) -> None:
        seen.append(args[1:3])
        raise ValueError("seen")

    monkeypatch.setattr(budgets, "measure", instead)
    for number, (data, texts) in enumerate((((), 2), (("--probe-data", "pydoc"), 1))):
        with pytest.raises(SystemExit):
            main(["quantize", str(source), str(tmp_path / "q"), "--budget", "4", "--samples", "8", "--length", "32", *data])
        calib, probes = seen[number]
        assert [text.shape for text in probes] == [(4, 32)] * texts
        drawn = tokens("pydoc", source, samples=12, length=32)
        np.testing.assert_array_equal(np.concatenate([calib, probes[0]]), drawn)
        assert len(np.unique(drawn, axis=0)) == 12


def test_experts_of_a_block_are_one_group() -> None:
    model = {
        "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "hidden_act": "silu", "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    spec = spec_from_config(model)
    groups = groups_of(spec, QuantConfig())
    assert [len(names) for names in groups[1]] == [3, 1, 12]
    prefix = spec.prefix.format(i=1)
    pattern = re.compile(re.escape(prefix) + budgets._pattern(prefix, groups[1][2]))
    assert all(pattern.match(name) for name in groups[1][2])
    assert pattern.match(groups[1][2][0].partition(".experts.")[0] + ".experts")
    assert not any(pattern.match(name) for names in (*groups[1][:2], *groups[10], *groups[11]) for name in names)


@pytest.mark.slow
def test_the_command_spends_a_budget(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "BITS", (2, 4))
    monkeypatch.setattr(cli_budget, "PROBES", 8)
    rules = ("--rule", ".*[.]1[.].*o_proj => skip", ".*[.]1[.].*down_proj => bits=8,group_size=32")
    small = ("--samples", "8", "--length", "32", "--grid", "minmax", "--order", "natural", "--group-size", "32", *rules)
    result, again = tmp_path / "q", tmp_path / "again"
    main(["quantize", str(source), str(result), "--budget", "4", "--plot", str(tmp_path / "p.png"), *small])
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"nats a token on text like the calibration and \S+ nats a token on what the model itself speaks", said)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((result / "config.json").read_text())["quantization_config"]["dynamic"]) > 2
    main(["quantize", str(source), str(again), "--budget-kl", "10", "--measured", str(tmp_path / "q.budget.json"), *small])
    assert "was measured before" in " ".join(capsys.readouterr().out.split())
    for arguments, sentence in (
        (("--budget", "2"), "is too small"),
        (("--budget", "3", "--budget-kl", "1"), "either of bits or of KL"),
        (("--plot", "x.png"), "are of budgets"),
        (("--probe-data", "pydoc"), "are of budgets"),
        (("--budget", "3", "--for", "exllamav2"), "exllamav2 would not load"),
    ):
        with pytest.raises(SystemExit):
            main(["quantize", str(source), str(tmp_path / "none"), *arguments, *small])
        assert sentence in " ".join(capsys.readouterr().err.split())


def test_what_a_config_resolves_to_is_what_was_chosen(source: Path, measured: Measured) -> None:
    _, spec = open_source(source, CONFIG)
    for choice in itertools.islice(itertools.product(range(2), repeat=6), 0, None, 7):
        config = measured.config_of(np.asarray(choice))
        for group, n in zip(measured.groups, choice, strict=True):
            assert {config.resolve(name) for name in group.linears} == {SETTINGS[n]}
        assert config.resolve("model.layers.1.self_attn.o_proj") is None
        assert config.resolve("model.layers.1.mlp.down_proj") == CONFIG.rules[1].config
    assert len(spec.blocks) == 2


def test_a_function_is_no_grid_that_a_file_holds() -> None:
    own = replace(CONFIG, grid=lambda w, weight, config: None)
    with pytest.raises(ValueError, match="cannot hold a grid that is a function, found test_budget"):
        run_of("nowhere", CALIB, PROBES, CONFIG, [own])
