"""How the benchmark of over-optimisation says where gold rewards turn, and its annotators label."""

import numpy as np
import pytest

from alignjax.environments.testbed import preference_probability
from benchmarks import length_biased
from benchmarks.turning_point import against_plain, turning_point, turns


def curve(seed, gold):
  point = lambda place, value: {"step": 5 * place, "kl": float(place), "gold": value, "proxy": place, "length": 9.0}
  return {"seed": seed, "curve": [point(place, value) for place, value in enumerate(gold, 1)]}


def test_a_run_turns_in_the_middle_of_its_best_three_and_one_that_still_rises_has_not():
  (turned,) = turns([curve(0, [0, 1, 2, 3, 2, 1, 0])])
  assert (turned["turned"], turned["step"], turned["gold"]) == (True, 20, pytest.approx(7 / 3))
  (rising,) = turns([curve(0, [0, 1, 2, 3])])
  assert (rising["turned"], rising["step"]) == (False, 20)


def test_a_condition_is_compared_with_the_same_seeds_plain_run():
  plain = [curve(seed, [0, 1, 2, 1, 0, 0]) for seed in (0, 1)]
  other = [curve(1, [0, 1, 2, 3, 4, 5]), curve(0, [0, 1, 2, 3, 4, 4.5])]
  found = against_plain(plain, other)
  assert found["turned"] == 0
  assert (found["later"], found["seeds"]) == (2, 2)
  assert found["turn_step_at_least"] == 15  # neither has turned by the last step
  assert found["of_each_seed"]["gold_from_plain_turn_to_end"] == [pytest.approx(11.5 / 3 - 2, abs=1e-3), 2.0]
  assert against_plain(plain[:1], other) == {}
  assert turning_point(other)["step"] == 30


def test_a_run_that_has_not_turned_is_censored_and_enters_no_mean_or_interval():
  turned, rising = [0, 1, 2, 1, 0, 0], [0, 1, 2, 3, 4, 5]
  plain = [curve(seed, turned) for seed in (0, 1)]
  found = against_plain(plain, [curve(0, [0, 0, 1, 2, 1, 0]), curve(1, rising)])
  assert found["of_each_seed"]["turn_step_is"] == ["exact", "at least"]
  assert not {"turn_step", "turn_step_interval", "turn_kl", "turn_kl_interval"} & found.keys()
  assert found["turn_step_at_least"] == 10
  assert (found["later"], found["turned"]) == (2, 1)

  late = [curve(seed, rising) for seed in (0, 1)]
  found = against_plain(late, [curve(0, turned), curve(1, rising)])
  assert found["of_each_seed"]["turn_step_is"] == ["at most", "unknown"]
  assert found["later"] == 0
  assert "turn_step_at_least" not in found

  found = against_plain(plain, [curve(seed, [0, 0, 1, 2, 1, 0]) for seed in (0, 1)])
  assert found["turn_step"] == 5
  assert turning_point(plain)["turn_step"] == 15
  assert "turn_step" not in turning_point(late)
  assert turning_point(late)["turned"] == 0


def test_the_larger_label_of_two_is_an_annotators_choice_as_often_as_the_annotators_choose():
  prompt, texts = "Mira has a red kite. What color is the kite?", ("The kite of Mira is red.", "Mira has a red kite.")
  expected = preference_probability(length_biased.POPULATION, prompt, *texts)
  noise = [length_biased.noise(prompt, f"{text} {k}") for k in range(3000) for text in texts]
  worth = length_biased.label([prompt] * 2, texts, [], {})
  assert length_biased.label([prompt], texts[1:], [], {}) == worth[1:]
  utilities = [worth[k] - length_biased.noise(prompt, texts[k]) for k in (0, 1)]
  wins = np.mean(np.diff(np.reshape(noise, (-1, 2)) + utilities)[:, 0] < 0)
  assert wins == pytest.approx(expected, abs=0.04)
