"""What can be asked for, and what is refused when it is asked."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_fn import QuantConfig, Rule, preset
from gptq_fn.testing import configs


@given(config=configs())
def test_a_config_is_a_key(config):
    assert {config: 1}[QuantConfig(**vars(config))] == 1
    assert config.max_code == 2**config.bits - 1


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8, got 5."),
        ({"order": "desc_act"}, "order must be one of natural, act, group, got 'desc_act'."),
        ({"grid": "max"}, "grid must be one of minmax, mse, hid, loop, got 'max'."),
        ({"group_size": 0}, "group_size must be positive, or None for one group a row, got 0."),
        ({"group_size": -1}, "group_size must be positive, or None for one group a row, got -1."),
        (
            {"grid": "loop", "static_groups": True},
            "grid='loop' rounds a group to learn what a scale costs, but static_groups takes all scales before the first column "
            "is rounded, got both; use grid='hid', or leave static_groups out.",
        ),
        ({"damp": -0.1}, "damp is relative to the Hessian's mean diagonal and must lie in [0, 1), got -0.1."),
        ({"damp": 1.0}, "damp is relative to the Hessian's mean diagonal and must lie in [0, 1), got 1.0."),
        ({"rules": ("a",)}, "rules must be a tuple of Rule, got ('a',)."),
        ({"rules": [Rule("a")]}, "rules must be a tuple of Rule, got [Rule(pattern='a', config=None)]."),
        ({"min_rows": 0}, "min_rows must be at least 1, for a linear that no calibration token reaches can only be rounded, got 0."),
        ({"bits": 4.0}, "bits must be int, got 4.0."),
        ({"group_size": 64.0}, "group_size must be int or None, got 64.0."),
        ({"group_size": True}, "group_size must be int or None, got True."),
        ({"group_size": np.int64(64)}, "group_size must be int or None, got np.int64(64)."),
        ({"damp": np.float32(0.5)}, "damp must be float or int or None, got np.float32(0.5)."),
        ({"sym": "no"}, "sym must be bool, got 'no'."),
        ({"damp": float("nan")}, "damp is relative to the Hessian's mean diagonal and must lie in [0, 1), got nan."),
    ],
)
def test_an_impossible_config_is_refused_in_a_sentence(wrong, sentence):
    with pytest.raises(ValueError, match="got") as error:
        QuantConfig(**wrong)
    assert str(error.value) == sentence


def test_presets_are_configs_with_changes():
    assert preset("fast") == QuantConfig()
    assert preset("best", bits=3, alpha=0.0) == replace(preset("best"), bits=3, alpha=0.0)
    assert preset("default", sym=False).grid == preset("default").grid != QuantConfig().grid
    with pytest.raises(ValueError, match="preset must be one of fast, default, best, got 'good'"):
        preset("good")


def test_where_the_float_model_cannot_run_beside_no_alpha_is_chosen():
    config = QuantConfig(alpha=None, rules=(Rule("a", QuantConfig(alpha=None)), Rule("b")))
    assert config.alone("it is away") == QuantConfig(rules=(Rule("a", QuantConfig()), Rule("b")))
    with pytest.raises(ValueError, match=r"alpha is 0\.5, .* but it is away; set alpha=0"):
        QuantConfig(rules=(Rule("a", QuantConfig(alpha=0.5)),)).alone("it is away")


def test_a_rule_is_refused_when_it_is_built():
    with pytest.raises(ValueError, match=r"Rule pattern '\(' is not a regular expression"):
        Rule("(")
    with pytest.raises(ValueError, match="put all rules into the outer config"):
        Rule("a", QuantConfig(rules=(Rule("b"),)))


PATTERNS = (r"model\.layers\.0\.", r".*q_proj", r"model\.layers\.\d+\.mlp", r".*", r"q_proj")


@given(
    chosen=st.lists(st.sampled_from(PATTERNS), unique=True),
    layer=st.integers(0, 2),
    linear=st.sampled_from(("self_attn.q_proj", "mlp.up_proj")),
)
def test_the_first_rule_that_matches_from_the_start_wins(chosen, layer, linear):
    name = f"model.layers.{layer}.{linear}"
    matching = {  # written out, so that no regular expression checks itself
        PATTERNS[0]: layer == 0,
        PATTERNS[1]: linear == "self_attn.q_proj",
        PATTERNS[2]: linear == "mlp.up_proj",
        PATTERNS[3]: True,
        PATTERNS[4]: False,
    }
    answers = {pattern: None if i % 2 else QuantConfig(8, 16 + i) for i, pattern in enumerate(PATTERNS)}
    config = QuantConfig(3, 64, rules=tuple(Rule(pattern, answers[pattern]) for pattern in chosen))
    expected = next((answers[pattern] for pattern in chosen if matching[pattern]), QuantConfig(3, 64))
    assert config.resolve(name) == expected
