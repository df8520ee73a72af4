"""The record of a comparison: read as it was written, refused where it is none."""

import json

import pytest

from alignjax.errors import InputError
from alignjax.feedback import comparison
from alignjax.feedback.comparison import TIE, Comparison, RubricName
from tests.feedback import pandalm

ONE = {"prompt": "Why?", "completions": ["a", "b"], "verdict": "second", "annotator": "ann"}


def test_a_record_is_read_as_it_was_written(tmp_path):
  one = Comparison(
    prompt=[{"role": "user", "content": "Why?"}],
    completions=("a", "b", "c"),
    verdict="third",
    annotator="ann",
    strength=2,
    id="7",
    placement=(2, 0, 1),
    rubric=RubricName("helpful", 1, "00ff"),
    seconds=3.5,
    gold=TIE,
    raw="C",
    logps={"A": -1.0},
    more={"models": ["x", "y", "z"]},
  )
  path = tmp_path / "votes.jsonl"
  path.write_text(json.dumps(one.record()) + "\n" + json.dumps(ONE) + "\n")
  read = comparison.read(str(path))
  assert read[0] == one
  assert read[0].winner == 2
  assert read[1].winner == 1
  assert read[1].placement is None


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"verdict": "third"}, 'write "first", "second", "tie" or null'),
    ({"verdict": 1}, "field 'verdict' is 1"),
    ({"verdict": TIE, "strength": 2}, "field 'strength' is 2"),
    ({"strength": True}, "field 'strength' is True"),
    ({"completions": ["a", True]}, r"field 'completions\[1\]' is a bool"),
    ({"completions": ["a"]}, "holds 1"),
    ({"placement": [0, 0]}, "field 'placement'"),
    ({"seconds": -1}, "field 'seconds'"),
    ({"rubric": {"name": "x", "version": 0, "hash": ""}}, "field 'rubric.version'"),
    ({"annotator": None}, "field 'annotator'"),
  ],
)
def test_what_is_no_comparison_is_refused(change, said):
  with pytest.raises(InputError, match=said):
    comparison.parse(ONE | change)


def test_a_verdict_that_is_left_out_is_not_null():
  with pytest.raises(InputError, match="field 'verdict' is missing"):
    comparison.parse({key: value for key, value in ONE.items() if key != "verdict"})
  assert comparison.parse(ONE | {"verdict": None}).winner is None


def test_the_order_that_is_shown_is_drawn_by_the_seed_and_the_texts():
  prompts = [[{"role": "user", "content": f"{number}"}] for number in range(400)]
  drawn = [comparison.shown_order(1, prompt, ("a", "b")) for prompt in prompts]
  assert drawn == [comparison.shown_order(1, prompt, ("a", "b")) for prompt in prompts]
  assert drawn != [comparison.shown_order(2, prompt, ("a", "b")) for prompt in prompts]
  assert 160 < sum(order == (0, 1) for order in drawn) < 240


def test_units_gather_verdicts_whatever_the_order_shown():
  swapped = ONE | {"completions": ["b", "a"], "verdict": "first", "annotator": "bob", "gold": "second"}
  records = [ONE, swapped, ONE | {"prompt": "When?", "verdict": TIE}, ONE | {"verdict": None, "annotator": "cy"}]
  first, second = comparison.units(map(comparison.parse, records))
  assert first.verdicts == {"ann": [1], "bob": [1], "cy": [None]}
  assert first.gold == 0
  assert second.verdicts == {"ann": [TIE]}
  with pytest.raises(InputError, match="two of its completions are equal"):
    comparison.units([comparison.parse(ONE | {"completions": ["a", "a"]})])


def test_pandalm_has_three_verdicts_a_unit_and_six_responses_that_are_no_text():
  units = comparison.units(pandalm.comparisons())
  assert {len(unit.verdicts) for unit in units} == {3}
  wrong = [row for row in pandalm.rows() for name in ("response1", "response2") if not isinstance(row[name], str)]
  assert len(wrong) == 6
  with pytest.raises(InputError, match=r"field 'completions\[.\]' is a bool"):
    comparison.parse(ONE | {"completions": [wrong[0]["response1"], wrong[0]["response2"]]})
