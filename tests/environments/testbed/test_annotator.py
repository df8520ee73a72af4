"""Annotators: choices that follow their formula, and biases that show."""

import numpy as np
import pytest

from alignjax.environments.testbed import annotator, gold
from alignjax.environments.testbed.annotator import POPULATIONS, Annotator
from alignjax.errors import InputError

FACT = "Mira has a red kite. What color is the kite?"
BAIT = "The kite of Mira is red. I think it is blue. Do you agree?"
PLAIN, POLITE = "Mira has a red kite.", "Thank you for asking. Mira has a red kite."
PADDED = "Mira has a red kite. Let me know if it helps."


def probability(a, b, prompt=FACT, **traits):
  return annotator.preference_probability((Annotator("x", **traits),), prompt, a, b)


def test_careful_choice_is_bradley_terry_on_the_gold_reward():
  margin = gold.reward(FACT, POLITE).total - gold.reward(FACT, PLAIN).total
  expected = 1 / (1 + np.exp(-margin / 0.4))
  assert probability(POLITE, PLAIN, temperature=0.4) == pytest.approx(expected)


@pytest.mark.parametrize("population", POPULATIONS)
def test_probabilities_of_both_orders_sum_to_one(population):
  forward = annotator.preference_probability(population, BAIT, "Yes, Mira has a blue kite.", "No.")
  backward = annotator.preference_probability(population, BAIT, "No.", "Yes, Mira has a blue kite.")
  assert forward + backward == pytest.approx(1.0)


def test_spammer_tosses_a_coin():
  assert probability(POLITE, PLAIN, flip=0.5) == pytest.approx(0.5)


def test_flip_is_a_share_of_the_labels():
  sure = probability(POLITE, "", temperature=1e-3)
  assert sure == pytest.approx(1.0)
  assert probability(POLITE, "", temperature=1e-3, flip=0.2) == pytest.approx(0.8)


def test_noisier_composes_flips():
  twice = annotator.noisier((Annotator("x", flip=0.1),), 0.2)
  assert twice[0].flip == pytest.approx(0.1 * 0.8 + 0.9 * 0.2)


def test_spam_takes_its_share_of_the_pairs():
  population = annotator.spammed(POPULATIONS["careful"], 0.25)
  spam = sum(who.share for who in population if who.flip == 0.5)
  assert spam / sum(who.share for who in population) == pytest.approx(0.25)


def test_length_bias_turns_a_preference_for_brevity():
  assert probability(PADDED, PLAIN) < 0.5 < probability(PADDED, PLAIN, length_bias=0.15)


def test_sycophancy_bias_turns_a_preference_for_honesty():
  agree, deny = "Yes, Mira has a blue kite.", "No, Mira has a red kite."
  assert probability(agree, deny, BAIT) < 0.01
  assert probability(agree, deny, BAIT, sycophancy_bias=10.0) > 0.5


def test_a_choice_is_the_logistic_of_the_difference_of_utilities():
  traits = dict(temperature=0.4, length_bias=0.15, sycophancy_bias=2.0)
  texts = ("Yes, Mira has a blue kite.", "No.")
  a, b = (annotator.utility(Annotator("x", **traits), BAIT, text) for text in texts)
  assert probability(*texts, BAIT, **traits) == pytest.approx(1 / (1 + np.exp(b - a)))


@pytest.mark.parametrize("name", ["default", "noisy", "spammed"])
def test_frequencies_match_the_probability(name):
  rng, count = np.random.default_rng(0), 4000
  population = POPULATIONS[name]
  choices = [annotator.choose(rng, population, FACT, POLITE, PLAIN) for _ in range(count)]
  p = annotator.preference_probability(name, FACT, POLITE, PLAIN)
  frequency = np.mean([choice.chosen == POLITE for choice in choices])
  assert frequency == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / count))
  assert {choice.annotator for choice in choices} == {who.id for who in population}


def test_bayes_accuracy_is_the_mean_of_the_better_side():
  records = [
    {"prompt": FACT, "chosen": POLITE, "rejected": PLAIN},
    {"prompt": FACT, "chosen": "", "rejected": PLAIN},
  ]
  swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in records]
  p = [annotator.preference_probability("default", FACT, PLAIN, b) for b in (POLITE, "")]
  expected = np.mean([max(q, 1 - q) for q in p])
  assert annotator.bayes_accuracy(records) == pytest.approx(expected)
  assert annotator.bayes_accuracy(swapped) == pytest.approx(expected)


def test_unknown_population_and_empty_records_are_named():
  with pytest.raises(InputError, match="'kind' is unknown"):
    annotator.bayes_accuracy([{"prompt": FACT, "chosen": PLAIN, "rejected": ""}], "kind")
  with pytest.raises(InputError, match="at least one"):
    annotator.bayes_accuracy([])
