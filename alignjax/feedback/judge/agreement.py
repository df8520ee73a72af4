"""How far a judge agrees with people, and whether it may stand in for one of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from alignjax.data.quality import agreement
from alignjax.data.quality.agreement import MISSING
from alignjax.errors import InputError
from alignjax.evaluation import interval
from alignjax.evaluation.alternative_annotator import EPSILON, LEAST_PEOPLE, alternative_annotator
from alignjax.feedback.comparison import TIE, Unit
from alignjax.feedback.judge.bias import json_of, null_outcome
from alignjax.feedback.judge.pairwise import SIDES, Item

CATEGORIES = (*SIDES, TIE)


def items(units: Sequence[Unit]) -> list[Item]:
  """Returns what a judge is asked, for units of two completions.

  Raises:
    InputError: a unit has more than two completions.
  """
  found = []
  for unit in units:
    one = unit.first
    if len(one.completions) != 2:
      raise InputError(f"record {one.id!r}: {len(one.completions)} completions; agreement is of comparisons of two")
    found.append(Item(one.prompt, (one.completions[0], one.completions[1]), id=one.id, more=one.more))
  return found


def report(units: Sequence[Unit], verdicts: Sequence[str | None], epsilon: float = EPSILON) -> dict[str, Any]:
  """Measures the agreement of a judge with people, as JSON.

  The judge is compared with each person, and with the people's majority, where they have one. Null verdicts are left
  out of all of this, and counted; more than 2 % of them are a failure. If a person judged a unit several times, the
  last verdict counts, and "repeated" says how many others there are.

  Args:
    units: what people compared.
    verdicts: of the judge, one for each unit, in the order of its first comparison.
    epsilon: of the alternative annotator test.

  Raises:
    InputError: no unit has a verdict of a person.
  """
  names = sorted({name for unit in units for name in unit.verdicts})
  table = np.full((len(units), len(names)), MISSING)
  repeated = sum(len(given) - 1 for unit in units for given in unit.verdicts.values())
  for row, unit in enumerate(units):
    for name, given in unit.verdicts.items():
      table[row, names.index(name)] = _category(given[-1])  # who judged a unit twice meant the last one
  if not (table != MISSING).any():
    raise InputError("no record has a verdict of a person, so there is nothing to agree with")
  judge = np.array([_category(SIDES.index(one) if one in SIDES else one) for one in verdicts])
  count = len(CATEGORIES)
  common = agreement.majority(table, count)
  prompts = [str(unit.first.prompt) for unit in units]
  nulls = int((judge == MISSING).sum())
  found: dict[str, Any] = {
    "units": len(units),
    "categories": list(CATEGORIES),
    "repeated": repeated,
    "null": {"share": nulls / len(units), "count": nulls, "outcome": null_outcome(nulls, len(units))},
    "people": _people(table, names),
    "majority": _beside(common, judge, prompts),
    "each": {name: _beside(table[:, i], judge, prompts) for i, name in enumerate(names)},
  }
  gold = np.array([_category(unit.gold) for unit in units])
  if (gold != MISSING).any():
    found["gold"] = _beside(gold, judge, prompts)
  if len(names) < LEAST_PEOPLE:
    found["alternative_annotator"] = {"missing": f"needs {LEAST_PEOPLE} people, there are {len(names)}"}
  else:
    found["alternative_annotator"] = alternative_annotator(judge, table, names, epsilon).record()
  return found


def _category(verdict: int | str | None) -> int:
  if verdict is None:
    return MISSING
  if verdict == TIE:
    return len(SIDES)
  return int(verdict)


def _people(table: np.ndarray, names: list[str]) -> dict[str, Any]:
  """Returns the agreement among people."""
  count = len(CATEGORIES)
  pairs = agreement.pairwise(table, count, names)
  found: dict[str, Any] = {
    "kappa": [{**pair._asdict(), "kappa": _known(pair.kappa)} for pair in pairs],
    "alpha": _known(agreement.krippendorff_alpha(table, count)),
    "fleiss": None,
  }
  if len(names) > 1 and (table != MISSING).all():
    found["fleiss"] = _known(agreement.fleiss_kappa(agreement.category_counts(table, count)))
  return found


def _beside(truth: np.ndarray, judge: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
  """Returns the agreement of the judge with labels that are taken as the truth."""
  both = (truth != MISSING) & (judge != MISSING)
  if not both.any():
    return {"missing": "no unit has a verdict of both"}
  counts = agreement.confusion(truth, judge, len(CATEGORIES))
  right = (truth == judge)[both].astype(np.float64)
  return {
    "accuracy": json_of(interval.share(right, [prompt for prompt, used in zip(prompts, both, strict=True) if used])),
    "kappa": _known(agreement.cohen_kappa(counts)),
    "macro_f1": _known(agreement.macro_f1(counts)),
    "confusion": counts.tolist(),
  }


def _known(value: float) -> float | None:
  """Returns a number for JSON: None for NaN."""
  if np.isnan(value):
    return None
  return float(value)
