"""The KL of a policy from its reference, measured on the policy's own samples."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from alignjax.evaluation import interval
from alignjax.losses import logps
from alignjax.model import Model
from alignjax.model.attention.form import Segments
from alignjax.runs.rescore import rescore
from alignjax.types import Params


class SequenceKL(NamedTuple):
  """KL(policy || reference) of whole completions, nats.

  Attributes:
    kl: its estimate and interval.
    stderr: the estimate's standard error; NaN if there is only one prompt.
    per_token: the same KL over the mean length of a completion.
  """

  kl: interval.Estimate
  stderr: float
  per_token: float


def sequence_kl(
  policy_logps: Sequence[ArrayLike],
  reference_logps: Sequence[ArrayLike],
  clusters: Sequence[Hashable] | None = None,
) -> SequenceKL:
  """Estimates KL(policy || reference) from completions that the *policy* sampled at temperature 1, without truncation.

  The mean over completions of sum_t (policy_logps - reference_logps): the unbiased estimator, which can be negative for
  a small sample. Both must be scored alike: rescore both with `completion_logps`.

  Args:
    policy_logps: per completion, the log-probs of its tokens [n_i], nats.
    reference_logps: the same tokens under the reference.
    clusters: the prompt of each completion, if some answer the same one; None: all answer different ones.

  Raises:
    ValueError: the two do not pair up, there are no completions, or a sum is not finite.

  Source: Schulman 2020, k1 (joschu.net/blog/kl-approx.html)
  """
  if [np.shape(x) for x in policy_logps] != [np.shape(x) for x in reference_logps]:
    raise ValueError("policy_logps and reference_logps must hold the same completions")
  pairs = zip(policy_logps, reference_logps, strict=True)
  # In float64: a KL near 0 is the small difference of large sums.
  ratios = [float(np.sum(np.asarray(p, np.float64) - np.asarray(r, np.float64))) for p, r in pairs]
  kl = interval.mean(ratios, clusters)
  lengths = [np.size(x) for x in policy_logps]
  return SequenceKL(
    kl=kl,
    stderr=interval.standard_error(ratios, clusters),
    per_token=kl.value / float(np.mean(lengths)),
  )


def completion_logps(
  model: Model,
  params: Params,
  prompts: Sequence[Sequence[int]],
  completions: Sequence[Sequence[int]],
  *,
  temperature: float = 1.0,
  batch_size: int = 64,
) -> list[np.ndarray]:
  """Scores each completion's tokens after its prompt: their log-probs (nats, float32 [n_i]), in the given order.

  Args:
    model: a policy.
    params: its parameters, on the current mesh.
    prompts: token ids.
    completions: token ids, one for each prompt.
    temperature: divides the logits, as in sampling.
    batch_size: texts scored together; the numbers do not depend on it, up to rounding.

  Raises:
    InputError: a prompt or a completion without tokens.
  """
  score = functools.partial(_make_score(model), params, temperature)
  rows = rescore(score, prompts, completions, batch_size=batch_size)
  spans = ((len(prompt), len(prompt) + len(ids)) for prompt, ids in zip(prompts, completions, strict=True))
  return [row[start:end] for row, (start, end) in zip(rows, spans, strict=True)]


@functools.cache
def _make_score(model: Model) -> Callable[..., jax.Array]:
  """Returns a jitted (params, temperature, tokens, segment_ids, positions), int32 [B, T] -> log-probs, nats."""

  @jax.jit
  def score(params, temperature, tokens, segment_ids, positions):
    hidden, _ = model.forward(params, tokens, Segments(segment_ids, most=1), positions)
    return logps.next_token_logps(hidden, model.unembedding(params), tokens, temperature=temperature)

  return score
