"""Matmuls are counted as often as they run."""

import jax
import jax.numpy as jnp
import pytest

from alignjax.preflight.flops import matmul_flops

X, W = jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((4, 4), jnp.float32)
ONE = 2 * 3 * 4 * 4


def scanned(x, w):
  return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]


def branched(x, w):
  return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)


def unbounded(x, w):
  return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w, x)


@pytest.mark.parametrize(
  ("function", "times"), [(jnp.matmul, 1), (scanned, 5), (branched, 2), (unbounded, 7), (jax.jit(scanned), 5)]
)
def test_a_matmul_counts_as_often_as_it_runs(function, times):
  assert matmul_flops(jax.jit(function).trace(X, W).jaxpr.jaxpr, turns=7) == times * ONE


def test_the_gradient_of_a_matmul_is_two_more():
  both = jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(x @ w), argnums=(0, 1)))
  assert matmul_flops(both.trace(X, W).jaxpr.jaxpr) == 3 * ONE


def test_recomputed_matmuls_count_again():
  twice = lambda x, w: jnp.sum(jnp.sin(x @ w) @ w)
  count = lambda f: matmul_flops(jax.jit(jax.grad(f, argnums=(0, 1))).trace(X, W).jaxpr.jaxpr)
  assert count(jax.checkpoint(twice)) > count(twice)
