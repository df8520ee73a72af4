"""What an algorithm says of its rows holds: attention that lays so many texts of a row apart loses none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import ALGORITHMS
from alignjax.model import decoder
from alignjax.model.attention import cudnn
from alignjax.model.attention.form import Segments
from alignjax.types import Batch
from tests import batches, made, short_run
from tests.algorithms.test_algorithm import OFFLINE

CASES = {name: (name, "", {}) for name in OFFLINE} | {
  "triples": ("preference", "tpo", {}),
  "rankings": ("reward", "plackett_luce", {}),
  "no pairs, mismatched": ("unpaired", "kto", {}),
}


@functools.cache
def weights(config):
  """Two trees of weights, which do not depend on how attention is computed."""
  init = jax.jit(decoder.make(config).init)
  return tuple(init(jax.random.key(seed)) for seed in (0, 1))


def value(config, algorithm, loss, options, batch):
  module = ALGORITHMS[algorithm]
  model = decoder.make(dataclasses.replace(config, head=module.head))
  recipe = made.make(module, model, loss, **options)
  hparams = {key: jnp.float32(value) for key, value in made.hparams(module, loss, **options).items()}
  params, other = weights(dataclasses.replace(model.config, attention="xla"))

  @jax.jit
  def run(params, batch):
    others = dict.fromkeys((*recipe.constant, *recipe.synced), other)
    prepared = recipe.prepare(recipe.trees(others, params, hparams), batch, jax.random.key(0))
    return recipe.loss(recipe.for_loss(others) | params, prepared, hparams)[0]

  return run(params, Batch(batch, running=dict(recipe.running)))


@pytest.mark.parametrize("name", CASES)
def test_laid_apart_by_what_the_algorithm_says_the_loss_is_the_same(name, config, monkeypatch):
  case, config = CASES[name], dataclasses.replace(config, layers=1)
  kind = short_run.data_kind(*case[:2])
  batch = getattr(batches, "mismatched" if kind == "unpaired" else kind)(4, 32, 2, config.vocab)
  expected = value(config, *case, batch)
  monkeypatch.setattr(cudnn, "limit", lambda form, q, segments: "" if segments.most else pytest.fail("not said"))
  monkeypatch.setattr(cudnn, "KERNEL", "xla")
  found = value(dataclasses.replace(config, attention="cudnn"), *case, batch)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_forward_of_segments_is_one_of_their_ids(config):
  model, batch = decoder.make(config), batches.sft(2, 32, 2, config.vocab)
  params = jax.jit(model.init)(jax.random.key(0))
  forward = functools.partial(model.forward, params, batch["tokens"], positions=batch["positions"])
  plain, said = (forward(segment_ids=ids)[0] for ids in (batch["segment_ids"], Segments(batch["segment_ids"], 2)))
  np.testing.assert_array_equal(plain, said)
