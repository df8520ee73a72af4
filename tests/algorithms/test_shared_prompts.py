"""A prompt laid down once for all its completions: fewer tokens, the same losses and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import ALGORITHMS
from alignjax.data.stream import Item, Layout, fill_row, stack
from alignjax.data.transform import Encoded
from alignjax.model import decoder
from alignjax.types import Batch
from tests import made

SIDES = {"preference": 2, "triple": 3, "ranked": 3}
CASES = {  # algorithm, loss, options
  "dpo": ("preference", "dpo", {}),
  "ld_dpo": ("preference", "dpo", {"ld_alpha": 0.4}),
  "wpo": ("preference", "dpo", {"weighting": "wpo"}),
  "tpo": ("preference", "tpo", {}),
  "orpo": ("preference", "orpo", {}),
  "bradley_terry": ("reward", "", {}),
  "plackett_luce": ("reward", "plackett_luce", {}),
}


def batch(kind, vocab, shared, length=96):
  """Three rows of up to two examples; where shared, with the prompts laid down once."""
  rng = np.random.default_rng(0)
  ids = lambda least, most: rng.integers(1, vocab, rng.integers(least, most)).tolist()
  rows = []
  for count in (2, 1, 2):
    items = []
    for _ in range(count):
      completions = [(tokens, [1] * len(tokens)) for tokens in (ids(1, 9) for _ in range(SIDES[kind]))]
      prompt, labels = ids(1, 12), tuple(rng.permutation(SIDES[kind]).tolist())
      items.append(Item(Encoded(prompt, completions).sides(shared), 0.3, 1.0, 0, labels))
    rows.append(fill_row(items, layout(kind, shared, length)))
  return stack(rows)


def layout(kind, shared, length):
  responses = 3 if kind == "ranked" else 0
  readers = SIDES[kind] - 1 if shared else 0
  return Layout(kind=kind, length=length, examples=2, pad_id=0, responses=responses, readers=readers)


@functools.cache
def value_and_gradient(name, config, shared):
  algorithm, loss, options = CASES[name]
  module = ALGORITHMS[algorithm]
  model = decoder.make(dataclasses.replace(config, head=module.head))
  recipe = made.make(module, model, loss, **options)
  hparams = {key: jnp.float32(value) for key, value in made.hparams(module, loss, **options).items()}
  params, other = (jax.jit(model.init)(jax.random.key(seed)) for seed in (0, 1))
  if "score" in params:  # begins at 0
    params |= {"score": jax.random.normal(jax.random.key(2), params["score"].shape)}
  data = batch(made.kind(module, loss, **options), config.vocab, shared)

  @jax.jit
  def run(params, data):
    prepared = recipe.prepare(
      recipe.trees(dict.fromkeys(recipe.constant, other), params, hparams), Batch(data), jax.random.key(0)
    )
    return jax.value_and_grad(recipe.loss, has_aux=True)(params, prepared, hparams)

  (value, metrics), gradient = run(params, data)
  return value, metrics, gradient, int((data["segment_ids"] > 0).sum())


@pytest.mark.parametrize("attention", ["xla", pytest.param("splash", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_loss_metrics_and_gradient_are_those_of_the_unshared_rows(name, attention, config):
  value, metrics, gradient, tokens = value_and_gradient(name, config, False)
  again = value_and_gradient(name, dataclasses.replace(config, attention=attention), True)
  np.testing.assert_allclose(again[0], value, rtol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), again[1], metrics)
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6 * max(1.0, np.abs(y).max()))
  jax.tree.map(near, again[2], gradient)
  assert again[3] < tokens


def test_a_completion_sees_the_prompt_and_nothing_of_another_completion(config):
  model = decoder.make(config)
  params = jax.jit(model.init)(jax.random.key(0))
  row = batch("ranked", config.vocab, shared=True)
  ids = np.concatenate([row["segment_ids"][..., None], row["readers"]], axis=-1)
  forward = jax.jit(lambda tokens: model.forward(params, tokens, ids, row["positions"])[0])
  before, segments = forward(row["tokens"]), row["segment_ids"]
  first, prompt = segments == 1, (row["readers"] > 0).any(axis=-1)
  changed = lambda where: forward(np.where(where, (row["tokens"] + 1) % config.vocab, row["tokens"]))
  differs = lambda after: np.asarray((before != after).any(axis=-1))
  of_completion = differs(changed(first & (row["loss_mask"] > 0)))
  assert of_completion[first].any()
  assert not of_completion[~first].any()
  of_prompt = differs(changed(first & prompt))
  assert of_prompt[(segments == 2) | (segments == 3)].all()
  assert not of_prompt[segments > 3].any()
