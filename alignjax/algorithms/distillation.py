"""Distillation: a student takes on the next-token distributions of a frozen teacher, on the completions of the data.

This is GKD's off-policy half (its lambda = 0): sampling completions from the student is for an online run. The teacher
is the model of the run that `algorithm.teacher` names, of any size, with the student's tokenizer; its states come from
`prepare`, its unembedding stands beside the params.

Source: Agarwal et al. 2024 (arXiv:2306.13649)
"""

import jax.numpy as jnp

from alignjax.algorithms.algorithm import Algorithm, keywords, segments, weighted_sum
from alignjax.algorithms.sft import token_weights
from alignjax.errors import InputError
from alignjax.losses.aggregation import divisor
from alignjax.losses.distillation import jsd
from alignjax.losses.logps import next_token_scores
from alignjax.losses.sft import cross_entropy
from alignjax.model.decoder import Model
from alignjax.system.microbatch import map_over_microbatches

HEAD = "none"
LOSSES = {f.__name__: f for f in (jsd, cross_entropy)}
OPTIONS = {"teacher": ""}  # run directory; "": the parameters that the run began with
MODELS = {"teacher": "none"}


def data(loss: str = "", teacher: str = "") -> str:
  """The kind of records."""
  del loss, teacher
  return "sft"


def hparams(loss: str = "", teacher: str = "") -> dict[str, float]:
  """The keywords of a loss, or of a weighted sum of losses.

  Raises:
    InputError: an unknown loss.
  """
  del teacher
  return keywords(*(LOSSES[name] for name in weighted_sum(loss, LOSSES)))


def make(model: Model, loss: str = "", microbatches: int = 1, teacher: Model | str | None = None) -> Algorithm:
  """Distillation into `model`.

  Args:
    model: the student.
    loss: names of `LOSSES` with weights: "jsd" if empty, "jsd:0.5+cross_entropy:0.5" learns from the data's tokens too.
    microbatches: the teacher takes the rows in so many parts, as the step does.
    teacher: its model. None, or "" from a config: one like the student, with the parameters that the run began with.

  Raises:
    InputError: an unknown loss, or a config that names no teacher and has nothing else to learn from.
  """
  weights = weighted_sum(loss, LOSSES)
  if teacher == "" and "cross_entropy" not in weights:
    raise InputError(
      "algorithm.teacher is empty: name the run directory of a teacher (a sum with cross_entropy may go without: its "
      "jsd holds the student to its own start)"
    )
  tree, teacher = ("teacher", teacher) if teacher else ("reference", model)
  trees = (tree,) if "jsd" in weights else ()

  def prepare(frozen, batch, key):
    del key
    states = lambda part: teacher.forward(frozen[tree], part["tokens"], segments(part), part["positions"])[0]
    found = {"teacher_hidden": map_over_microbatches(states, batch, microbatches)} if trees else {}
    return batch | found | {"num_tokens": divisor(token_weights(batch).sum())}

  def loss_fn(params, batch, hparams):
    hidden, _ = model.forward(params, batch["tokens"], segments(batch), batch["positions"])
    unembedding = model.unembedding(params)
    shares = token_weights(batch) / batch["num_tokens"]
    mean = lambda x: jnp.sum(shares * x)
    losses, metrics = {}, {}
    if "jsd" in weights:
      setting = {name: hparams[name] for name in keywords(jsd)}
      of_teacher = teacher.unembedding(params[tree])
      found = jsd(hidden, unembedding, batch["teacher_hidden"], of_teacher, **setting)
      found = [jnp.roll(x, 1, axis=1) for x in found]  # at the token that is foretold; none foretells the first
      losses["jsd"], metrics["entropy"], metrics["teacher_agreement"] = map(mean, found)
    if "cross_entropy" in weights:
      scores = next_token_scores(hidden, unembedding, batch["tokens"])
      losses["cross_entropy"] = mean(cross_entropy(scores.logps))
      metrics["mean_token_accuracy"] = mean(scores.is_top1)
    return sum(weights[name] * value for name, value in losses.items()), metrics | losses

  return Algorithm(
    prepare,
    loss_fn,
    count="num_tokens",
    frozen=trees,
    held=trees,
    models={"teacher": teacher} if "teacher" in trees else {},
  )
