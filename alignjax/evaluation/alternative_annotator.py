"""The alternative annotator test: whether a judge may stand in for one of several people.

Each person in turn is left out. On every item that this person labelled, the judge and the person are compared by how
many of the others each agrees with. The judge wins against the person if its advantage is not less than the person's
minus epsilon, by a one-sided t test whose false discoveries are limited over all people.

Source: Calderon, Reichart and Dror 2025 (arXiv:2501.10970)
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from alignjax.data.quality.agreement import MISSING

EPSILON = 0.1  # the paper's for labels of a crowd; 0.2 for experts, whose labels cost more
RATE = 0.05  # of false discoveries
LEAST_ITEMS = 30  # of a person, below which the t test says nothing
LEAST_PEOPLE = 3


class Against(NamedTuple):
  """The judge against one person.

  Attributes:
    items: labelled by the judge, this person and another.
    judge: share of these on which the judge agrees with at least as many others as the person does.
    person: share on which the person agrees with at least as many others as the judge does.
    p: of the hypothesis that the judge is worse by epsilon or more; NaN if there are too few items.
    won: True if that is rejected.
  """

  items: int
  judge: float
  person: float
  p: float
  won: bool


class AlternativeAnnotator(NamedTuple):
  """The result of the test.

  Attributes:
    passed: True if the judge wins against half of the people or more; None if no person has enough items.
    winning_rate: share of the people, of those with enough items, against whom the judge wins.
    advantage: the mean of `Against.judge` over these people: the probability that the judge is as good as a person.
    people: of each person.
    epsilon: as given.
  """

  passed: bool | None
  winning_rate: float
  advantage: float
  people: dict[str, Against]
  epsilon: float

  def record(self) -> dict[str, Any]:
    """Returns it as JSON; a number that is not known is null."""
    people = {}
    for name, one in self.people.items():
      people[name] = one._asdict() | {"p": None if np.isnan(one.p) else one.p}
    if self.passed is None:
      return {"passed": None, "people": people, "epsilon": self.epsilon}
    return self._asdict() | {"people": people}


def alternative_annotator(
  judge: ArrayLike, labels: ArrayLike, names: list[str], epsilon: float = EPSILON, rate: float = RATE
) -> AlternativeAnnotator:
  """Tests a judge's labels int [items] against those of people, int [items, people].

  Args:
    judge: MISSING where it has no verdict: such items are left out.
    labels: MISSING where a person gave none.
    names: of the people.
    epsilon: what a person's label costs more than the judge's, as a share of items.
    rate: of false discoveries among the people.

  Raises:
    ValueError: there are fewer than three people.
  """
  judge = np.asarray(judge, np.int64)
  table = np.asarray(labels, np.int64)
  if len(names) < LEAST_PEOPLE or table.shape != (len(judge), len(names)):
    raise ValueError(f"labels of {LEAST_PEOPLE} people or more are needed, one column each; got shape {table.shape}")
  found = {}
  for person, name in enumerate(names):
    others = np.delete(table, person, axis=1)
    used = (judge != MISSING) & (table[:, person] != MISSING) & (others != MISSING).any(axis=1)
    others = others[used]
    by_judge = (others == judge[used, None]).sum(axis=1)
    by_person = (others == table[used, person][:, None]).sum(axis=1)
    judge_wins = (by_judge >= by_person).astype(np.float64)
    person_wins = (by_person >= by_judge).astype(np.float64)
    p = _worse(person_wins - judge_wins, epsilon)
    judge_share = person_share = float("nan")
    if used.any():
      judge_share = float(judge_wins.mean())
      person_share = float(person_wins.mean())
    found[name] = Against(int(used.sum()), judge_share, person_share, p, False)
  tested = [name for name, one in found.items() if not np.isnan(one.p)]
  if not tested:
    return AlternativeAnnotator(None, float("nan"), float("nan"), found, epsilon)
  rejected = discoveries([found[name].p for name in tested], rate)
  for name, won in zip(tested, rejected, strict=True):
    found[name] = found[name]._replace(won=bool(won))
  winning_rate = float(np.mean(rejected))
  advantage = float(np.mean([found[name].judge for name in tested]))
  return AlternativeAnnotator(winning_rate >= 0.5, winning_rate, advantage, found, epsilon)


def _worse(differences: np.ndarray, epsilon: float) -> float:
  """Returns p of the hypothesis that the mean of the differences is epsilon or more; NaN for too few of them."""
  if len(differences) < LEAST_ITEMS:
    return float("nan")
  if differences.std() == 0:
    return float(differences[0] >= epsilon)
  return float(stats.ttest_1samp(differences, epsilon, alternative="less").pvalue)


def discoveries(p: ArrayLike, rate: float) -> np.ndarray:
  """Returns which hypotheses are rejected, bool [m], at a rate of false discoveries, whatever their dependence.

  Source: Benjamini and Yekutieli 2001 (doi:10.1214/aos/1013699998)
  """
  values = np.asarray(p, np.float64)
  m = len(values)
  order = np.argsort(values)
  limits = np.arange(1, m + 1) * rate / (m * np.sum(1 / np.arange(1, m + 1)))
  below = np.flatnonzero(values[order] <= limits)
  rejected = np.zeros(m, bool)
  if below.size:
    rejected[order[: below[-1] + 1]] = True
  return rejected
