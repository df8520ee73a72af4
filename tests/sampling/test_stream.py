"""A stream gives the tokens of `generate`, one by one, and ends with them."""

import jax
import numpy as np
import pytest

from alignjax.sampling.generate import make_generate
from alignjax.sampling.stream import stream

PROMPTS = [[5, 7, 9], [3, 4, 8, 15, 16, 23, 42]]
STOP, PAD, LONGEST = 11, 0, 24


def whole(model, params, prompt, number, **options):
  """The completion that `generate` gives for a prompt."""
  samples = make_generate(model, LONGEST)(
    params,
    np.array([prompt], np.int32),
    np.array([len(prompt)], np.int32),
    key=jax.random.key(0),
    prompt_ids=np.array([number], np.int32),
    sample_ids=np.zeros(1, np.int32),
    stop_id=STOP,
    pad_id=PAD,
    **options,
  )
  return samples.tokens[0, : samples.lengths[0]].tolist()


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 1.5, "top_k": 9}])
@pytest.mark.parametrize("unstacked", [False, True])
@pytest.mark.slow
def test_stream_is_the_completion(model, params, options, unstacked):
  for number, prompt in enumerate(PROMPTS):
    expected = whole(model, params, prompt, number, **options)
    given = model.unstack(params) if unstacked else params
    ids = {"key": jax.random.key(0), "prompt_id": number, "stop_id": STOP, "pad_id": PAD}
    assert list(stream(model, given, prompt, max_new_tokens=LONGEST, **ids, **options)) == expected
    assert len(expected) == LONGEST or expected[-1] == STOP


def test_stream_on_a_mesh_is_that_of_one_device(model, params, eight_devices):
  options = {"key": jax.random.key(0), "prompt_id": 1, "max_new_tokens": 6, "stop_id": STOP, "pad_id": PAD}
  alone = list(stream(model, params, PROMPTS[1], **options))
  with jax.set_mesh(eight_devices):
    assert list(stream(model, params, PROMPTS[1], **options)) == alone
