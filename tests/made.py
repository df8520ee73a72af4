"""Algorithms as tests make them: options by keyword, another run's model in place of its directory."""

import dataclasses
from typing import Any

from alignjax.algorithms import Algorithm, Parts, Recipe, distillation
from alignjax.algorithms.algorithm import ENDLESS, Options, Special
from alignjax.losses.objective import Term, terms
from alignjax.model.decoder import Model


def recipe_of(source: Any) -> Recipe:
  """The recipe of an algorithm's module; a recipe is its own."""
  return getattr(source, "RECIPE", source)


def split(recipe: Recipe, given: dict[str, Any]) -> tuple[Options, dict[str, Model]]:
  """The options among keywords, and the models that stand for the runs of some of them."""
  models = {name: value for name, value in given.items() if isinstance(value, Model)}
  if recipe_of(recipe) is distillation.RECIPE:
    given = {"teacher": "the student as it began"} | given
  return recipe_of(recipe).options(**(given | dict.fromkeys(models, "a run"))), models


def make(
  recipe: Recipe, model: Model, loss: str = "", microbatches: int = 1, special: Special = ENDLESS, **options: Any
) -> Algorithm:
  """The algorithm of a recipe, with what it trains beside the model left to the caller."""
  settings, models = split(recipe, options)
  return recipe_of(recipe).build(model, loss, settings, Parts(microbatches, tuple(models.items()), special))


def hparams(recipe: Recipe, loss: str = "", **options: Any) -> dict[str, float]:
  """The traced hyper-parameters and their defaults."""
  return recipe_of(recipe).hparams(loss, split(recipe, options)[0])


def kind(recipe: Recipe, loss: str = "", **options: Any) -> str:
  """The kind of records."""
  return recipe_of(recipe).kind(loss, split(recipe, options)[0])


def objectives(recipe: Recipe, loss: str = "") -> tuple[Term, ...]:
  """The objectives of a loss."""
  return terms(loss, recipe_of(recipe).family)


def defaults(recipe: Recipe) -> dict[str, Any]:
  """The options and their defaults."""
  return dataclasses.asdict(recipe_of(recipe).options())
