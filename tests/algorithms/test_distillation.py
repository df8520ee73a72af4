"""Distillation into a decoder, from a teacher of another size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import distillation, sft
from alignjax.errors import InputError
from alignjax.evaluation.held_out import evaluate
from alignjax.model import ModelConfig, decoder
from alignjax.runs.run import load
from alignjax.system.fingerprint import fingerprint
from alignjax.train import fit
from alignjax.types import Batch, Trees
from tests import made, smoke
from tests.model import reference

BETA, TEMPERATURE = 0.3, 1.5
HPARAMS = {"beta": jnp.float32(BETA), "temperature": jnp.float32(TEMPERATURE)}
TEACHER = ModelConfig(vocab=96, layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=24)


@pytest.fixture(scope="module")
def teacher():
  """A model of another size, and its parameters."""
  model = decoder.make(TEACHER)
  params = jax.jit(model.init)(jax.random.key(3))
  return model, params | {"embed": 40 * params["embed"]}  # fresh models find all tokens alike


def run(model, params, teacher, batch, loss="jsd", microbatches=1):
  """Loss and metrics of one batch."""
  algorithm = made.make(distillation.RECIPE, model, loss, microbatches, teacher=teacher[0])
  frozen = {"teacher": teacher[1]}

  @jax.jit
  def total(params, frozen, batch):
    prepared = algorithm.prepare(Trees(frozen), Batch(batch), None)
    return algorithm.loss(algorithm.for_loss(frozen) | params, prepared, HPARAMS)

  value, metrics = total(params, frozen, batch)
  return float(value), {name: float(x) for name, x in metrics.items()}


def float64_logps(config, params, batch):
  """Log-probabilities [B, T - 1, V] of the tokens from the second on, at the temperature, by the float64 reference."""
  hidden = reference.packed_hidden_states(config, params, batch)
  return reference.log_softmax(hidden[:, :-1] @ np.float64(params["embed"]).T / TEMPERATURE)


def test_loss_and_metrics_equal_the_float64_reference(config, model, params, teacher, sft_batch):
  s, t = float64_logps(config, params, sft_batch), float64_logps(TEACHER, teacher[1], sft_batch)
  mixed = np.log(BETA * np.exp(t) + (1 - BETA) * np.exp(s))
  kl = lambda p: (np.exp(p) * (p - mixed)).sum(axis=-1)
  weights = np.pad(sft_batch["weights"], ((0, 0), (1, 0)))
  weights = (np.take_along_axis(weights, sft_batch["segment_ids"], axis=1) * sft_batch["loss_mask"])[:, 1:]
  mean = lambda x: float((weights * x).sum() / weights.sum())
  divergence = mean(BETA * kl(t) + (1 - BETA) * kl(s))
  loss, metrics = run(model, params, teacher, sft_batch)
  assert loss == pytest.approx(divergence, rel=1e-4)
  assert metrics == pytest.approx(
    {
      "jsd": divergence,
      "entropy": mean(-(np.exp(s) * s).sum(axis=-1)),
      "teacher_agreement": mean(s.argmax(axis=-1) == t.argmax(axis=-1)),
    },
    rel=1e-4,
  )


def test_a_sum_has_the_cross_entropy_of_supervised_fine_tuning(model, params, teacher, sft_batch):
  plain = made.make(sft.RECIPE, model)
  nll, _ = jax.jit(lambda p, b: plain.loss(p, plain.prepare(Trees(), Batch(b), None), {}))(params, sft_batch)
  divergence, _ = run(model, params, teacher, sft_batch)
  loss, metrics = run(model, params, teacher, sft_batch, "jsd:0.75+cross_entropy:0.25", microbatches=4)
  assert loss == pytest.approx(0.75 * divergence + 0.25 * float(nll), rel=1e-5)
  assert metrics["cross_entropy"] == pytest.approx(float(nll), rel=1e-5)


def apart(batch, length):
  """The same examples, one to a row of `length` tokens."""
  rows, columns = np.nonzero(batch["example_mask"])
  layout = ("tokens", "segment_ids", "positions", "loss_mask")
  out = {name: np.zeros((len(rows), length), batch[name].dtype) for name in layout}
  for row, (source, example) in enumerate(zip(rows, columns, strict=True)):
    place = batch["segment_ids"][source] == example + 1
    for name in layout:
      out[name][row, : place.sum()] = batch[name][source, place]
    out["segment_ids"][row, : place.sum()] = 1
  single = ("example_mask", "record_ids", "weights")
  return out | {name: batch[name][rows, columns][:, None] for name in single}


def test_packing_and_padding_change_nothing(model, params, teacher, sft_batch):
  packed = run(model, params, teacher, sft_batch)
  for length in (32, 40):
    loss, metrics = run(model, params, teacher, apart(sft_batch, length))
    assert loss == pytest.approx(packed[0], rel=1e-5)
    assert metrics == pytest.approx(packed[1], rel=1e-5)


def test_without_a_teacher_there_must_be_something_else_to_learn_from(model):
  with pytest.raises(InputError, match="name the run directory of a teacher") as caught:
    made.make(distillation.RECIPE, model, "jsd", teacher="")
  assert "\n" not in str(caught.value)
  assert made.make(distillation.RECIPE, model, "jsd+cross_entropy", teacher="").loss_reads == ("reference",)


@pytest.mark.long
def test_a_run_keeps_its_teacher_and_continues_without_the_run_it_came_from(tmp_path):
  source, teacher = smoke.finished("sft")
  copied = smoke.copy(source, tmp_path / "source")
  config = smoke.config("gkd", algorithm__teacher=str(copied), algorithm__loss="jsd", model__embed=32)
  end = fit(config, tmp_path / "whole")
  smoke.interrupt(config, tmp_path / "killed", 3)
  copied.rename(tmp_path / "gone")
  assert fit(config, tmp_path / "killed").metrics == end.metrics
  assert smoke.arrays(tmp_path / "killed") == smoke.arrays(tmp_path / "whole")
  assert end.metrics["eval/loss"] == pytest.approx(evaluate(tmp_path / "whole")["loss"], rel=1e-5)
  assert end.metadata["teacher"] == load(tmp_path / "whole").metadata["teacher"]
  losses = smoke.losses(tmp_path / "whole")
  assert losses[0] > losses[-1] > 0
  assert fingerprint(load(source).params) == fingerprint(teacher.params)


def test_a_reward_model_is_no_teacher(tmp_path):
  source, _ = smoke.finished("reward")
  config = smoke.config("gkd", algorithm__teacher=str(source), algorithm__loss="jsd")
  with pytest.raises(InputError, match="is a reward model and no policy; name another run"):
    fit(config, tmp_path / "run")
  config = config.replace({"algorithm.teacher": str(tmp_path / "absent")})
  with pytest.raises(InputError, match="absent: not a run directory"):
    fit(config, tmp_path / "run")
  assert not smoke.files(tmp_path)
