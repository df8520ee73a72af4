"""Losses of reward models: arrays in, losses per pair, per ranking or per step out."""

import jax
import jax.numpy as jnp

from alignjax.system.ranges import NonNegative


def bradley_terry(
  chosen: jax.Array,
  rejected: jax.Array,
  margin: jax.Array | float = 0.0,
  *,
  center_coefficient: NonNegative = 0.0,
) -> jax.Array:
  """Computes -log sigmoid(chosen - rejected - margin) + center_coefficient * (chosen + rejected)^2 of each pair.

  The second term holds the mean reward near zero, which the likelihood leaves free (Eisenstein et al. 2023,
  arXiv:2312.09244); TRL's `center_rewards_coefficient`.

  Args:
    chosen: rewards of the preferred completions, any shape.
    rejected: rewards of the others, the same shape.
    margin: by how much a pair should differ, in units of reward.
    center_coefficient: weight of the centring term; 0 leaves it out.

  Source: Ouyang et al. 2022, eq. 1 (arXiv:2203.02155); margin: Touvron et al. 2023, eq. 2 (arXiv:2307.09288)
  """
  likelihood = -jax.nn.log_sigmoid(chosen - rejected - margin)
  return likelihood + center_coefficient * jnp.square(chosen + rejected)


def plackett_luce(rewards: jax.Array, ranks: jax.Array, *, center_coefficient: NonNegative = 0.0) -> jax.Array:
  """Computes -log P(ranking) of responses [..., K], each place taken in turn in proportion to exp(reward), as [...].

  Two responses without a tie are `bradley_terry`'s pair, to the last bit of its formula; the centring term is
  center_coefficient * (2 * mean reward)^2, which for two is the same. Ties: m responses of one rank came out next in
  an order that nobody recorded. The probability that they did, summed over their m! orders, is taken with Efron's
  denominators, from which a share l/m of the tied group is gone when its l-th place is taken: exact where their
  rewards are equal, and close otherwise. A tie thus pulls rewards together, and costs nothing where they are equal
  and no response is below.

  Args:
    rewards: [..., K].
    ranks: [..., K], 1 the best, equal where tied, 0 where there is no response.
    center_coefficient: weight of the centring term.

  Source: Plackett 1975, "The analysis of permutations"; ties: Efron 1977, "The efficiency of Cox's likelihood
  function for censored data"
  """
  there = ranks > 0
  tied = (ranks[..., :, None] == ranks[..., None, :]) & there[..., None, :]  # [..., i, j]
  below = (ranks[..., None, :] > ranks[..., :, None]) & there[..., None, :]
  K = rewards.shape[-1]
  place = jnp.sum(tied & jnp.tril(jnp.ones((K, K), bool), -1), axis=-1)  # of i among those tied with it, from 0
  left = 1 - place / jnp.maximum(tied.sum(axis=-1), 1)
  shares = jnp.where(tied, left[..., None], below.astype(rewards.dtype))
  shares = jnp.where(there[..., :, None], shares, jnp.eye(K))  # of what is not there: log exp(reward) - reward = 0
  denominators = jax.nn.logsumexp(rewards[..., None, :], b=shares, axis=-1)
  losses = jnp.where(there, denominators - rewards - jnp.log1p(place), 0.0)
  mean = jnp.sum(jnp.where(there, rewards, 0.0), axis=-1) / jnp.maximum(there.sum(axis=-1), 1)
  return losses.sum(axis=-1) + center_coefficient * jnp.square(2 * mean)


def step_logistic(scores: jax.Array, labels: jax.Array) -> jax.Array:
  """Computes -log sigmoid(score) where a step is right (label 1), -log sigmoid(-score) where wrong (0); any shape.

  Positions without a label get a loss too: the caller masks them. The cross-entropy of two logits, as in TRL, is this
  loss of their difference: one score says all that they do.

  Source: Lightman et al. 2023, section 2.6 (arXiv:2305.20050)
  """
  return -jax.nn.log_sigmoid(jnp.where(labels > 0, scores, -scores))
