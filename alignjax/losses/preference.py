"""Losses over pairs of completions: arrays in, per-pair losses out; nothing here knows of models.

A new loss is one function of `(pair, *, beta: Positive = ..., ...)` and one `PairObjective` in the table at the foot.
Its keywords, their ranges (`alignjax.system.ranges`) and defaults are the hyper-parameters that a config may set.
Losses without a reference are in `reference_free`.
"""

import jax
import jax.numpy as jnp

from alignjax.losses.objective import by_name
from alignjax.losses.pair import Pair, PairObjective, per_token
from alignjax.losses.rank import match_gaps, match_ratios
from alignjax.system.ranges import Finite, FlipShare, NonNegative, OpenFlipShare, OpenShare, Positive


def smoothed(logits: jax.Array, label_smoothing: jax.Array | float) -> jax.Array:
  """Computes -(1 - e) log sigmoid(logits) - e log sigmoid(-logits), the logistic loss with a share e of flipped labels.

  e = label_smoothing, from 0 to below 1/2; any shape.
  """
  return -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)


def dpo(pair: Pair, *, beta: Positive = 0.1, label_smoothing: FlipShare = 0.0) -> jax.Array:
  """Computes -(1 - e) log sigmoid(beta * margin) - e log sigmoid(-beta * margin) of each pair.

  With e = label_smoothing > 0 this is conservative DPO, which assumes that a share e of the labels is flipped. TRL 1.x
  ignores label_smoothing for its "sigmoid" loss; 0.x computed what stands here.

  Source: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); smoothing: Mitchell 2023, eq. 3 (ericmitchell.ai/cdpo.pdf)
  """
  return smoothed(beta * pair.margin, label_smoothing)


def sigmoid_norm(pair: Pair, *, beta: Positive = 5.0, label_smoothing: FlipShare = 0.0) -> jax.Array:
  """Computes `dpo` on scores per token, so that length earns nothing.

  beta is of the size of several tokens' log-ratios, so its default is 5. The pair must have its lengths.

  Source: Lambert et al. 2024, section 5 (arXiv:2411.15124)
  """
  chosen = per_token(pair.chosen_score, pair.chosen_length)
  rejected = per_token(pair.rejected_score, pair.rejected_length)
  return smoothed(beta * (chosen - rejected), label_smoothing)


def ipo(pair: Pair, *, beta: Positive = 0.1, length_power: NonNegative = 1.0) -> jax.Array:
  """Computes (chosen_score / n_w^p - rejected_score / n_l^p - 1 / (2 beta))^2, n the lengths.

  length_power p = 1 takes averages per token, as the authors advise and TRL does; p = 0 the paper's sums.

  Source: Azar et al. 2023, eq. 17 (arXiv:2310.12036)
  """
  chosen = pair.chosen_score / jnp.maximum(pair.chosen_length, 1.0) ** length_power
  rejected = pair.rejected_score / jnp.maximum(pair.rejected_length, 1.0) ** length_power
  return jnp.square(chosen - rejected - 1 / (2 * beta))


def hinge(pair: Pair, *, beta: Positive = 0.05) -> jax.Array:
  """Computes max(0, 1 - beta * margin).

  Source: Liu et al. 2023, the hinge-norm loss (arXiv:2309.06657), after Zhao et al. 2023 (arXiv:2305.10425)
  """
  return jax.nn.relu(1 - beta * pair.margin)


def robust(pair: Pair, *, beta: Positive = 0.01, label_smoothing: FlipShare = 0.1) -> jax.Array:
  """Computes (-(1 - e) log sigmoid(beta * margin) + e log sigmoid(-beta * margin)) / (1 - 2e), e = label_smoothing.

  Unlike `dpo` with smoothing, its mean under a share e < 1/2 of flipped labels is the DPO loss of the true ones.

  Source: Chowdhury et al. 2024, eq. 12 (arXiv:2403.00409)
  """
  logits = beta * pair.margin
  likelihood = -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) + label_smoothing * jax.nn.log_sigmoid(-logits)
  return likelihood / (1 - 2 * label_smoothing)


def exo_pair(pair: Pair, *, beta: Positive = 0.1, label_smoothing: OpenFlipShare = 1e-3) -> jax.Array:
  """Computes the KL from the policy's preference sigmoid(beta * margin) to the labels' (1 - e, e).

  e = label_smoothing must be above 0. TRL rounds log e to float32, 5e-8 away from this in float64.

  Source: Ji et al. 2024, eq. 16 (arXiv:2402.00856)
  """
  logits = beta * pair.margin

  def against(logits, label):
    return jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - jnp.log(label))

  return against(logits, 1 - label_smoothing) + against(-logits, label_smoothing)


def nca_pair(pair: Pair, *, beta: Positive = 0.01) -> jax.Array:
  """Computes -log sigmoid(beta r_w) - 1/2 log sigmoid(-beta r_w) - 1/2 log sigmoid(-beta r_l), r the ratios.

  Source: Chen et al. 2024 (arXiv:2402.05369)
  """
  chosen, rejected = beta * pair.chosen_ratio, beta * pair.rejected_ratio
  others = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
  return -jax.nn.log_sigmoid(chosen) - 0.5 * others


def bco_pair(pair: Pair, *, beta: Positive = 0.01, delta: Finite = 0.0) -> jax.Array:
  """Computes -log sigmoid(beta r_w - delta) - log sigmoid(-(beta r_l - delta)), r the ratios: a loss for each side.

  The shift delta is a constant here, 0 as in TRL 1.x; the paper's running mean of rewards is the unpaired BCO's.

  Source: Jung et al. 2024 (arXiv:2404.04656)
  """
  chosen, rejected = beta * pair.chosen_ratio - delta, beta * pair.rejected_ratio - delta
  return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)


def sppo_hard(pair: Pair, *, beta: Positive = 1e-3) -> jax.Array:
  """Computes (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2, r the ratios.

  P(chosen preferred) is taken as 1; beta is the paper's 1/eta.

  Source: Wu et al. 2024 (arXiv:2405.00675)
  """
  target = 1 / (2 * beta)
  return jnp.square(pair.chosen_ratio - target) + jnp.square(pair.rejected_ratio + target)


def aot(pair: Pair, *, beta: Positive = 0.1, label_smoothing: FlipShare = 0.0) -> jax.Array:
  """Computes the smoothed logistic loss of beta * (gap - matched_gap).

  gap = log p(chosen) - log p(rejected); matched_gap, which the pair must have, is the reference's gap of the same rank
  in the batch. So the policy's gaps come to dominate the reference's, rank by rank. Scope: the whole batch of the
  optimizer step, over microbatches and devices (`match_gaps`); TRL sorts each device's microbatch. Example weights
  count in the mean, not in the ranks.

  Source: Melnyk et al. 2024 (arXiv:2406.05882), paired
  """
  assert pair.matched_gap is not None
  return smoothed(beta * (pair.chosen - pair.rejected - pair.matched_gap), label_smoothing)


def aot_unpaired(pair: Pair, *, beta: Positive = 0.1, label_smoothing: FlipShare = 0.0) -> jax.Array:
  """Computes the smoothed logistic loss of beta * (sorted r_w - sorted r_l): chosen dominates rejected, rank by rank.

  r are the ratios. matched_rejected is the rejected ratio of the rank that the pair's r_w has among the chosen ones,
  and matched_chosen the other way round; the pair must have both. A pair has the loss of its r_w; of its r_l it has the
  gradient alone, so value and gradient of the mean are those of the whole batch. Scope as in `aot` (`match_ratios`).

  Source: Melnyk et al. 2024 (arXiv:2406.05882), unpaired
  """
  assert pair.matched_chosen is not None
  assert pair.matched_rejected is not None
  chosen = smoothed(beta * (pair.chosen_ratio - pair.matched_rejected), label_smoothing)
  rejected = smoothed(beta * (pair.matched_chosen - pair.rejected_ratio), label_smoothing)
  return chosen + (rejected - jax.lax.stop_gradient(rejected))


def apo_zero(pair: Pair, *, beta: Positive = 0.1) -> jax.Array:
  """Computes 1 - sigmoid(beta r_w) + sigmoid(beta r_l), r the ratios: chosen up, rejected down.

  For pairs better than the policy's own completions.

  Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266)
  """
  return jax.nn.sigmoid(-beta * pair.chosen_ratio) + jax.nn.sigmoid(beta * pair.rejected_ratio)


def apo_down(pair: Pair, *, beta: Positive = 0.1) -> jax.Array:
  """Computes sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l)), r the ratios: both down, rejected more.

  For pairs worse than the policy's own completions.

  Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266)
  """
  chosen, margin = beta * pair.chosen_ratio, beta * (pair.chosen_ratio - pair.rejected_ratio)
  return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(-margin)


def discopop(pair: Pair, *, beta: Positive = 0.05, tau: OpenShare = 0.05) -> jax.Array:
  """Computes -log sigmoid(z) (1 - q) + exp(-z) q, with z = beta * margin and q = sigmoid(z / tau), tau < 1.

  Source: Lu et al. 2024, the log-ratio modulated loss (arXiv:2406.08414)
  """
  logits = beta * pair.margin
  logistic = -jax.nn.log_sigmoid(logits) * jax.nn.sigmoid(-logits / tau)
  exponential = jnp.exp(jax.nn.log_sigmoid(logits / tau) - logits)  # one exponent: exp(-z) alone may be infinite
  return logistic + exponential


def sft(pair: Pair) -> jax.Array:
  """Computes -log p(chosen) / mean_nll_tokens, whose mean over pairs is that over all chosen tokens of the step.

  A term of RPO ("dpo+sft") and MPO ("dpo:0.8+bco_pair:0.2+sft"). TRL averages over a microbatch's tokens. The pair's
  `nll` is what is divided, so it is of a third completion where that is.

  Source: Pang et al. 2024, eq. 1 (arXiv:2404.19733); MPO: Wang et al. 2024 (arXiv:2411.10442)
  """
  return pair.nll / pair.mean_nll_tokens


def nll_metrics(pair: Pair) -> dict[str, jax.Array]:
  """Returns {"nll_loss": the pair's negative log-likelihood, scaled as in `sft`}, for the log."""
  return {"nll_loss": sft(pair)}


LOSSES = by_name(
  PairObjective(dpo, divergence=True),
  PairObjective(ipo, divergence=True),
  PairObjective(hinge, divergence=True),
  PairObjective(robust, divergence=True),
  PairObjective(exo_pair, divergence=True),
  PairObjective(nca_pair),
  PairObjective(bco_pair),
  PairObjective(sppo_hard),
  PairObjective(aot, match=match_gaps),
  PairObjective(aot_unpaired, match=match_ratios),
  PairObjective(apo_zero),
  PairObjective(apo_down),
  PairObjective(discopop, divergence=True),
  PairObjective(sigmoid_norm, divergence=True),
  PairObjective(sft, reference=False, divergence=True, likelihood=True, metrics=nll_metrics),
)
