"""One completion, token by token, for somebody who waits for it."""

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
  """The tokens of the completion that `generate` gives, each as soon as it is there; the stop token is the last.

  The prompt is padded to one of few widths (`generate.bucket`): the first completion at each compiles two programs, and
  later ones find them.

  Args:
    model: its forward and cache.
    params: its parameters; `model.unstack` of them saves that copy at every token.
    prompt: ids, one at least.
    key: the run's PRNG key.
    prompt_id: which prompt this is.
    max_new_tokens: the most there are.
    options: stop_id, pad_id, temperature, top_k, top_p of `generate`.

  Raises:
    InputError: the prompt is too long.
  """
  begin, extend = _programs(model, max_new_tokens)
  rows, width = ways("batch"), bucket(len(prompt))  # the rows but the first are absent
  check_length(model, len(prompt), rows, max_new_tokens, "the dialogue")
  tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
  tokens[0, width - len(prompt) :], lengths[0] = prompt, len(prompt)
  keys = noise_keys(key, np.full(rows, prompt_id, np.int32), np.zeros(rows, np.int32))
  samples, cache = begin(params, tokens, lengths, keys, options)
  for place in range(max_new_tokens):
    now = jax.device_get(samples)
    yield int(now.tokens[0, place])
    if not now.running[0]:
      return
    samples, cache = extend(params, samples, cache, lengths, keys, options)


@functools.cache
def _programs(model, max_new_tokens):
  def begin(params, prompts, lengths, keys, options):
    cache = model.init_cache(prompts.shape[0], prompts.shape[1] + max_new_tokens)
    return sampler(model, params, max_new_tokens, **options).begin(prompts, lengths, keys, cache)

  def extend(params, samples, cache, lengths, keys, options):
    return sampler(model, params, max_new_tokens, **options).extend(samples, cache, lengths, keys)

  return jax.jit(begin), jax.jit(extend, donate_argnums=(1, 2))
