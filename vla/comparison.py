"""Whether one policy is better than another, and whether one world tells what another will show.

Policies are compared on the same scenes, so everything here is paired: McNemar's exact test, a bootstrap over scenes,
and how many scenes a claim would need.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vla.results import interval

DRAWS = 10_000  # of the bootstrap
ALPHA, POWER = 0.05, 0.8
MOST = 20_000  # pairs; more are not looked for


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value from the pairs in which one alone succeeded."""
    from scipy.stats import binomtest  # takes a second

    both = only_first + only_second
    return float(binomtest(only_first, both).pvalue) if both else 1.0


def bootstrap(first: Sequence[bool], second: Sequence[bool], seed: int = 0) -> tuple[float, float]:
    """95% interval (percentiles) of the difference of the rates, second minus first, over pairs drawn anew."""
    gain = np.asarray(second, float) - np.asarray(first, float)
    rows = np.random.default_rng(seed).integers(len(gain), size=(DRAWS, len(gain)))
    low, high = np.quantile(gain[rows].mean(1), [0.025, 0.975])
    return float(low), float(high)


def mean_spread(rates: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% interval (percentiles) of a mean over runs drawn anew."""
    values = np.asarray(rates, float)
    rows = np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(values[rows].mean(1), [0.025, 0.975])
    return float(low), float(high)


def over_runs(first: Sequence[float], second: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Two methods by the rates of their runs, one of each seed; gains are second minus first.

    With few runs the bootstrap's interval is too narrow, so Welch's test stands beside it (Colas et al. 2018).
    """
    random, means = np.random.default_rng(seed), []
    for rates in (np.asarray(first, float), np.asarray(second, float)):
        means.append(rates[random.integers(len(rates), size=(DRAWS, len(rates)))].mean(1))
    low, high = np.quantile(means[1] - means[0], [0.025, 0.975])
    return {
        "runs": [len(first), len(second)], "gain": float(np.mean(second) - np.mean(first)),
        "bootstrap95": [float(low), float(high)], "p": welch(first, second),
    }  # fmt: skip


def welch(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value that two means are one, whatever the variances; without any variance it is 0 or 1."""
    if np.ptp(first) == 0 and np.ptp(second) == 0:
        return 1.0 if first[0] == second[0] else 0.0
    from scipy.stats import ttest_ind

    return float(ttest_ind(first, second, equal_var=False).pvalue)


def unpaired(first: tuple[int, int], second: tuple[int, int]) -> dict[str, Any]:
    """Two rates of different episodes, successes and episodes of each; the gain is second minus first.

    interval95: Newcombe's, from those of Wilson. p: Fisher's exact test, two-sided.
    """
    from scipy.stats import fisher_exact

    (a, n), (b, m) = first, second
    p, q = a / n, b / m
    (low_p, high_p), (low_q, high_q) = interval(a, n), interval(b, m)
    down = float(np.hypot(q - low_q, high_p - p))
    up = float(np.hypot(high_q - q, p - low_p))
    tested = fisher_exact([[a, n - a], [b, m - b]])
    return {"episodes": [n, m], "gain": q - p, "interval95": [q - p - down, q - p + up], "p": float(tested[1])}


def power(pairs: int, only_first: float, only_second: float, alpha: float = ALPHA) -> float:
    """How likely McNemar's exact test finds a difference in so many pairs; the shares are those of all pairs."""
    from scipy.stats import binom  # type: ignore[attr-defined]

    differing = only_first + only_second
    if differing == 0:
        return 0.0
    counts = np.arange(pairs + 1)
    weights = binom.pmf(counts, pairs, differing)
    # At most this many of the rarer kind are still significant, for every number of differing pairs.
    critical = binom.ppf(alpha / 2, counts, 0.5).astype(int)
    critical -= binom.cdf(critical, counts, 0.5) > alpha / 2
    share = only_second / differing
    found = binom.cdf(critical, counts, share) + binom.sf(counts - critical - 1, counts, share)
    return float((weights * np.where(critical < 0, 0.0, found)).sum())


def pairs_needed(only_first: float, only_second: float, wanted: float = POWER, alpha: float = ALPHA) -> int | None:
    """Pairs after which the test finds the difference with the power `wanted`; None if MOST are not enough."""
    high = 8
    while power(high, only_first, only_second, alpha) < wanted:
        high *= 2
        if high > MOST:
            return None
    low = high // 2
    while high - low > 1:  # the power of an exact test is jagged: the answer is right within a few pairs
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, only_first, only_second, alpha) >= wanted else (middle, high)
    return high


def paired(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """The comparison of two policies on the same scenes as JSON data; gains are second minus first."""
    pairs = list(zip(first, second, strict=True))
    if not pairs:
        return {"pairs": 0}
    alone = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    shares = alone[0] / len(pairs), alone[1] / len(pairs)
    needed = pairs_needed(*shares)
    return {
        "pairs": len(pairs), "only_first": alone[0], "only_second": alone[1],
        "gain": shares[1] - shares[0], "bootstrap95": list(bootstrap(first, second)), "p": mcnemar(*alone),
        "pairs_needed": needed, "more_pairs": None if needed is None else max(0, needed - len(pairs)),
    }  # fmt: skip


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Linear correlation; None for fewer than 3 points or if one side does not vary."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation of the ranks; None as for `pearson`."""
    from scipy.stats import rankdata

    return pearson(rankdata(x).tolist(), rankdata(y).tolist()) if len(x) else None


def mmrv(simulated: Sequence[float], real: Sequence[float]) -> float | None:
    """Mean maximum rank violation (Li et al. 2024, SIMPLER): 0 if the simulator ranks as reality does.

    The greatest difference in reality that the simulator tells the other way round, averaged over all points.
    """
    if len(real) < 2:
        return None
    s, r = np.asarray(simulated, float), np.asarray(real, float)
    violated = (s[:, None] < s[None]) != (r[:, None] < r[None])
    return float((np.abs(r[:, None] - r[None]) * violated).max(1).mean())


def rates(successes: Sequence[bool]) -> dict[str, Any]:
    """Successes with Wilson's interval; a rate of None where nothing was tried."""
    done, tried = sum(successes), len(successes)
    spread = list(interval(done, tried)) if tried else None
    return {"successes": done, "episodes": tried, "rate": done / tried if tried else None, "wilson95": spread}
