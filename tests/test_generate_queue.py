"""Laws of continuous batching: the completions of `generate`, however many slots there are, and fewer steps."""

import jax
import numpy as np
import pytest

from alignjax.errors import InputError
from alignjax.generate import make_generate
from alignjax.generate_queue import make_generate_queue
from alignjax.sharding import make_mesh
from tests.test_generate import MODEL, NEW, PAD, STOP, VOCAB, completions, left_pad, weights

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


@pytest.mark.parametrize(
  "options", [{}, {"temperature": 0.0, "stop_id": 16}, {"top_k": 8, "top_p": 0.9}, {"stop_id": -1}], ids=str
)
@pytest.mark.parametrize(("slots", "refill"), [(1, 1), (2, 1), (3, 2), (8, None), (8, 8), (99, 5)])
def test_completions_are_those_of_the_static_sampler(slots, refill, options):
  expected = run(make_generate, **options)
  samples, _ = run(make_generate_queue, slots, refill, **options)
  assert_same(samples, expected)


def test_sharded_slots_give_the_same_completions():
  expected = run(make_generate, size=30)
  for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    with jax.set_mesh(make_mesh(**sizes)):
      samples, _ = run(make_generate_queue, 16, 1, size=30)
    assert_same(samples, expected)


def test_no_row_waits_for_the_longest():
  lengths = run(make_generate, size=40).lengths
  samples, occupancy = run(make_generate_queue, 4, 1, size=40)
  static = sum(lengths[start : start + 4].max() - 1 for start in range(0, 40, 4))
  steps = int(occupancy.steps)
  assert steps < static
  decoded = (lengths - 1)[lengths > 0].sum()
  assert occupancy.share == pytest.approx(decoded / (4 * steps))
  assert steps >= decoded / 4
  assert completions(samples) == completions(run(make_generate, size=40))


def test_a_refill_waits_for_its_slots():
  for refill in (1, 2, 4):
    _, occupancy = run(make_generate_queue, 4, refill, size=40)
    assert int(occupancy.refills) >= 38 / refill
    assert int(occupancy.refills) <= 38 / refill + 4


def test_a_queue_of_absent_prompts_yields_nothing():
  tokens, lengths, ids = queue()
  generate = make_generate_queue(MODEL, NEW, 2)
  key = jax.random.key(0)
  samples, occupancy = generate(weights(), tokens, 0 * lengths, key=key, stop_id=STOP, pad_id=PAD, **ids)
  assert (samples.lengths == 0).all()
  assert (samples.tokens == PAD).all()
  assert not samples.finished.any()
  assert (occupancy.steps, occupancy.refills, occupancy.share) == (0, 0, 0)


def test_slots_that_the_mesh_does_not_divide_are_named():
  with jax.set_mesh(make_mesh(fsdp=8)), pytest.raises(InputError, match=r"slots=12 .* 8 shards"):
    run(make_generate_queue, 12)
