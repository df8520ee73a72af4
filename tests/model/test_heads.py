"""The scalar head: which token is read."""

import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.model import heads
from tests import golden


def test_the_score_is_read_at_the_last_token_of_each_segment():
  scores = jnp.arange(16.0).reshape(2, 8)
  segment_ids = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [0, 1, 1, 1, 1, 2, 2, 2]])
  expected = [[2.0, 4.0, 5.0, 0.0], [12.0, 15.0, 0.0, 0.0]]
  np.testing.assert_array_equal(heads.last_token_score(scores, segment_ids, 4), expected)


@pytest.mark.parametrize("pad_id", [0, 1, 7])
def test_the_reward_does_not_depend_on_the_pad_id(config, model, params, pad_id):
  # The completion itself ends in 7: a search for the pad id would stop there.
  tokens = jnp.array([[3, 4, 5, 7, pad_id, pad_id]])
  segment_ids = jnp.array([[1, 1, 1, 1, 0, 0]])
  positions = jnp.array([[0, 1, 2, 3, 0, 0]])
  hidden, _ = model.forward(params, tokens, segment_ids, positions)
  head = params | {"score": jnp.ones((config.embed, 1))}
  reward = heads.last_token_score(heads.score(head, hidden), segment_ids, 1)
  np.testing.assert_allclose(reward[0, 0], hidden[0, 3].sum(), rtol=1e-5)


def test_the_score_is_float32_for_bfloat16_hidden_states():
  hidden = jnp.ones((1, 2, 300), jnp.bfloat16)
  score = heads.score({"score": jnp.ones((300, 1))}, hidden)
  assert score.dtype == jnp.float32
  np.testing.assert_array_equal(score, 300.0)  # in bfloat16 a sum of ones stops at 256


def test_golden_pooling_at_the_last_token():
  section = golden.section("reward_bt_end_to_end")
  scores = jnp.array(section["inputs"]["score_head_output_per_token"])
  attended = jnp.array(section["inputs"]["attention_mask"])
  pooled = heads.last_token_score(scores, attended, 1)[:, 0]
  np.testing.assert_allclose(pooled, section["outputs"]["pooled_rewards"], rtol=1e-6)
