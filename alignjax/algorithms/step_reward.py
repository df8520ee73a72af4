"""A process reward model that scores completions: the steps of a completion, and the reward that they come to.

A step ends where the separator does that the model was trained with, and the last one where the completion's text does,
cut off or not: whoever never ends a step is scored too. The score there is the logit of the step being right.

Source: the product and the minimum: Lightman et al. 2023 (arXiv:2305.20050); "each": Uesato et al. 2022
(arXiv:2211.14275), in PPO: Wang et al. 2023 (arXiv:2312.08935)
"""

import jax
import jax.numpy as jnp

from alignjax.algorithms.algorithm import one_of
from alignjax.errors import InputError
from alignjax.model import heads
from alignjax.model.attention.form import Segments
from alignjax.model.decoder import Model
from alignjax.types import Params, Rows

EACH = "each"
KINDS = ("", "min", "product", "mean", "last", EACH)
PROCESS = "process_reward"  # the algorithm whose runs are process reward models


def check(kind: str, reward_model: str, domain: str, one_number: str = "") -> None:
  """Raises InputError where the option `step_reward`, of value `kind`, means nothing with the others.

  Args:
    reward_model, domain: the options of these names; "" where unset.
    one_number: what needs one number a completion, such as "a pair", for which "each" is refused; "" if nothing does.
  """
  one_of("step_reward", kind, KINDS)
  if kind and not reward_model:
    raise InputError(f"algorithm.step_reward={kind}: is of a process reward model; name its run in reward_model")
  if kind and domain:
    raise InputError(f"algorithm.domain={domain}: is of a reward model of pairs; leave it or step_reward empty")
  if kind == EACH and one_number:
    raise InputError(
      f"algorithm.step_reward={EACH}: pays single tokens, which PPO does, and {one_number} needs one number a "
      f"completion; use one of {', '.join(KINDS[1:-1])}"
    )


def check_model(source: str, algorithm: str, kind: str) -> None:
  """Raises InputError where a reward model is not of the kind asked for.

  Args:
    source: its run directory, for the error.
    algorithm: the algorithm of that run.
    kind: the option `step_reward`; "" asks for a reward model of whole completions.
  """
  if kind and algorithm != PROCESS:
    raise InputError(
      f"algorithm.step_reward={kind}: {source} scores no steps; name a run of algorithm.name={PROCESS}, or leave it "
      "empty"
    )
  if not kind and algorithm == PROCESS:
    raise InputError(f"{source}: is a process reward model; set algorithm.step_reward to one of {', '.join(KINDS[1:])}")


def ends(tokens: jax.Array, loss_mask: jax.Array, stop_id: int, step_ends: tuple[tuple[int, ...], ...]) -> jax.Array:
  """Returns where a step ends, bool [B, T]; every completion that has a token has a step.

  Of separators in a row the first ends a step: there is none between them. A completion of the stop alone, or of
  separators, is one step, which ends at its last token.

  Args:
    tokens, loss_mask: [B, T], the mask 1 on completions.
    stop_id: ends a completion, and belongs to no step.
    step_ends: sequences of ids that end a step, of `data.transform.step_ends`.
  """

  def before(x, count=1):
    return jnp.pad(x, ((0, 0), (count, 0)))[:, : x.shape[1]]

  def last_of(x):
    return x & ~jnp.pad(x[:, 1:], ((0, 0), (0, 1)))

  completion = loss_mask > 0
  text = completion & (tokens != stop_id)
  single = [ids[0] for ids in step_ends if len(ids) == 1]
  separated = text & jnp.isin(tokens, jnp.array(single, tokens.dtype))
  for ids in (ids for ids in step_ends if len(ids) > 1):
    spelled = text
    for back, token in enumerate(reversed(ids)):
      spelled &= before(text & (tokens == token), back)
    separated |= spelled
  step_ends_here = (separated & before(text & ~separated)) | (last_of(text) & ~separated)
  return step_ends_here | (last_of(completion) & ~step_ends_here.any(axis=1, keepdims=True))


def scores(model: Model, params: Params, rows: Rows) -> jax.Array:
  """Computes the logit, at every token, that the step up to it is right: float32 [B, T]."""
  hidden, _ = model.forward(params, rows["tokens"], Segments(rows["segment_ids"], most=1), rows["positions"])
  return heads.score(params, hidden)


def together(logits: jax.Array, steps: jax.Array, kind: str) -> jax.Array:
  """Combines the step scores of each completion into one reward [B]; 0 without a step.

  Args:
    logits: [B, T], that the step up to a token is right, of `scores`; P = sigmoid(logit) is what is combined.
    steps: bool [B, T], True where a step ends, of `ends`; other logits are ignored.
    kind: "min", "product", "mean" or "last" of P, or "each" for their sum.
  """
  right = jax.nn.sigmoid(logits)
  count = steps.sum(axis=1)

  def total(x):
    return jnp.sum(jnp.where(steps, x, 0.0), axis=1)

  columns = jnp.arange(steps.shape[1])
  last = steps & (columns == jnp.max(jnp.where(steps, columns, -1), axis=1, keepdims=True))
  score = {
    "min": lambda: jnp.min(jnp.where(steps, right, jnp.inf), axis=1),
    "product": lambda: jnp.exp(total(jax.nn.log_sigmoid(logits))),
    "mean": lambda: total(right) / jnp.maximum(count, 1),
    "last": lambda: jnp.sum(jnp.where(last, right, 0.0), axis=1),
    EACH: lambda: total(right),
  }[kind]()
  return jnp.where(count > 0, score, 0.0)
