"""A judge beside people: PandaLM's three, and judges that are right, constant or silent."""

import json

import numpy as np
import pytest
from scipy import stats

from alignjax.data.quality.agreement import MISSING
from alignjax.errors import InputError
from alignjax.evaluation.alternative_annotator import alternative_annotator, discoveries
from alignjax.feedback import comparison
from alignjax.feedback.judge import agreement
from tests.feedback import pandalm


def test_a_judge_that_is_one_of_the_people_has_their_kappa():
  units = comparison.units(pandalm.comparisons())
  verdicts = [agreement.CATEGORIES[agreement._category(unit.verdicts["1"][0])] for unit in units]
  found = agreement.report(units, verdicts)
  assert found["each"]["1"]["kappa"] == 1
  assert found["units"] == 600
  assert [round(pair["kappa"], 4) for pair in found["people"]["kappa"]] == [0.8200, 0.8541, 0.8483]
  assert found["people"]["fleiss"] == pytest.approx(0.84077, abs=5e-6)
  assert found["people"]["alpha"] == pytest.approx(0.84086, abs=5e-6)
  assert found["majority"]["accuracy"]["value"] > 0.9
  assert found["alternative_annotator"]["passed"]
  assert found["null"]["outcome"] == "pass"
  assert json.loads(json.dumps(found)) == found


def test_a_judge_that_says_one_thing_may_stand_in_for_nobody():
  units = comparison.units(pandalm.comparisons())
  found = agreement.report(units, ["first"] * len(units))
  assert found["majority"]["kappa"] == 0
  assert found["majority"]["macro_f1"] < 0.3
  assert not found["alternative_annotator"]["passed"]
  silent = agreement.report(units, [None] * len(units))
  assert "missing" in silent["majority"]
  assert silent["null"]["outcome"] == "fail"


def test_nulls_are_counted_and_are_no_verdict():
  units = comparison.units(pandalm.comparisons())
  verdicts = [agreement.CATEGORIES[agreement._category(unit.verdicts["2"][0])] for unit in units]
  verdicts[:12] = [None] * 12
  assert agreement.report(units, verdicts)["each"]["2"]["accuracy"]["value"] == 1
  assert agreement.report(units, verdicts)["null"] == {"share": 12 / len(units), "count": 12, "outcome": "pass"}
  verdicts[:13] = [None] * 13
  assert agreement.report(units, verdicts)["null"]["outcome"] == "fail"


def test_records_without_a_person_are_refused():
  with pytest.raises(InputError, match="no record has a verdict of a person"):
    agreement.report([comparison.Unit(pandalm.comparisons()[0], {}, None)], ["first"])


def test_the_alternative_annotator_test_by_its_definition():
  rng = np.random.default_rng(0)
  truth = rng.integers(3, size=200)
  people = np.where(rng.random((200, 3)) < 0.8, truth[:, None], rng.integers(3, size=(200, 3)))
  judge = np.where(rng.random(200) < 0.8, truth, rng.integers(3, size=200))
  found = alternative_annotator(judge, people, ["a", "b", "c"])
  others = people[:, 1:]
  by_judge = (others == judge[:, None]).mean(axis=1)
  by_person = (others == people[:, :1]).mean(axis=1)
  gap = (by_person >= by_judge).astype(float) - (by_judge >= by_person)
  assert found.people["a"].p == pytest.approx(stats.ttest_1samp(gap, 0.1, alternative="less").pvalue)
  assert found.people["a"].judge == pytest.approx(np.mean(by_judge >= by_person))
  assert found.winning_rate == np.mean([one.won for one in found.people.values()])
  few = alternative_annotator(judge[:20], people[:20], ["a", "b", "c"])
  assert few.passed is None
  with pytest.raises(ValueError, match="3 people or more"):
    alternative_annotator(judge, people[:, :2], ["a", "b"])
  absent = alternative_annotator(np.full(200, MISSING), people, ["a", "b", "c"])
  assert absent.passed is None


def test_discoveries_are_scipys():
  p = np.array([0.001, 0.008, 0.039, 0.041, 0.6])
  assert (discoveries(p, 0.05) == (stats.false_discovery_control(p, method="by") <= 0.05)).all()
