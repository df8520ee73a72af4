"""Losses of supervised fine-tuning against TRL's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import sft
from alignjax.losses.logps import next_token_scores
from alignjax.losses.sft import dft
from tests import golden

LOSSES = {"nll": "cross_entropy", "dft": "dft"}  # TRL's names


def objective(name, logps, mask, count=None):
  """The sum over tokens of a loss in TRL's terms, divided by `count` or by the tokens."""
  return jnp.sum(sft.RECIPE.losses[LOSSES[name]](logps) * mask) / (count or mask.sum())


@pytest.mark.parametrize("case", golden.cases("sft", lambda config: True))
def test_golden_loss_and_gradient(case):
  section = golden.section("sft")
  case, mask = section["cases"][case], np.array(section["inputs"]["label_mask"])
  config = dict(case["config"])
  name, count = config.pop("loss_type"), config.pop("num_items_in_batch")
  assert not config, f"no equal here of {config}"
  with jax.enable_x64(True):
    loss = lambda logps: objective(name, logps, mask, count)
    value, gradient = jax.value_and_grad(loss)(jnp.array(section["inputs"]["log_probs"]))
  assert float(value) == pytest.approx(case["loss"], rel=1e-6)
  # TRL differentiates a sum over all columns and masks the log-probabilities before it.
  np.testing.assert_allclose(gradient, case["grad_log_probs"] * mask, atol=1e-6)
  for metric, column in (("entropy", "entropy"), ("mean_token_accuracy", "is_top1")):
    mean = (np.array(section["inputs"][column]) * mask).sum() / mask.sum()
    assert mean == pytest.approx(case["metrics"][metric], rel=1e-6)


def test_golden_losses_from_logits():
  case = golden.section("sft")["end_to_end"]
  inputs, outputs = case["inputs"], case["outputs"]
  logits = jnp.asarray(inputs["logits"], jnp.float32)
  tokens, mask = jnp.asarray(inputs["input_ids"]), np.array(inputs["labels"]) != -100
  scores = next_token_scores(logits, jnp.eye(logits.shape[-1]), tokens, chunk=2, entropy=True)
  expected = {name.removeprefix("loss_"): value for name, value in outputs.items() if name.startswith("loss_")}
  assert {name: float(objective(name, scores.logps, mask)) for name in expected} == pytest.approx(expected, rel=1e-5)
  for metric, column in (("entropy", scores.entropy), ("mean_token_accuracy", scores.is_top1)):
    assert float((column * mask).sum() / mask.sum()) == pytest.approx(outputs["metrics"][metric], rel=1e-5)


def test_dft_has_the_gradient_of_minus_the_probability():
  # d(-p log p) with p constant is -dp: bounded where the likelihood's gradient is 1 whatever p.
  logps = jnp.array([-0.1, -3.0, -1e4])
  gradient = jax.grad(lambda x: dft(x).sum())(logps)
  np.testing.assert_allclose(gradient, -np.exp(logps), rtol=1e-6)
  assert np.isfinite(dft(logps)).all()
