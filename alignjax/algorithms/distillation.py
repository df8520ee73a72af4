"""Distillation: a student takes on the next-token distributions of a frozen teacher, on the completions of the data.

This is GKD's off-policy half (its lambda = 0): sampling completions from the student is for an online run. The teacher
is the model of the run that `algorithm.teacher` names, of any size, with the student's tokenizer; its states come from
`prepare`, its unembedding stands beside the params.

Source: Agarwal et al. 2024 (arXiv:2306.13649)
"""

import dataclasses

import jax.numpy as jnp

from alignjax.algorithms.algorithm import Algorithm, Options, Parts, Recipe, own_hparams, segments
from alignjax.algorithms.sft import token_weights
from alignjax.errors import InputError
from alignjax.losses.aggregation import divisor
from alignjax.losses.distillation import jsd
from alignjax.losses.logps import next_token_scores
from alignjax.losses.objective import Family, Term
from alignjax.losses.sft import cross_entropy
from alignjax.model.decoder import Model
from alignjax.system.microbatch import map_over_microbatches


@dataclasses.dataclass(frozen=True)
class DistillationOptions(Options):
  """Static settings of distillation."""

  teacher: str = ""  # run directory; "": the parameters that the run began with


def make(model: Model, terms: tuple[Term, ...], options: DistillationOptions, parts: Parts) -> Algorithm:
  """Makes the algorithm that distils a teacher into `model`, the student.

  The teacher is the model "teacher" of the parts; without one, a model like the student, with the parameters that the
  run began with.

  Args:
    terms: jsd, cross_entropy or their weighted sum.
    parts: `models` has the teacher, and `microbatches` is how its states are taken.

  Raises:
    InputError: `options.teacher` is empty and the objective has no cross_entropy, so there is nothing to learn from.
  """
  weights = {term.name: term.weight for term in terms}
  if not options.teacher and "cross_entropy" not in weights:
    raise InputError(
      "algorithm.teacher is empty: name the run directory of a teacher (a sum with cross_entropy may go without: its "
      "jsd holds the student to its own start)"
    )
  others = dict(parts.models)
  tree = "teacher" if "teacher" in others else "reference"
  teacher = others.get("teacher", model)
  names = (tree,) if "jsd" in weights else ()

  def prepare(trees, batch, key):
    del key

    def states(rows):
      return teacher.forward(trees.others[tree], rows["tokens"], segments(rows), rows["positions"])[0]

    found = {"teacher_hidden": map_over_microbatches(states, batch.rows, parts.microbatches)} if names else {}
    return batch.updated(rows=found, totals={"num_tokens": divisor(token_weights(batch.rows).sum())})

  def loss_fn(params, batch, hparams):
    rows = batch.rows
    hidden, _ = model.forward(params, rows["tokens"], segments(rows), rows["positions"])
    unembedding = model.unembedding(params)
    shares = token_weights(rows) / batch.totals["num_tokens"]

    def mean(x):
      return jnp.sum(shares * x)

    losses, metrics = {}, {}
    if "jsd" in weights:
      teacher_unembedding = teacher.unembedding(params[tree])
      found = jsd(hidden, unembedding, rows["teacher_hidden"], teacher_unembedding, **own_hparams(jsd, hparams))
      found = [jnp.roll(x, 1, axis=1) for x in found]  # at the token that is foretold; none foretells the first
      losses["jsd"], metrics["entropy"], metrics["teacher_agreement"] = map(mean, found)
    if "cross_entropy" in weights:
      scores = next_token_scores(hidden, unembedding, rows["tokens"])
      losses["cross_entropy"] = mean(cross_entropy(scores.logps))
      metrics["mean_token_accuracy"] = mean(scores.is_top1)
    return sum(weights[name] * value for name, value in losses.items()), metrics | losses

  return Algorithm(
    prepare,
    loss_fn,
    count="num_tokens",
    reads=names,
    loss_reads=names,
    models={"teacher": teacher} if "teacher" in names else {},
  )


RECIPE = Recipe(
  options=DistillationOptions,
  family=Family({"jsd": jsd, "cross_entropy": cross_entropy}, sums=True),
  make=make,
  records=lambda terms, options: "sft",
  models={"teacher": "none"},
)
