"""Losses of labelled completions as functions of arrays. Outside values: test_golden_unpaired.py."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.unpaired import LOSSES, Labelled, clamped_kl, update_mean

LABELS = jnp.array([1.0, 0.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name):
  with jax.enable_x64(True):
    ratio, step = jnp.asarray(np.random.default_rng(0).normal(size=5)), 1e-6
    total = lambda ratio: (
      LOSSES[name]
      .loss(Labelled(ratio, LABELS, kl=0.7, mean_ratio=-0.2), beta=0.3, desirable_weight=1.3, undesirable_weight=0.8)
      .sum()
    )
    gradient = jax.grad(total)(ratio)
    for k, slope in enumerate(gradient):
      one = step * jnp.eye(5)[k]
      assert float(total(ratio + one) - total(ratio - one)) / (2 * step) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("constant", [0.0, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_finite_at_extreme_ratios(name, constant, label):
  ratio = jnp.array([-1e4, -1.0, 0.0, 1.0, 1e4])
  labelled = lambda ratio: Labelled(ratio, jnp.full(5, label), kl=constant, mean_ratio=-constant)
  losses, gradient = jax.value_and_grad(lambda ratio: LOSSES[name].loss(labelled(ratio), beta=1.0).sum())(ratio)
  assert np.isfinite(losses)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_desirable_completions_go_up_and_undesirable_ones_down(name):
  slopes = jax.grad(lambda ratio: LOSSES[name].loss(Labelled(ratio, LABELS)).sum())(jnp.zeros(5))
  np.testing.assert_array_equal(np.sign(slopes), 1 - 2 * LABELS)


@pytest.mark.parametrize("name", LOSSES)
def test_weights_are_of_their_class(name):
  labelled = Labelled(jnp.linspace(-1, 1, 5), LABELS)
  weighted = LOSSES[name].loss(labelled, desirable_weight=2.0, undesirable_weight=3.0)
  np.testing.assert_allclose(weighted, LOSSES[name].loss(labelled) * (3 - LABELS), rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_says_where_it_comes_from_and_every_keyword_has_a_default(name):
  last = inspect.getdoc(LOSSES[name].loss).splitlines()[-1]
  assert re.match(r"Source: \S.*\d{4}", last), f"{name}: the docstring's last line is no source"
  _, *rest = inspect.signature(LOSSES[name].loss).parameters.values()
  assert all(p.kind is p.KEYWORD_ONLY and isinstance(p.default, float) for p in rest)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_a_loss_of_more_than_its_example_states_its_scope(name):
  assert re.search(r"[Ss]cope", inspect.getdoc(LOSSES[name].loss))


def test_kl_is_clamped_below_and_its_variance_is_not():
  ratio, weights = jnp.array([[-3.0, 1.0], [7.0, 0.0]]), jnp.array([[1.0, 1.0], [0.0, 0.0]])
  assert tuple(map(float, clamped_kl(ratio, weights))) == (0.0, 4.0)
  assert tuple(map(float, clamped_kl(-ratio, weights))) == (1.0, 4.0)
  assert tuple(map(float, clamped_kl(ratio, 0 * weights))) == (0.0, 0.0)


def test_kl_is_a_constant():
  slope = jax.grad(lambda ratio: clamped_kl(ratio, jnp.ones(5))[0])(jnp.arange(5.0))
  assert not slope.any()


def test_a_running_mean_is_the_mean_of_all_that_it_has_seen():
  rng = np.random.default_rng(0)
  values, weights = rng.normal(size=(6, 4)), rng.uniform(size=(6, 4))
  weights[2] = 0  # a step without examples
  mean = count = jnp.zeros(())
  for v, w in zip(values, weights, strict=True):
    mean, count = update_mean(mean, count, jnp.asarray(v), jnp.asarray(w))
  assert float(mean) == pytest.approx(np.average(values, weights=weights), abs=1e-6)
  assert float(count) == pytest.approx(weights.sum(), rel=1e-6)
  nothing = update_mean(jnp.zeros(()), jnp.zeros(()), jnp.zeros(3), jnp.zeros(3))
  assert tuple(map(float, nothing)) == (0.0, 0.0)
