"""Which setting each group of linears gets, where all of them together may cost so much."""

import numpy as np
from jaxtyping import Float, Int

STATES = 2**15
"""Choices for the groups so far that are followed at once."""


def allocate(
    costs: Float[np.ndarray, "groups settings"], losses: Float[np.ndarray, "groups settings"], budget: float
) -> Int[np.ndarray, " groups"]:
    """The setting of each group with which the losses add up to least, of those whose costs add up to `budget` at most.

    A multiple-choice knapsack. Lagrange's relaxation gives a price of cost at which each group chooses for itself, and so a bound;
    a dynamic programme over the groups follows every choice that could still beat the best one known. The result is the best
    there is unless that were more than STATES choices at once, and never worse than one setting for all groups that is
    within the budget. Costs and losses may change places. Raises ValueError where even the least costs exceed the budget, and
    for costs and losses that are not finite.
    """
    if not (np.isfinite(costs).all() and np.isfinite(losses).all()):
        raise ValueError("Costs and losses of all groups at all settings have to be finite; some are infinite or NaN.")
    costs, losses = costs.astype(np.float64), losses.astype(np.float64)
    if (least := costs.min(1).sum()) > budget:
        raise ValueError(f"The budget is {budget:g}, but the least that the groups can cost is {least:g}.")
    price = _price(costs, losses, budget)
    known = _filled(_best_known(costs, losses, budget, price), costs, losses, budget)
    return _better(costs, losses, budget, price, known)


def _at(table: Float[np.ndarray, "groups settings"], chosen: Int[np.ndarray, " groups"]) -> Float[np.ndarray, " groups"]:
    return np.take_along_axis(table, chosen[:, None], 1)[:, 0]


def _priced(
    costs: Float[np.ndarray, "groups settings"], losses: Float[np.ndarray, "groups settings"], price: float
) -> Int[np.ndarray, " groups"]:
    """What each group chooses at this price: the least of loss + price * cost, and of these the cheapest."""
    total = losses + price * costs
    return np.where(total <= total.min(1, keepdims=True), costs, np.inf).argmin(1)


def _price(costs: Float[np.ndarray, "groups settings"], losses: Float[np.ndarray, "groups settings"], budget: float) -> float:
    """The lowest price, nearly, at which the groups' own choices are within the budget."""

    def fits(price: float) -> bool:
        return bool(_at(costs, _priced(costs, losses, price)).sum() <= budget)

    if fits(0.0):
        return 0.0
    low, high = 0.0, float(np.ptp(losses) / max(np.ptp(costs), 1e-300)) or 1.0
    while not fits(high) and high < 1e300:
        low, high = high, 4 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _best_known(
    costs: Float[np.ndarray, "groups settings"], losses: Float[np.ndarray, "groups settings"], budget: float, price: float
) -> Int[np.ndarray, " groups"]:
    """The best within the budget of: what the groups choose at this price, the cheapest of all, and one setting for all."""
    groups, settings = costs.shape
    known = [_priced(costs, losses, price), costs.argmin(1), *(np.full(groups, s) for s in range(settings))]
    return min((chosen for chosen in known if _at(costs, chosen).sum() <= budget), key=lambda chosen: _at(losses, chosen).sum())


def _filled(
    chosen: Int[np.ndarray, " groups"],
    costs: Float[np.ndarray, "groups settings"],
    losses: Float[np.ndarray, "groups settings"],
    budget: float,
) -> Int[np.ndarray, " groups"]:
    """The choice after every change of one group that still fits, the most useful first."""
    chosen = chosen.copy()
    while True:
        left = budget - _at(costs, chosen).sum()
        gain = np.where(costs - _at(costs, chosen)[:, None] <= left, _at(losses, chosen)[:, None] - losses, 0.0)
        group, setting = np.unravel_index(gain.argmax(), gain.shape)
        if gain[group, setting] <= 0:
            return chosen
        chosen[group] = setting


def _better(
    costs: Float[np.ndarray, "groups settings"],
    losses: Float[np.ndarray, "groups settings"],
    budget: float,
    price: float,
    known: Int[np.ndarray, " groups"],
) -> Int[np.ndarray, " groups"]:
    """The best choice within the budget, if it is better than the one known."""
    groups, settings = costs.shape
    cheapest = np.append(costs.min(1)[::-1].cumsum()[::-1], 0.0)  # of the groups from each one on
    bound = np.append((losses + price * costs).min(1)[::-1].cumsum()[::-1], 0.0)
    limit = _at(losses, known).sum()
    cost, loss, steps = np.zeros(1), np.zeros(1), []
    for g in range(groups):
        cost, loss = ((a[:, None] + b[g]).ravel() for a, b in ((cost, costs), (loss, losses)))
        least = loss + price * (cost - budget) + bound[g + 1]  # no end of this beginning has less
        kept = np.flatnonzero((cost + cheapest[g + 1] <= budget) & (least < limit))
        kept = kept[np.argsort(least[kept], kind="stable")[:STATES]]
        kept = kept[np.lexsort((loss[kept], cost[kept]))]
        before = np.minimum.accumulate(np.append(np.inf, loss[kept]))[:-1]
        kept = kept[loss[kept] < before]  # those that cost less lose more
        cost, loss = cost[kept], loss[kept]
        steps.append(kept)
    if not len(loss) or loss.min() >= limit:
        return known
    chosen, state = np.empty(groups, np.int64), int(loss.argmin())
    for g in reversed(range(groups)):
        state, chosen[g] = divmod(int(steps[g][state]), settings)
    return chosen
