"""Sampling obeys its laws; a text depends neither on padding nor on the texts beside it, and stops where it ends."""

from dataclasses import replace
from inspect import unwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gptq_fn_interop.params import read_params
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_families import built as built  # the fixture
from transformers import TopKLogitsWarper, TopPLogitsWarper

import gptq_fn.model.generate as module
from gptq_fn import forward, generate
from gptq_fn.model.sampling import choose, likeliest, nucleus

LOGITS = arrays(np.float32, (3, 12), elements=st.integers(-40, 40).map(lambda i: i / 8))
"""With ties."""
APART = st.permutations(range(12)).map(lambda order: np.asarray([order, order[::-1]], np.float32) / 3)
"""Without."""


@given(LOGITS, st.integers(1, 14))
def test_the_likeliest_are_the_k_largest_and_what_ties_with_them(logits, k):
    found = np.asarray(likeliest(jnp.asarray(logits), k))
    for row, kept in zip(logits, found, strict=True):
        least = np.sort(row)[::-1][min(k, len(row)) - 1]
        np.testing.assert_array_equal(kept, np.where(row >= least, row, -np.inf))


@given(LOGITS, st.floats(0.015625, 1, width=32))
def test_a_nucleus_is_the_fewest_tokens_that_are_likely_enough(logits, p):
    for row, kept in zip(logits, np.asarray(nucleus(jnp.asarray(logits), jnp.float32(p))) > -np.inf, strict=True):
        probability = np.exp(row.astype(np.float64))
        probability /= probability.sum()
        assert row[kept].min() >= row[~kept].max(initial=-np.inf)
        assert probability[kept].sum() >= p - 1e-6
        least = kept & (row == row[kept].min())
        assert probability[kept & ~least].sum() < p + 1e-6, "the least likely of them are needed"


@given(APART, st.integers(1, 12), st.floats(0.05, 0.95))
def test_both_leave_what_transformers_leaves(logits, k, p):
    theirs = torch.from_numpy(logits)
    np.testing.assert_array_equal(likeliest(jnp.asarray(logits), k), TopKLogitsWarper(k)(None, theirs))
    np.testing.assert_array_equal(nucleus(jnp.asarray(logits), jnp.float32(p)), TopPLogitsWarper(p)(None, theirs))


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits, draws = jnp.log(jnp.asarray([0.5, 0.25, 0.15, 0.1])), 20_000
    wide = jnp.broadcast_to(logits[None], (draws, 4))

    def shares(**options) -> np.ndarray:
        return np.bincount(choose(wide, jax.random.key(0), **options), minlength=4) / draws

    one, half = jnp.float32(1), jnp.float32(0.5)
    np.testing.assert_allclose(shares(temperature=one), [0.5, 0.25, 0.15, 0.1], atol=0.015)
    squares = np.square([0.5, 0.25, 0.15, 0.1])
    np.testing.assert_allclose(shares(temperature=half), squares / squares.sum(), atol=0.015)
    np.testing.assert_allclose(shares(temperature=one, top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.015)
    np.testing.assert_allclose(shares(temperature=one, top_p=jnp.float32(0.8)), [5 / 9, 2.5 / 9, 1.5 / 9, 0], atol=0.015)
    np.testing.assert_array_equal(choose(wide[:3], None, temperature=one), 0)


@pytest.fixture(scope="module")
def opt(built):
    """A model with learned positions, and three prompts of lengths 9, 6 and 1."""
    _, spec, checkpoint, _ = built("opt")
    keep = np.arange(9) >= np.array([[0], [3], [8]])
    prompts = np.random.default_rng(0).integers(2, 97, (3, 9)).astype(np.int32)
    return spec, read_params(spec, checkpoint), jnp.asarray(prompts), jnp.asarray(keep)


def test_a_text_does_not_depend_on_padding_or_on_the_texts_beside_it(opt):
    spec, params, prompts, keep = opt
    together = generate(spec, params, prompts, 5, keep=keep)
    np.testing.assert_array_equal(together[:, :9], prompts)
    for row, text in enumerate(np.asarray(together)):
        whole = text[9 - int(keep[row].sum()) :]
        alone = np.asarray(forward(spec, params, jnp.asarray(whole[None])))[0].argmax(-1)
        np.testing.assert_array_equal(whole[-5:], alone[-6:-1])
    nonsense = jnp.where(keep, prompts, -100)
    np.testing.assert_array_equal(generate(spec, params, nonsense, 5, keep=keep)[:, 9:], together[:, 9:])


def test_a_text_ends_where_an_end_token_is_drawn(opt):
    spec, params, prompts, _ = opt
    free = np.asarray(generate(spec, params, prompts, 20))
    ends = free[0, 11], free[1, 10]
    stopped = np.asarray(generate(spec, params, prompts, 20, end=[int(end) for end in ends], pad=1))
    for whole, cut in zip(free, stopped, strict=True):
        found = np.flatnonzero(np.isin(whole[9:], ends))
        length = 9 + (found[0] + 1 if len(found) else 20)
        np.testing.assert_array_equal(cut[:length], whole[:length])
        np.testing.assert_array_equal(cut[length:], 1)
    alone = np.asarray(generate(spec, params, prompts[:1], 20, end=int(ends[0])))
    assert (alone[0, np.flatnonzero(alone[0, 9:] == ends[0])[0] + 9 :] == ends[0]).all(), "the end token is the padding by default"


def test_generating_stops_when_every_text_has_ended(opt, monkeypatch):
    spec, params, prompts, _ = opt
    first = int(generate(spec, params, prompts[:1], 1)[0, -1])
    draws, draw = [], module._draw
    monkeypatch.setattr(module, "_start_takes_longer", lambda params: False)  # steps in one program are drawn unseen
    monkeypatch.setattr(module, "_draw", lambda *args, **options: draws.append(args) or draw(*args, **options))
    text = generate(spec, params, prompts[:1], 30, end=first, pad=1)
    assert len(draws) == 1
    np.testing.assert_array_equal(text[0, 9:], [first, *[1] * 29])
    never = int(np.setdiff1d(np.arange(97), generate(spec, params, prompts[:1], 20)[0, 9:])[0])
    draws.clear()
    generate(spec, params, prompts[:1], 20, end=never)
    assert len(draws) == 20


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "top_k": 20, "key": jax.random.key(0)}, {"end": list(range(2, 40)), "pad": 1}]
)
def test_steps_in_one_program_draw_what_single_programs_draw(opt, monkeypatch, options):
    """What GPUs run, of more steps than are asked for: nothing shows of those behind the end."""
    spec, params, prompts, keep = opt
    apart = generate(spec, params, prompts, module._LOOK + 3, keep=keep, **options)
    monkeypatch.setattr(module, "_start_takes_longer", lambda params: True)
    monkeypatch.setattr(module, "_one_by_one", None)
    together = generate(spec, params, prompts, module._LOOK + 3, keep=keep, **options)
    np.testing.assert_array_equal(together, apart)


@pytest.mark.parametrize("together", [False, True])
def test_progress_tells_how_many_tokens_are_there(opt, monkeypatch, together):
    spec, params, prompts, _ = opt
    monkeypatch.setattr(module, "_start_takes_longer", lambda params: together)
    told, n = [], module._LOOK + 3
    generate(spec, params, prompts, n, progress=lambda *at: told.append(at))
    assert told == [(module._LOOK + 1, n), (n, n)]


def test_deeper_models_compile_nothing_more(opt, caplog, monkeypatch):
    """Where steps are programs of a block each, as they are on CPUs."""
    monkeypatch.setattr(module, "_start_takes_longer", lambda params: False)
    spec, params, prompts, keep = opt
    deeper = replace(spec, blocks=spec.blocks * 2), {**params, "blocks": params["blocks"] * 2}
    generate(spec, params, prompts, 3, keep=keep)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        generate(*deeper, prompts, 3, keep=keep)
        assert "Compiling" not in caplog.text
        generate(*deeper, prompts[:, 1:], 3, keep=keep[:, 1:])
    assert "Compiling" in caplog.text


@pytest.mark.parametrize("case", ["llama-dynamic-rope", "llama-longrope"])
def test_texts_that_outgrow_their_positions_go_on_as_in_transformers(case, built):
    """Frequencies change with the longest text of a batch, and keys in the cache keep those that they were made with."""
    model, spec, checkpoint, _ = built(case)
    prompts = np.random.default_rng(1).integers(2, 97, (2, 6)).astype(np.int32)
    keep = np.arange(6) >= np.array([[0], [4]])
    ids, mask = torch.from_numpy(prompts).long(), torch.from_numpy(keep).long()
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=1)
    ours = generate(spec, read_params(spec, checkpoint), jnp.asarray(prompts), 10, keep=jnp.asarray(keep), end=0, pad=1)
    np.testing.assert_array_equal(ours, theirs)


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": -1.0}, r"The temperature is -1\.0"),
        ({"temperature": 0.5}, "needs a PRNG key"),
        ({"top_k": 3}, "at temperature 0 none are"),
        ({"top_p": 0.5, "key": KEY}, "at temperature 0 none are"),
        ({"temperature": 1.0, "key": KEY, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "key": KEY, "top_p": 0.0}, r"top_p is 0\.0"),
        ({"temperature": 1.0, "key": KEY, "top_p": 1.5}, r"top_p is 1\.5"),
        ({"keep": jnp.arange(9)[None] < jnp.asarray([[9], [5], [9]])}, "pad on the left"),
        ({"keep": jnp.ones((3, 9), bool).at[1, 4].set(False)}, "pad on the left"),
        ({"keep": jnp.ones((3, 9), bool).at[2].set(False)}, "at least one token"),
        ({"temperature": float("nan"), "key": jax.random.key(0)}, "The temperature is nan"),
        ({"n": -1}, "n is -1; it is how many tokens"),
        ({"n": 57}, "65 tokens have to be read for 57 new ones, but the model has learned 64 positions"),
        ({"tokens": jnp.full((1, 9), 97)}, "Tokens reach from 97 to 97 but the model knows 97"),
        ({"tokens": jnp.zeros((1, 0), int)}, "at least one token"),
    ],
)
def test_what_cannot_be_generated_is_refused(opt, options, sentence):
    spec, params, prompts, _ = opt
    with pytest.raises(ValueError, match=sentence):
        generate(spec, params, **{"tokens": prompts, "n": 1, **options})


@pytest.mark.parametrize("tokens", [jnp.ones((1, 9)), jnp.ones((1, 9), bool), jnp.ones(9, jnp.int32)])
def test_prompts_are_whole_numbers(opt, tokens):
    spec, params, *_ = opt
    with pytest.raises(ValueError, match=r"Prompts are whole numbers \[batch, time\]; got "):
        unwrap(generate)(spec, params, tokens, 1)


def test_prompts_in_any_type_of_whole_numbers_are_continued_alike(opt):
    """Vocabularies reach further than the types that may hold a prompt."""
    spec, params, *_ = opt
    wider = {role: {"weight": jnp.pad(params["top"][role]["weight"], ((300, 0), (0, 0)))} for role in ("embed",)}
    params, prompts = {**params, "top": {**params["top"], **wider}}, [[7, 8, 9]]
    expected = np.asarray(generate(spec, params, jnp.asarray(prompts), 4))
    assert expected.max() > 255
    for dtype in (jnp.uint8, jnp.int8):
        found = unwrap(generate)(spec, params, jnp.asarray(prompts, dtype), 4)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected)
