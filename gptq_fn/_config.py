"""What to quantize and how: frozen descriptions that refuse what is impossible when they are built."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from jaxtyping import Array, Float

from gptq_fn._grid import Grid

Bits = Literal[2, 3, 4, 8]
Order = Literal["natural", "act", "group"]
Search = Literal["minmax", "mse", "hid", "loop"]
Seen = Literal["routed", "all"]
Refinement = Literal["descent", "refit"]

_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("bits", "min_rows"), (int,)),
    **dict.fromkeys(("sym", "static_groups", "negative_scales", "sequential", "untie"), (bool,)),
    "group_size": (int, type(None)),
    **dict.fromkeys(("damp", "alpha"), (float, int, type(None))),
}
"""What the fields that are one number hold: nothing that only equals it, for shapes need whole numbers and JSON knows no others."""

FindGrid = Callable[[Float[Array, "out group"], Float[Array, " group"], "QuantConfig"], Grid]
"""A search of your own: the grid of each row of a group of weights, float32, each row for itself. Beside the weights it gets what a
squared rounding error of each column costs, once the columns behind make up for it, and the configuration. Columns that only fill
up a narrower last group are weights of 0 whose errors cost 0. It is called while a program is traced, and is part of the key of that
program: a lambda made anew for each call compiles anew. What it returns is rounded to what checkpoints store: scales to float16, zero
points to codes, where `config.sym` to the middle one."""


@dataclass(frozen=True)
class Rule:
    """An exception for the linears whose checkpoint name matches `pattern` from its start (as `re.match` does).

    `config` replaces the whole configuration of these linears; None leaves them unquantized.
    """

    pattern: str
    config: "QuantConfig | None" = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"Rule pattern {self.pattern!r} is not a regular expression: {error}.") from None
        if self.config is not None and self.config.rules:
            raise ValueError(f"Rule {self.pattern!r}: its config has rules of its own; put all rules into the outer config.")


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize. Hashable: it is a key of compiled programs."""

    bits: Bits = 4
    """Bits of one code."""
    group_size: int | None = 128
    """Consecutive inputs that share a scale; None means that a whole row does."""
    sym: bool = True
    """Symmetric grids: the zero point is the middle code. False lets every group choose its own."""
    damp: float | None = None
    """Added to the Hessian's diagonal, relative to the diagonal's mean; raised where the factorization fails. None means
    inputs / rows, from 0.01 to 1: what few calibration tokens say of many inputs is mostly noise."""
    order: Order = "group"
    """Order of the columns: as stored, by importance ("act", known as desc_act), or by importance inside and among
    the stored groups ("group": g_idx stays trivial, so engines that refuse desc_act load the result)."""
    static_groups: bool = False
    """Take all scales from the original weights, by stored position, before the first column is rounded."""
    grid: Search | FindGrid = "mse"
    """How a group's scale is chosen: cover the range ("minmax"), or search for what makes an error least: that of rounding
    ("mse"), the same weighted by what each column's error costs once the columns behind make up for it ("hid"), or the
    error that GPTQ itself makes in the group ("loop"; the slowest). Or a function of your own: see `FindGrid`."""
    negative_scales: bool = False
    """Symmetric grids that are searched for may get negative scales, which put the level that has no opposite on the positive side."""
    refine: tuple[Refinement, ...] = ()
    """What follows the pass over the columns, in this order and as often as named: "descent" gives each column in turn its best
    codes for all others, "refit" gives each row its best scales for its codes. Neither ever raises the error under the Hessian."""
    sequential: bool = True
    """Linears of one block see the rounding errors of those before them."""
    alpha: float | None = 0.0
    """How much of what rounding before a linear changed in its inputs the linear itself makes good, from 0 to 1. Unless 0, the float
    model runs beside, with as many samples as it needs to tell. None means the best for every eighth of these, which is then held
    out: for each group of linears that are solved together; and 0 where the float model cannot run beside."""
    experts: Seen = "routed"
    """The calibration tokens that an expert sees: those routed to it, or all of them."""
    min_rows: int = 32
    """A linear that fewer calibration tokens than this reach is rounded to nearest; its report says so."""
    untie: bool = False
    """Give a model whose head is its embedding a head of its own, where a rule quantizes it."""
    rules: tuple[Rule, ...] = ()
    """Exceptions by name; the first match wins. Routers and the head are quantized only where a rule with a config names them."""

    def __post_init__(self) -> None:
        for name, kinds in _TYPES.items():
            if type(value := getattr(self, name)) not in kinds:
                raise ValueError(f"{name} must be {' or '.join(k.__name__.removesuffix('Type') for k in kinds)}, got {value!r}.")
        for name, kind in (("bits", Bits), ("order", Order), ("grid", Search), ("experts", Seen)):
            value = getattr(self, name)
            if value not in get_args(kind) and not (name == "grid" and callable(value)):
                raise ValueError(f"{name} must be one of {', '.join(map(str, get_args(kind)))}, got {value!r}.")
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise ValueError(f"rules must be a tuple of Rule, got {self.rules!r}.")
        if not isinstance(self.refine, tuple) or not set(self.refine) <= set(get_args(Refinement)):
            steps = " and ".join(map(repr, get_args(Refinement)))
            raise ValueError(f"refine must be a tuple of {steps}, as often as wanted, got {self.refine!r}.")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive, or None for one group a row, got {self.group_size}.")
        if self.grid == "loop" and self.static_groups:
            raise ValueError(
                "grid='loop' rounds a group to learn what a scale costs, but static_groups takes all scales before the first column is "
                "rounded, got both; use grid='hid', or leave static_groups out."
            )
        if self.min_rows < 1:
            raise ValueError(
                f"min_rows must be at least 1, for a linear that no calibration token reaches can only be rounded, got {self.min_rows}."
            )
        if self.damp is not None and not 0 <= self.damp < 1:
            raise ValueError(f"damp is relative to the Hessian's mean diagonal and must lie in [0, 1), got {self.damp}.")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a part of the way to the asymmetric target and must lie in [0, 1], got {self.alpha}.")

    def resolve(self, name: str, *, usual: bool = True) -> "QuantConfig | None":
        """The configuration of the linear called `name`, without rules; None when it stays as it is.

        `usual=False` is for linears that stay as they are unless a rule names them.
        """
        for rule in self.rules:
            if re.match(rule.pattern, name):
                return rule.config
        return replace(self, rules=()) if usual else None

    @property
    def asymmetric(self) -> bool:
        """Whether some linear needs the float model to run beside the quantized one."""
        return any(config is not None and config.alpha != 0 for config in (self, *(rule.config for rule in self.rules)))

    def alone(self, because: str) -> "QuantConfig":
        """The same where the float model cannot run beside: an alpha that was to be chosen is 0. Raises ValueError for others."""
        given = [c.alpha for c in (self, *(rule.config for rule in self.rules)) if c is not None and c.alpha]
        if given:
            raise ValueError(
                f"alpha is {given[0]}, for which the float model has to run beside the quantized one, but {because}; set alpha=0."
            )
        rules = tuple(rule if rule.config is None else replace(rule, config=replace(rule.config, alpha=0.0)) for rule in self.rules)
        return replace(self, alpha=0.0, rules=rules)

    @property
    def either_sign(self) -> bool:
        """Whether scales of either sign are tried."""
        return self.negative_scales and self.sym and self.grid != "minmax"

    @property
    def max_code(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def grid_name(self) -> str:
        """How `grid` is called; a function by its module and name."""
        if isinstance(self.grid, str):
            return self.grid
        return f"{self.grid.__module__}.{getattr(self.grid, '__qualname__', type(self.grid).__qualname__)}"

    def as_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready data."""
        rules = [{"pattern": rule.pattern, "config": rule.config and rule.config.as_dict()} for rule in self.rules]
        return asdict(replace(self, rules=())) | {"grid": self.grid_name, "rules": rules}


Preset = Literal["fast", "default", "best"]

PRESETS: dict[Preset, dict[str, Any]] = {
    "fast": {},
    "default": {"grid": "hid", "negative_scales": True, "alpha": None},
    "best": {"grid": "hid", "negative_scales": True, "alpha": None, "refine": ("descent", "refit", "descent", "refit")},
}
"""What each preset changes of `QuantConfig()`, which is plain GPTQ: what pays most for its time, and all that pays."""


def preset(name: Preset, **changes: Any) -> QuantConfig:
    """The configuration of this name, with `changes` to its fields. Raises ValueError for another name."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}.")
    return QuantConfig(**{**PRESETS[name], **changes})
