"""What a quantized linear tells of its own arrays."""

from dataclasses import replace
from inspect import unwrap

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given

from gptq_fn import QuantizedLinear, find_grid
from gptq_fn.testing import quantized_linears

LINEARS = quantized_linears(6, 40, 4)


def of_experts(q: QuantizedLinear) -> QuantizedLinear:
    return jax.tree.map(lambda a: jnp.stack([a, a]), q)


@given(LINEARS)
def test_sound_arrays_have_no_problems(q):
    for each in (q, of_experts(q)):
        assert each.problems() == ()
        assert each.shape == (6, 40)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda q: replace(q, codes=q.codes.at[..., 1, 2].set(16)), "the largest code is 16, which does not fit 4 bits"),
        (lambda q: replace(q, zero=q.zero.at[..., 1, 0].set(16)), "the largest zero point is 16, which does not fit 4 bits"),
        (lambda q: replace(q, scale=q.scale.at[..., 1, 0].set(jnp.nan)), "a scale is not finite"),
        (lambda q: replace(q, zero=q.zero[..., 1:, :]), "do not belong together"),
        (lambda q: replace(q, codes=q.codes[..., 1:, :]), "do not belong together"),
        (lambda q: replace(q, group_of=q.group_of[..., 1:]), "group_of has shape"),
        (lambda q: replace(q, group_of=q.group_of - 1), "group_of reaches from -1"),
        (lambda q: replace(q, bias=jnp.ones(7)), "the bias has shape"),
    ],
)
@given(q=LINEARS)
def test_what_is_wrong_is_told_in_a_sentence(wrong, sentence, q):
    for each in (q, of_experts(q)):
        assert sentence in " ".join(wrong(each).problems())


@pytest.mark.parametrize("method", ["hid", "loop", "max"])
def test_a_search_of_another_name_is_refused(method):
    with pytest.raises(ValueError, match=f"method must be minmax or mse, got '{method}'"):
        unwrap(find_grid)(jnp.ones((2, 8)), bits=4, sym=True, method=method)
