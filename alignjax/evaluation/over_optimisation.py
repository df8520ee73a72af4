"""Signs that a policy exploits its reward instead of doing what the reward stands for.

What a proxy (a reward model) pays is compared with a held-out signal (a second reward model, or the testbed's gold
reward), on completions of one policy: best-of-n curves, diversity, the place of the completions in the data that the
reward model knows (`reward_domain` beside this file), and rules over the evaluations of a run that raise an alarm.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln

from alignjax.evaluation import interval


class BestOfN(NamedTuple):
  """The expected rewards of the best of n samples by the proxy, over prompts.

  Attributes:
    n: samples that the best is chosen from.
    kl: KL(best of n || one sample), nats: an upper bound, which ties of the proxy and a small vocabulary lower.
    proxy: what the choice was made by.
    gold: what it is worth by the held-out signal.
  """

  n: int
  kl: float
  proxy: interval.Estimate
  gold: interval.Estimate


def best_of_n_kl(n: ArrayLike) -> np.ndarray:
  """log n - (n - 1) / n, nats: how far the best of n independent samples is from one sample.

  Source: Nakano et al. 2021, section 3.3 (arXiv:2112.09332); a bound, exact without ties: Beirami et al. 2024
  (arXiv:2401.01879)
  """
  n = np.asarray(n, np.float64)
  return np.log(n) - (n - 1) / n


def best_of_n(proxy: ArrayLike, gold: ArrayLike, sizes: Sequence[int] = ()) -> list[BestOfN]:
  """The best-of-n curve from N samples of each prompt, every subset of n of them counted: unbiased at each n <= N.

  Args:
    proxy: rewards [P, N] of N samples of each of P prompts; of equal ones each is as likely chosen.
    gold: the held-out signal of the same samples [P, N].
    sizes: values of n; 1, 2, 4, ... and N if empty.

  Raises:
    ValueError: shapes differ, fewer than two prompts, a reward is not finite, or n is not in 1 .. N.

  Source: Nakano et al. 2021, appendix I (arXiv:2112.09332); Gao et al. 2022, section 3.1 (arXiv:2210.10760)
  """
  proxy, gold = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
  if proxy.ndim != 2 or proxy.shape != gold.shape or not (np.isfinite(proxy) & np.isfinite(gold)).all():
    raise ValueError(f"best_of_n needs finite rewards of one shape [P, N], got {proxy.shape} and {gold.shape}")
  samples = proxy.shape[1]
  sizes = sizes or sorted({2**k for k in range(samples.bit_length()) if 2**k <= samples} | {samples})
  if not all(1 <= n <= samples for n in sizes):
    raise ValueError(f"best of n from {samples} samples: n must be in 1 .. {samples}, got {list(sizes)}")
  order = np.argsort(proxy, axis=1, kind="stable")
  ranked = np.take_along_axis(proxy, order, axis=1)
  fair = _mean_of_ties(ranked, np.take_along_axis(gold, order, axis=1))
  expect = lambda weights, values: interval.mean(values @ weights)
  return [
    BestOfN(n, float(best_of_n_kl(n)), expect(w, ranked), expect(w, fair))
    for n in sizes
    for w in [rank_weights(samples, n)]
  ]


def rank_weights(samples: int, n: int) -> np.ndarray:
  """The share of all subsets of n whose best is the i-th lowest of N samples, [N]: C(i - 1, n - 1) / C(N, n)."""
  rank = np.arange(n, samples + 1)
  choose = lambda a, b: gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1)
  return np.concatenate([np.zeros(n - 1), np.exp(choose(rank - 1, n - 1) - choose(samples, n))])


def _mean_of_ties(ranked: np.ndarray, values: np.ndarray) -> np.ndarray:
  """`values` [P, N] with the mean of its group at each of a row's equal `ranked`, which ascend."""
  out = np.empty_like(values)
  for row, (keys, own) in enumerate(zip(ranked, values, strict=True)):
    group = np.unique(keys, return_inverse=True)[1]
    out[row] = (np.bincount(group, own) / np.bincount(group))[group]
  return out


def distinct_n(completions: Sequence[Sequence[Any]], n: int) -> float | None:
  """Different n-grams over all n-grams of all completions together; None where there are none.

  It falls with the number of tokens: compare equal numbers of completions.

  Source: Li et al. 2016, section 5.3 (arXiv:1510.03055)
  """
  grams = [tuple(tokens[i : i + n]) for tokens in completions for i in range(len(tokens) - n + 1)]
  return len(set(grams)) / len(grams) if grams else None


def z_scores(rewards: ArrayLike, held_out: ArrayLike) -> np.ndarray:
  """How many deviations `rewards` lie above the mean of the reward model's own held-out rewards [n >= 2].

  Raises:
    ValueError: fewer than two held-out rewards, or all are equal.
  """
  held_out = np.asarray(held_out, np.float64)
  first = held_out[0] if held_out.size else 0.0  # subtracted, so that equal rewards of any size have no deviation
  spread = (held_out - first).std(ddof=1) if held_out.size > 1 else 0.0
  if not spread > 0:
    raise ValueError("z_scores needs two or more different held-out rewards")
  return (np.asarray(rewards, np.float64) - first - (held_out - first).mean()) / spread


class Rule(NamedTuple):
  """When the evaluations of a run are cause for alarm.

  Attributes:
    name: of the alarm.
    means: what it says, for a reader.
    raised: {metric: values [n], in order} -> whether the last evaluation raises it; it is asked only where every metric
      of `needs` has two finite values or more.
    needs: metrics.
  """

  name: str
  means: str
  raised: Callable[[Mapping[str, np.ndarray]], bool]
  needs: tuple[str, ...]


class Alarm(NamedTuple):
  """A rule that an evaluation raised: at which step, which, and what it says."""

  step: int
  name: str
  means: str


def diverging(proxy: str, held_out: str, evaluations: int = 2, slack: float = 0.0) -> Rule:
  """The proxy has risen since the held-out signal's best, which lies `evaluations` or more back.

  Args:
    proxy, held_out: metrics.
    evaluations: since the best: the more, the later and the surer.
    slack: how far below its best the held-out signal must be: its noise.
  """

  def raised(values):
    best = int(np.argmax(values[held_out]))
    since = len(values[held_out]) - 1 - best
    fallen = values[held_out][best] - values[held_out][-1]
    return bool(since >= evaluations and fallen > slack and values[proxy][-1] > values[proxy][best])

  return Rule("diverging", f"{proxy} rises while {held_out} falls from its best", raised, (proxy, held_out))


def above(metric: str, limit: float, name: str = "outside") -> Rule:
  """The metric exceeds a limit, such as the share of completions outside the reward model's domain."""
  return Rule(name, f"{metric} is above {limit:g}", lambda values: bool(values[metric][-1] > limit), (metric,))


def drifting(metric: str, factor: float, name: str = "length") -> Rule:
  """The metric, a positive one, has left [first / factor, first * factor]."""

  def raised(values):
    return bool(abs(np.log(values[metric][-1] / values[metric][0])) > np.log(factor))

  return Rule(name, f"{metric} has changed by more than a factor of {factor:g}", raised, (metric,))


def collapsing(metric: str, share: float, name: str = "entropy") -> Rule:
  """The metric has fallen below a share of its first value."""
  return Rule(
    name,
    f"{metric} is below {share:g} of what it was",
    lambda values: bool(values[metric][-1] < share * values[metric][0]),
    (metric,),
  )


def default_rules(proxy: str, held_out: str = "", slack: float = 0.0) -> tuple[Rule, ...]:
  """The rules that docs/over_optimisation.md describes, on the metrics of a run's evaluations.

  Args:
    proxy: the reward that is trained on ("eval/rewards/reward_model").
    held_out: the one that is not; "" where there is none.
    slack: its noise.
  """
  return (
    *((diverging(proxy, held_out, slack=slack),) if held_out else ()),
    above("eval/domain/outside", 0.1),
    drifting("eval/completions/mean_length", 1.5),
    collapsing("eval/policy/entropy", 0.3),
    collapsing("eval/rewards/distinct", 0.7, "distinct"),
  )


def rules_of(weights: Mapping[str, float]) -> tuple[Rule, ...]:
  """The rules of an online run whose rewards have these weights: those of weight 0 are held out, but `distinct`."""
  proxy = "eval/objective/scores"  # what it is paid
  held_out = [f"eval/rewards/{name}" for name, weight in weights.items() if not weight and name != "distinct"]
  return (*(diverging(proxy, name) for name in held_out), *default_rules(proxy))


def first_raised(rows: Sequence[Mapping[str, Any]], rules: Sequence[Rule]) -> list[Alarm]:
  """The alarms that the last of the rows is the first to raise."""
  first: dict[str, Alarm] = {}
  for alarm in alarms(rows, rules):
    first.setdefault(alarm.means, alarm)
  return [alarm for alarm in first.values() if alarm.step == rows[-1]["step"]]


def alarms(rows: Sequence[Mapping[str, Any]], rules: Sequence[Rule]) -> list[Alarm]:
  """Every alarm of every evaluation, in order; a rule whose metrics a run does not log is silent.

  Args:
    rows: lines of metrics.jsonl, {"step", metric: value}; those without a rule's metrics are passed over.
    rules: see `default_rules`.
  """
  found = []
  for rule in rules:
    history = [row for row in rows if all(_finite(row.get(name)) for name in rule.needs)]
    for end in range(2, len(history) + 1):
      values = {name: np.array([row[name] for row in history[:end]], np.float64) for name in rule.needs}
      if rule.raised(values):
        found.append(Alarm(int(history[end - 1]["step"]), rule.name, rule.means))
  return sorted(found, key=lambda alarm: alarm.step)


def _finite(value: Any) -> bool:
  return isinstance(value, int | float) and bool(np.isfinite(value))
