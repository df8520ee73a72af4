"""Signs that a policy exploits its reward instead of doing what the reward stands for.

The proxy's rewards (a reward model's) are compared with a held-out signal (a second reward model, or the testbed's gold
reward) on completions of one policy: best-of-n curves, diversity, the share of completions outside the reward model's
domain (`reward_domain` in this room), and rules over the evaluations of a run that raise alarms.
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
    n: the number of samples that the best is chosen from.
    kl: KL(best of n || one sample), nats: an upper bound; ties of the proxy and a small vocabulary make it smaller.
    proxy: the reward by which the best is chosen.
    gold: the held-out reward of the chosen ones.
  """

  n: int
  kl: float
  proxy: interval.Estimate
  gold: interval.Estimate


def best_of_n_kl(n: ArrayLike) -> np.ndarray:
  """Computes log n - (n - 1) / n, nats: the KL of the best of n independent samples from one sample.

  Source: Nakano et al. 2021, section 3.3 (arXiv:2112.09332); a bound, exact without ties: Beirami et al. 2024
  (arXiv:2401.01879)
  """
  n = np.asarray(n, np.float64)
  return np.log(n) - (n - 1) / n


def best_of_n(proxy: ArrayLike, gold: ArrayLike, sizes: Sequence[int] = ()) -> list[BestOfN]:
  """Computes the best-of-n curve from N samples of each prompt, over all subsets of n of them: unbiased at each n <= N.

  Args:
    proxy: rewards [P, N] of N samples of each of P prompts; each of several equal ones is chosen with equal chance.
    gold: the held-out signal of the same samples [P, N].
    sizes: values of n; 1, 2, 4, ... and N if empty.

  Raises:
    ValueError: shapes differ, a reward is not finite, there are no prompts, or n is not in 1 .. N.

  Source: Nakano et al. 2021, appendix I (arXiv:2112.09332); Gao et al. 2022, section 3.1 (arXiv:2210.10760)
  """
  proxy = np.asarray(proxy, np.float64)
  gold = np.asarray(gold, np.float64)
  if proxy.ndim != 2 or proxy.shape != gold.shape or not (np.isfinite(proxy) & np.isfinite(gold)).all():
    raise ValueError(f"best_of_n needs finite rewards of one shape [P, N], got {proxy.shape} and {gold.shape}")
  samples = proxy.shape[1]
  sizes = sizes or sorted({2**k for k in range(samples.bit_length()) if 2**k <= samples} | {samples})
  if not all(1 <= n <= samples for n in sizes):
    raise ValueError(f"best of n from {samples} samples: n must be in 1 .. {samples}, got {list(sizes)}")
  order = np.argsort(proxy, axis=1, kind="stable")
  ranked = np.take_along_axis(proxy, order, axis=1)
  ranked_gold = _mean_of_ties(ranked, np.take_along_axis(gold, order, axis=1))
  curve = []
  for n in sizes:
    weights = rank_weights(samples, n)
    kl = float(best_of_n_kl(n))
    curve.append(BestOfN(n, kl, interval.mean(ranked @ weights), interval.mean(ranked_gold @ weights)))
  return curve


def rank_weights(samples: int, n: int) -> np.ndarray:
  """Computes the share of all subsets of n whose best is the i-th lowest of N samples: C(i - 1, n - 1) / C(N, n), [N].

  Args:
    samples: N.
    n: in 1 .. N.
  """
  rank = np.arange(n, samples + 1)
  return np.concatenate([np.zeros(n - 1), np.exp(_log_choose(rank - 1, n - 1) - _log_choose(samples, n))])


def _log_choose(a: np.ndarray | int, b: int) -> np.ndarray:
  """log C(a, b)."""
  return gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1)


def _mean_of_ties(ranked: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Replaces `values` [P, N] of equal `ranked` [P, N] in a row by their mean; `ranked` ascends in a row."""
  means = np.empty_like(values)
  for row, (keys, row_values) in enumerate(zip(ranked, values, strict=True)):
    _, group = np.unique(keys, return_inverse=True)
    means[row] = (np.bincount(group, row_values) / np.bincount(group))[group]
  return means


def distinct_n(completions: Sequence[Sequence[Any]], n: int) -> float | None:
  """Computes the share of different n-grams among all n-grams of all completions; None if there are no n-grams.

  It falls with the number of tokens: compare equal numbers of completions.

  Args:
    completions: each a sequence of tokens or words.
    n: the length of the n-grams.

  Source: Li et al. 2016, section 5.3 (arXiv:1510.03055)
  """
  grams = [tuple(tokens[i : i + n]) for tokens in completions for i in range(len(tokens) - n + 1)]
  if not grams:
    return None
  return len(set(grams)) / len(grams)


def z_scores(rewards: ArrayLike, held_out: ArrayLike) -> np.ndarray:
  """Measures `rewards` in standard deviations above the mean of the reward model's held-out rewards.

  Args:
    rewards: of any shape.
    held_out: [n >= 2], of texts that the reward model was not trained on.

  Raises:
    ValueError: there are fewer than two held-out rewards, or all are equal.
  """
  held_out = np.asarray(held_out, np.float64)
  differences = held_out - held_out[:1]  # exactly 0 if all are equal, whatever their size
  spread = differences.std(ddof=1) if held_out.size > 1 else 0.0
  if not spread > 0:
    raise ValueError("z_scores needs two or more different held-out rewards")
  return (np.asarray(rewards, np.float64) - held_out[0] - differences.mean()) / spread


class Rule(NamedTuple):
  """A condition under which the evaluations of a run raise an alarm.

  Attributes:
    name: of the alarm.
    means: its meaning, for a reader.
    raised: {metric: values [n], in order} -> True if the last evaluation raises it; it is called only if every metric
      of `needs` has two finite values or more.
    needs: the metrics that it reads.
  """

  name: str
  means: str
  raised: Callable[[Mapping[str, np.ndarray]], bool]
  needs: tuple[str, ...]


class Alarm(NamedTuple):
  """A rule that an evaluation raised.

  Attributes:
    step: of the evaluation.
    name: of the rule.
    means: its meaning, for a reader.
  """

  step: int
  name: str
  means: str


def diverging(proxy: str, held_out: str, evaluations: int = 2, slack: float = 0.0) -> Rule:
  """Makes the rule that the proxy has risen since the held-out signal was best, at least `evaluations` evaluations ago.

  Args:
    proxy, held_out: metrics.
    evaluations: a larger number raises the alarm later, but with more certainty.
    slack: the amount by which the held-out signal must be below its best: its noise.
  """

  def raised(values):
    best = int(np.argmax(values[held_out]))
    since = len(values[held_out]) - 1 - best
    fallen = values[held_out][best] - values[held_out][-1]
    return bool(since >= evaluations and fallen > slack and values[proxy][-1] > values[proxy][best])

  return Rule("diverging", f"{proxy} rises while {held_out} falls from its best", raised, (proxy, held_out))


def above(metric: str, limit: float, name: str = "outside") -> Rule:
  """Makes the rule that a metric, such as the share of completions outside the reward model's domain, exceeds a limit.

  Args:
    metric: its name.
    limit: the largest value that raises no alarm.
    name: of the alarm.
  """
  return Rule(name, f"{metric} is above {limit:g}", lambda values: bool(values[metric][-1] > limit), (metric,))


def drifting(metric: str, factor: float, name: str = "length") -> Rule:
  """Makes the rule that a metric, which must be positive, has left [first / factor, first * factor].

  Args:
    metric: its name.
    factor: above 1.
    name: of the alarm.
  """

  def raised(values):
    return bool(abs(np.log(values[metric][-1] / values[metric][0])) > np.log(factor))

  return Rule(name, f"{metric} has changed by more than a factor of {factor:g}", raised, (metric,))


def collapsing(metric: str, share: float, name: str = "entropy") -> Rule:
  """Makes the rule that a metric has fallen below `share` times its first value.

  Args:
    metric: its name.
    share: in 0 .. 1.
    name: of the alarm.
  """
  return Rule(
    name,
    f"{metric} is below {share:g} of what it was",
    lambda values: bool(values[metric][-1] < share * values[metric][0]),
    (metric,),
  )


def default_rules(proxy: str, held_out: str = "", slack: float = 0.0) -> tuple[Rule, ...]:
  """Makes the rules that docs/over_optimisation.md describes, on the metrics of a run's evaluations.

  Args:
    proxy: the reward that is trained on ("eval/rewards/reward_model"); read only if there is a held-out reward.
    held_out: a reward that is not trained on; "": there is none.
    slack: its noise.
  """
  rules = (
    above("eval/domain/outside", 0.1),
    drifting("eval/completions/mean_length", 1.5),
    collapsing("eval/policy/entropy", 0.3),
    collapsing("eval/rewards/distinct", 0.7, "distinct"),
  )
  if held_out:
    return (diverging(proxy, held_out, slack=slack), *rules)
  return rules


def rules_of(weights: Mapping[str, float]) -> tuple[Rule, ...]:
  """Makes the rules of an online run: `default_rules`, and `diverging` for each held-out reward.

  Args:
    weights: of the run's rewards by name. Those of weight 0, except `distinct`, are held out.
  """
  proxy = "eval/objective/scores"  # the weighted sum of the rewards
  held_out = [f"eval/rewards/{name}" for name, weight in weights.items() if not weight and name != "distinct"]
  return (*(diverging(proxy, name) for name in held_out), *default_rules(proxy))


def first_raised(rows: Sequence[Mapping[str, Any]], rules: Sequence[Rule]) -> list[Alarm]:
  """Returns the alarms that the last of the rows is the first to raise.

  Args:
    rows: as for `alarms`, at least one.
    rules: see `default_rules`.
  """
  first: dict[str, Alarm] = {}
  for alarm in alarms(rows, rules):
    first.setdefault(alarm.means, alarm)
  return [alarm for alarm in first.values() if alarm.step == rows[-1]["step"]]


def alarms(rows: Sequence[Mapping[str, Any]], rules: Sequence[Rule]) -> list[Alarm]:
  """Returns every alarm of every evaluation, in order; a rule whose metrics a run does not log raises none.

  Args:
    rows: lines of metrics.jsonl, {"step", metric: value}; a rule skips those without its metrics.
    rules: see `default_rules`.
  """
  raised = []
  for rule in rules:
    history = [row for row in rows if all(_finite(row.get(name)) for name in rule.needs)]
    for end in range(2, len(history) + 1):
      values = {name: np.array([row[name] for row in history[:end]], np.float64) for name in rule.needs}
      if rule.raised(values):
        raised.append(Alarm(int(history[end - 1]["step"]), rule.name, rule.means))
  return sorted(raised, key=lambda alarm: alarm.step)


def _finite(value: Any) -> bool:
  return isinstance(value, int | float) and bool(np.isfinite(value))
