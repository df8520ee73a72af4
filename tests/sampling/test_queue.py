"""Laws of continuous batching: the completions of `generate`, however many slots there are, and fewer steps."""

import jax
import numpy as np
import pytest

from alignjax.errors import InputError
from alignjax.sampling.generate import make_generate
from alignjax.sampling.queue import make_generate_queue
from alignjax.system.sharding import make_mesh
from tests.sampling.test_generate import MODEL, NEW, PAD, STOP, VOCAB, left_pad, weights

WIDTH = 8


def queue(size=13):
  """Prompts of unequal length, some absent; each twice in a row, as two samples of one prompt."""
  rng = np.random.default_rng(0)
  prompts = [rng.integers(4, VOCAB, rng.integers(1, WIDTH + 1)).tolist() for _ in range(size)]
  for place in (0, 5):
    prompts[place] = []
  tokens, lengths = left_pad(prompts, WIDTH)
  return tokens, lengths, {"prompt_ids": np.arange(size) // 2, "sample_ids": np.arange(size) % 2}


def run(make, *args, size=13, **options):
  tokens, lengths, ids = queue(size)
  options = {"key": jax.random.key(1), "stop_id": STOP, "pad_id": PAD} | ids | options
  return jax.device_get(make(MODEL, NEW, *args)(weights(), tokens, lengths, **options))


def assert_same(samples, expected):
  np.testing.assert_array_equal(samples.tokens, expected.tokens)
  np.testing.assert_allclose(samples.logps, expected.logps, atol=1e-5)
  for field in ("mask", "lengths", "finished"):
    np.testing.assert_array_equal(getattr(samples, field), getattr(expected, field), err_msg=field)


# Sampled, greedy with a stop that is reached, without a stop: one program, since they are traced.
OPTIONS = ({"temperature": 1.0}, {"temperature": 0.0, "stop_id": 16}, {"temperature": 0.7, "stop_id": -1})


@pytest.mark.parametrize(
  ("slots", "refill"),
  [(1, 1), pytest.param(2, 1, marks=pytest.mark.long), (3, 2), pytest.param(8, None, marks=pytest.mark.long), (99, 5)],
)
def test_completions_are_those_of_the_static_sampler(slots, refill):
  for options in OPTIONS:
    assert_same(run(make_generate_queue, slots, refill, **options)[0], run(make_generate, **options))


def test_truncated_completions_are_those_of_the_static_sampler():
  options = {"top_k": 8, "top_p": 0.9}
  assert_same(run(make_generate_queue, 3, **options)[0], run(make_generate, **options))


@pytest.mark.slow
def test_sharded_slots_give_the_same_completions():
  expected = run(make_generate, size=30)
  for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    with jax.set_mesh(make_mesh(**sizes)):
      samples, _ = run(make_generate_queue, 16, 1, size=30)
    assert_same(samples, expected)


@pytest.mark.parametrize("refill", [1, 3])
def test_no_row_waits_for_the_longest(refill):
  samples = run(make_generate, size=40)
  found, occupancy = run(make_generate_queue, 4, refill, size=40)
  assert_same(found, samples)
  lengths = samples.lengths[samples.lengths > 0]
  static = sum(lengths[start : start + 4].max() - 1 for start in range(0, 40, 4))
  steps, decoded = int(occupancy.steps), (lengths - 1).sum()
  assert decoded / 4 <= steps
  assert refill > 1 or steps < static
  assert occupancy.share == pytest.approx(decoded / (4 * steps))
  assert len(lengths) / refill <= occupancy.refills <= len(lengths) / refill + 4


def test_a_queue_of_absent_prompts_yields_nothing():
  tokens, lengths, ids = queue()
  options = {"key": jax.random.key(0), "stop_id": STOP, "pad_id": PAD, "temperature": 1.0} | ids
  samples, occupancy = make_generate_queue(MODEL, NEW, 2, 1)(weights(), tokens, 0 * lengths, **options)
  assert (samples.lengths == 0).all()
  assert (samples.tokens == PAD).all()
  assert not samples.finished.any()
  assert (occupancy.steps, occupancy.refills, occupancy.share) == (0, 0, 0)


def test_slots_that_the_mesh_does_not_divide_are_named():
  with jax.set_mesh(make_mesh(fsdp=8)), pytest.raises(InputError, match=r"slots=12 .* 8 shards"):
    run(make_generate_queue, 12)
