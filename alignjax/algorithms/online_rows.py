"""The rows of online algorithms as records: completions as they were sampled, scored, and learned from.

Each is the `rows` of a `Batch`, its arrays [B, ...], and has `texts`: the rows by name, as data lays them out. Whatever
is per token is [B, T], belongs to the token in its column, and is 0 where the loss mask is.
"""

import dataclasses

import flax.struct
import jax

from alignjax.types import Rows


@flax.struct.dataclass
class HostRewards:
  """The rewards of completions that are Python functions.

  Attributes:
    values: [B, R], in the order of `weights`; NaN where one does not apply.
    failed: [B], 1 where a reward that is learned from gave no number.
  """

  values: jax.Array
  failed: jax.Array


@flax.struct.dataclass
class Rollout:
  """Completions that were sampled, a row each: what `rollout` of an online algorithm makes of a batch's prompts.

  Attributes:
    texts: the rows as data lays them out: tokens, segment_ids, positions, loss_mask [B, T]; example_mask, record_ids
      and weights [B, 1] of the prompt's record.
    logps: [B, T], which sampled the tokens.
    lengths: [B], tokens.
    finished: [B], 1 where the completion ended by itself.
    from_other: [B], 1 where another model than the policy wrote it; None if none did.
    host: None if no reward is a Python function.
  """

  texts: Rows
  logps: jax.Array
  lengths: jax.Array
  finished: jax.Array
  from_other: jax.Array | None = None
  host: HostRewards | None = None

  def counting(self, weights: jax.Array) -> "Rollout":
    """Returns the rollout with these weights [B] of its rows; one without weight has no loss mask."""
    mask = self.texts["loss_mask"] * (weights > 0)[:, None]
    return dataclasses.replace(self, texts=self.texts | {"weights": weights[:, None], "loss_mask": mask})


@flax.struct.dataclass
class Outcome:
  """What completions came to, as `score` finds it: for the advantages that are made of it, and for metrics.

  Attributes:
    raw_scores: [B], the weighted sum of the rewards that apply; 0 where none does.
    scores: [B], the same less the penalty of a missing end. What else shapes scores is taken off these, before anything
      is made of them.
    weights: [B], the record's; 0 where no reward applies or one failed: the row counts for nothing.
    prompted: [B], the record's weight; 0 where there is no prompt.
    failed: [B], 1 where a reward that counts gave no number, or the sum is not finite or beyond `LARGEST`.
    lengths, finished: [B], as in `Rollout`.
    each: [B] of each reward by name; NaN where it does not apply.
    domain: [B] by name: where they lie in the reward model's domain; {} where there is none.
    steps: [B], the number of their steps; None without a process reward model.
    step_scores: [B, T], what of the score each step is paid; None unless steps are paid one by one.
  """

  raw_scores: jax.Array
  scores: jax.Array
  weights: jax.Array
  prompted: jax.Array
  failed: jax.Array
  lengths: jax.Array
  finished: jax.Array
  each: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
  domain: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
  steps: jax.Array | None = None
  step_scores: jax.Array | None = None


@flax.struct.dataclass(kw_only=True)
class ScoredRows:
  """Rows of completions that were scored: what every online algorithm's metrics are made of.

  Attributes:
    texts: as data lays rows out; weights and loss mask are 0 where nothing is learned.
    outcome: of the completions, or of each prompt's completions together where a row is a pair of them.
    told: [B], 1 where the scores say something that could be learned.
  """

  texts: Rows
  outcome: Outcome
  told: jax.Array


@flax.struct.dataclass(kw_only=True)
class Learned(ScoredRows):
  """Rows of completions that a policy learns from, [B, T] each.

  Attributes:
    sampler_logps: the log-probs that sampled.
    old_logps: those that the ratio divides by: the sampler's, or the trainer's (`settle`).
    reference_logps: of the reference; None where the loss has none.
    advantages: None where the loss has none.
    correction: from the sampler's log-probs to the trainer's; None: there is none.
    kept: 1 on the tokens that are learned from (`token_weight.top_entropy`); None: all are.
  """

  sampler_logps: jax.Array
  old_logps: jax.Array
  reference_logps: jax.Array | None = None
  advantages: jax.Array | None = None
  correction: jax.Array | None = None
  kept: jax.Array | None = None
