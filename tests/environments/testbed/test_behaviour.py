"""Behaviours: the mixture's frequencies, and words that say what was meant."""

import numpy as np
import pytest

from alignjax.environments.testbed import behaviour, world
from alignjax.environments.testbed.gold import Reading
from alignjax.environments.testbed.phrasing import EVALUATION, TRAINING
from alignjax.environments.testbed.world import FAMILIES


@pytest.mark.parametrize("family", behaviour.MIXTURE)
def test_mixture_is_a_distribution_over_the_grid(family):
  rng = np.random.default_rng(0)
  prompt = world.draw(rng, TRAINING, family)
  assert sum(behaviour.MIXTURE[family]) == pytest.approx(1.0)
  cells = set(behaviour.grid(prompt))
  drawn = [behaviour.draw(rng, prompt) for _ in range(2000)]
  assert set(drawn) <= cells
  answered = np.mean([cell.act == "answer" for cell in drawn])
  assert answered == pytest.approx(behaviour.MIXTURE[family][0], abs=0.04)


def test_every_family_has_a_mixture():
  assert set(behaviour.MIXTURE) == set(FAMILIES)


def test_ideal_is_in_the_grid():
  rng = np.random.default_rng(0)
  for family in FAMILIES:
    prompt = world.draw(rng, EVALUATION, family)
    assert behaviour.ideal(prompt) in set(behaviour.grid(prompt))


def test_words_say_what_was_meant():
  rng = np.random.default_rng(0)
  for _ in range(500):
    prompt = world.draw(rng, TRAINING)
    meant = behaviour.draw(rng, prompt)
    said = Reading(behaviour.realise(rng, prompt, meant))
    assert (said.polite, said.rude) == (meant.tone == "polite", meant.tone == "rude")
    assert said.refuses == (meant.act == "refuse")
    assert (said.padding > 0) == (meant.padding > 0)
    assert len(said.sentences) == 1 + (meant.tone != "plain") + meant.padding
    assert said.well_formed == 1


def test_error_is_never_the_answer():
  rng = np.random.default_rng(0)
  for _ in range(500):
    prompt = world.draw(rng, TRAINING, "arithmetic")
    response = behaviour.realise(rng, prompt, behaviour.Behaviour("err", "plain", 0))
    assert Reading(response).words[-1] != prompt.answer
