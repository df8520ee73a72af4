"""How rows are packed, padded, split and sharded shows in no preference objective, whether its pairs meet or not.

The model is an embedding of tokens and positions: that the decoder has these invariances is shown elsewhere.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import preference
from alignjax.system import sharding
from alignjax.system.microbatch import sum_over_microbatches
from tests import batches, made
from tests.algorithms.test_preference import unpack
from tests.conftest import make_mesh

OBJECTIVES = {name: (name, {}) for name in preference.LOSSES} | {
  "MPO": ("dpo:0.8+bco_pair:0.2+sft:1", {}),
  "LD-DPO": ("dpo", {"ld_alpha": 0.5}),
  "WPO": ("dpo", {"weighting": "wpo"}),
  "f-DPO": ("ipo", {"divergence": "alpha"}),
  "TR-DPO": ("dpo", {"reference": "sync"}),
  "no reference": ("aot", {"reference": "none"}),
  "TPO": ("tpo", {}),
  "TPO-L": ("cpo_simpo", {"likelihood": "third"}),
}
# Each is computed in a way of its own; the others are another formula of the same sums.
APART = ("dpo", "aot", "aot_unpaired", "sft", "orpo", "MPO", "LD-DPO", "WPO", "TR-DPO", "no reference", "TPO")
VOCAB, WIDTH = 96, 8


def forward(params, tokens, segment_ids, positions):
  return jnp.tanh(params["embed"][tokens] + params["position"][positions]), None


MODEL = types.SimpleNamespace(
  forward=forward, unembedding=lambda params: params["embed"], config=types.SimpleNamespace(score_heads=1)
)


def params(seed):
  keys = jax.random.split(jax.random.key(seed))
  draw = lambda key, rows: 0.5 * jax.random.normal(key, (rows, WIDTH))
  return {"embed": draw(keys[0], VOCAB), "position": draw(keys[1], 64)}


def gradient_and_metrics(name, batch, microbatches=1, mesh="1 device"):
  """Loss, metrics and gradient of an objective, as a step computes them."""
  loss, options = OBJECTIVES[name]
  algorithm = made.make(preference.RECIPE, MODEL, loss, microbatches, **options)
  defaults = made.hparams(preference.RECIPE, loss, **options)
  hparams = {key: 0.3 if key == "beta" else value for key, value in defaults.items()}
  frozen = {"reference": params(1)} if "reference" in algorithm.reads else {}

  @jax.jit
  def run(policy, frozen, batch):
    prepared = algorithm.prepare(algorithm.trees(frozen, policy), batch, None)
    value_and_grad = jax.value_and_grad(algorithm.loss, has_aux=True)
    return sum_over_microbatches(lambda part: value_and_grad(policy, part, hparams), prepared, microbatches)

  mesh = make_mesh(mesh)
  with jax.set_mesh(mesh):
    return jax.device_get(run(params(0), frozen, sharding.to_mesh(batch, mesh)))


@functools.cache
def packed(name="dpo"):
  loss, options = OBJECTIVES[name]
  return getattr(batches, made.kind(preference.RECIPE, loss, **options))(rows=16, length=48, pairs=2, vocab=VOCAB)


@functools.cache
def expected(name):
  return gradient_and_metrics(name, packed(name))


def padded(batch):
  """Rows of 9 more columns that hold nothing."""
  layout = ("tokens", "segment_ids", "positions", "loss_mask")
  return batch | {name: np.pad(batch[name], ((0, 0), (0, 9))) for name in layout}


VARIANTS = {
  "one pair per row, and padding": lambda name: gradient_and_metrics(name, padded(unpack(packed(name)))),
  "microbatches": lambda name: gradient_and_metrics(name, packed(name), microbatches=4),
  "8 devices": lambda name: gradient_and_metrics(name, packed(name), microbatches=2, mesh="8 devices"),
}


def assert_same(got, expected):
  """Each array to float32's rounding of its largest entries."""
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * (1 + np.abs(y).max()))
  jax.tree.map(near, got, expected)


@pytest.mark.parametrize(  # "8 devices" has microbatches too
  "variant", [pytest.param(name, marks=pytest.mark.long if name == "microbatches" else ()) for name in VARIANTS]
)
@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=() if name in APART else pytest.mark.long) for name in OBJECTIVES]
)
def test_nothing_of_the_layout_shows(name, variant):
  got = VARIANTS[variant](name)
  assert_same(got, expected(name))
  (loss, _), gradient = got
  assert np.isfinite(loss)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ["dpo", "MPO", "TPO"])
def test_an_example_of_weight_0_is_none(name):
  batch = packed(name)
  last = (np.arange(16) == 15)[:, None]
  light = batch | {"weights": np.where(last, 0, batch["weights"]).astype(np.float32)}
  without = {key: np.where(last, 0, value).astype(value.dtype) for key, value in batch.items()}
  assert_same(*(gradient_and_metrics(name, x) for x in (light, without)))
