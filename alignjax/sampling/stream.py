"""One completion, streamed token by token."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from alignjax.model import Model
from alignjax.sampling.generate import bucket, check_length, noise_keys, sampler
from alignjax.system.sharding import ways
from alignjax.types import Params


def stream(
  model: Model,
  params: Params,
  prompt: Sequence[int],
  *,
  key: jax.Array,
  prompt_id: int,
  max_new_tokens: int,
  **options: Any,
) -> Iterator[int]:
  """Yields the tokens of the completion that `generate` gives, each as soon as it is drawn; the stop token is the last.

  The completion is that of sample id 0. The prompt is padded to one of few widths (`generate.bucket`). The first
  completion of each width compiles two programs, which later completions reuse.

  Args:
    model: its forward and cache.
    params: its parameters, best after `model.unstack`: otherwise every token makes that copy again.
    prompt: token ids, at least one.
    key: the run's PRNG key.
    prompt_id: the number of the prompt in the run, for the noise.
    max_new_tokens: the largest number of tokens.
    options: stop_id, pad_id, temperature, top_k, top_p of `generate`; the first two are required.

  Raises:
    InputError: when the first token is asked for, if the prompt is too long.
  """
  begin, extend = _programs(model, max_new_tokens)
  rows = ways("batch")  # all but the first are absent
  width = bucket(len(prompt))
  check_length(model, len(prompt), rows, max_new_tokens, "the dialogue")
  tokens = np.zeros((rows, width), np.int32)
  tokens[0, width - len(prompt) :] = prompt
  lengths = np.zeros(rows, np.int32)
  lengths[0] = len(prompt)
  keys = noise_keys(key, np.full(rows, prompt_id, np.int32), np.zeros(rows, np.int32))
  samples, cache = begin(params, tokens, lengths, keys, options)
  for place in range(max_new_tokens):
    host_samples = jax.device_get(samples)
    yield int(host_samples.tokens[0, place])
    if not host_samples.running[0]:
      return
    samples, cache = extend(params, samples, cache, lengths, keys, options)


@functools.cache
def _programs(model, max_new_tokens):
  """Returns the compiled steps of `sampler`: begin(params, ..., options) and extend(params, ..., options)."""

  def begin(params, prompts, lengths, keys, options):
    cache = model.init_cache(prompts.shape[0], prompts.shape[1] + max_new_tokens)
    return sampler(model, params, max_new_tokens, **options).begin(prompts, lengths, keys, cache)

  def extend(params, samples, cache, lengths, keys, options):
    return sampler(model, params, max_new_tokens, **options).extend(samples, cache, lengths, keys)

  return jax.jit(begin), jax.jit(extend, donate_argnums=(1, 2))
