"""Cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses.sft import cross_entropy
from tests import golden


@pytest.mark.parametrize("case", golden.cases("sft", lambda config: config["loss_type"] == "nll"))
def test_golden_loss_and_gradient(case):
  section = golden.section("sft")
  case, mask = section["cases"][case], np.array(section["inputs"]["label_mask"])
  count = case["config"]["num_items_in_batch"] or mask.sum()
  with jax.enable_x64(True):
    loss = lambda logps: jnp.sum(cross_entropy(logps) * mask) / count
    value, gradient = jax.value_and_grad(loss)(jnp.array(section["inputs"]["log_probs"]))
  assert float(value) == pytest.approx(case["loss"], rel=1e-6)
  # TRL differentiates a sum over all columns and masks the log-probabilities before it.
  np.testing.assert_allclose(gradient, case["grad_log_probs"] * mask, atol=1e-6)
