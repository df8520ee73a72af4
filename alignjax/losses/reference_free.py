"""Losses over pairs of completions that need no reference model; see `preference` for what a loss is.

Beside the loss that gave it its name, TRL's CPO trainer has hinge and ipo: here they are those of `preference`, with
a reference of 0, and "+sft" for the likelihood term.
"""

import jax
import jax.numpy as jnp

from alignjax.losses import divergence
from alignjax.losses.objective import by_name
from alignjax.losses.pair import Pair, PairObjective, Sides, sums
from alignjax.losses.preference import nll_metrics, sft, smoothed
from alignjax.system.ranges import Finite, FlipShare, NonNegative, Positive


def orpo(pair: Pair, *, beta: Positive = 0.1) -> jax.Array:
  """Computes nll - beta * log sigmoid(log odds ratio) of the likelihoods per token; beta is the paper's lambda.

  The likelihood term is over the chosen completions' tokens. TRL's covers their prompts too, which the paper does not
  ask for.

  Source: Hong et al. 2024, eq. 6 and 7 (arXiv:2403.07691)
  """
  return sft(pair) - beta * jax.nn.log_sigmoid(log_odds_ratio(pair))


def cpo(
  pair: Pair, *, beta: Positive = 0.1, label_smoothing: FlipShare = 0.0, nll_weight: NonNegative = 1.0
) -> jax.Array:
  """Computes -log sigmoid(beta * (log p(chosen) - log p(rejected))), smoothed as in `dpo`, plus nll_weight * `sft`.

  Source: Xu et al. 2024 (arXiv:2401.08417)
  """
  return smoothed(beta * (pair.chosen - pair.rejected), label_smoothing) + nll_weight * sft(pair)


def simpo(pair: Pair, *, beta: Positive = 2.0, gamma: NonNegative = 1.0, label_smoothing: FlipShare = 0.0) -> jax.Array:
  """Computes -log sigmoid(beta * (log p(chosen) / n_w - log p(rejected) / n_l) - gamma), smoothed as in `dpo`.

  n are the lengths in tokens, and gamma is the wanted margin of rewards. It is the paper's gamma, not its ratio to
  beta.

  Source: Meng et al. 2024, eq. 6 (arXiv:2405.14734)
  """
  return smoothed(beta * (pair.chosen_mean - pair.rejected_mean) - gamma, label_smoothing)


def cpo_simpo(
  pair: Pair,
  *,
  beta: Positive = 2.0,
  gamma: NonNegative = 1.0,
  label_smoothing: FlipShare = 0.0,
  nll_weight: NonNegative = 1.0,
) -> jax.Array:
  """Computes `simpo` plus nll_weight * `sft`; TPO-L when the pair's nll is of a third completion.

  Source: Xu et al. 2024, github.com/fe1ixxu/CPO_SIMPO; TPO-L: Saeidi et al. 2024 (arXiv:2405.16681)
  """
  return simpo(pair, beta=beta, gamma=gamma, label_smoothing=label_smoothing) + nll_weight * sft(pair)


def alphapo(
  pair: Pair, *, beta: Positive = 2.5, gamma: NonNegative = 0.25, alpha: Finite = 0.25, label_smoothing: FlipShare = 0.0
) -> jax.Array:
  """Computes `simpo` on the shaped rewards (1 - exp(-alpha a)) / alpha of the log-probabilities a per token.

  alpha = 0 is `simpo` itself.

  Source: Gupta et al. 2025 (arXiv:2501.03884)
  """
  chosen, rejected = shaped_means(pair, alpha=alpha)
  return smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def tpo(
  pair: Pair, *, beta: Positive = 0.01, label_smoothing: FlipShare = 0.0, nll_weight: NonNegative = 1.0
) -> jax.Array:
  """Computes `cpo` whose likelihood term is of a third, gold completion: the caller sets the pair's nll to that one's.

  TPO-L is `cpo_simpo` with such a term; TRL's hinge and ipo variants are these losses and `sft` with it.

  Source: Saeidi et al. 2024 (arXiv:2405.16681)
  """
  return cpo(pair, beta=beta, label_smoothing=label_smoothing, nll_weight=nll_weight)


def log_odds_ratio(pair: Pair) -> jax.Array:
  """Computes log (odds(chosen) / odds(rejected)), odds = p / (1 - p) of likelihoods per token, p < 1 by an epsilon."""
  return _log_odds(pair.chosen_mean) - _log_odds(pair.rejected_mean)


def _log_odds(logp: jax.Array) -> jax.Array:
  logp = jnp.minimum(logp, -jnp.finfo(logp.dtype).eps)  # certain, or empty: 1 - p would be 0
  near_one = logp > -0.7
  # log(1 - exp(x)), exact at both ends; each branch is kept from the other's singular point.
  small = jnp.log(-jnp.expm1(jnp.where(near_one, logp, -1.0)))
  large = jnp.log1p(-jnp.exp(jnp.where(near_one, -1.0, logp)))
  return logp - jnp.where(near_one, small, large)


def means(pair: Pair) -> Sides:
  """Returns the mean log-probability per token of (chosen, rejected), in nats.

  Times beta these are the implied rewards of `simpo` and `orpo`.
  """
  return pair.chosen_mean, pair.rejected_mean


def shaped_means(pair: Pair, *, alpha: Finite = 0.25) -> Sides:
  """Returns the rewards (chosen, rejected) of `alphapo`, but for beta; at alpha = 0 those of `simpo`."""

  def shape(logp):
    return divergence.alpha(logp, divergence_alpha=1.0 - alpha)

  return shape(pair.chosen_mean), shape(pair.rejected_mean)


def odds_metrics(pair: Pair) -> dict[str, jax.Array]:
  """Returns both terms of `orpo`, for the log: the likelihood, and the odds ratio after and before its log sigmoid."""
  log_odds = log_odds_ratio(pair)
  ratio = {"log_odds_ratio": jax.nn.log_sigmoid(log_odds), "log_odds_chosen": log_odds}
  return nll_metrics(pair) | ratio


LOSSES = by_name(
  PairObjective(orpo, reference=False, likelihood=True, rewards=means, logps=means, metrics=odds_metrics),
  PairObjective(cpo, reference=False, likelihood=True, rewards=sums, metrics=nll_metrics),
  PairObjective(simpo, reference=False, rewards=means, logps=means),
  PairObjective(cpo_simpo, reference=False, likelihood=True, rewards=means, logps=means, metrics=nll_metrics),
  PairObjective(alphapo, reference=False, rewards=shaped_means, logps=means),
  PairObjective(tpo, reference=False, likelihood=True, third=True, rewards=sums, metrics=nll_metrics),
)
