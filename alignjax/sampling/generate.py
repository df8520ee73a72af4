"""Sampling: a prefill and an in-graph decode loop that return the tokens and the log-probs that sampled them.

A completion is a pure function of (params, prompt, key, prompt id, sample id). The noise of each token is drawn from a
key folded from those and from the token's place in the completion, never from the row or the batch. So a prompt gets
the same completion alone or among others, in any row, under any padding, up to rounding: matmuls of other shapes may
sum in another order, which can change a choice that depends on the last bit.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from alignjax.errors import InputError
from alignjax.losses import chunks
from alignjax.losses.chunks import Capped
from alignjax.losses.support import Support, mask_logits
from alignjax.model import Model
from alignjax.system import ranges
from alignjax.system.ranges import Count, NonNegative, ShareAboveZero, Whole
from alignjax.system.sharding import constrain, ways
from alignjax.types import Params


@flax.struct.dataclass
class Samples:
  """Completions of B prompts, up to N tokens each.

  Attributes:
    tokens: int32 [B, N], the completion with its stop token, then pads.
    logps: float32 [B, N], nats, of the distribution that sampled (tempered, truncated, without the pad); 0 on pads.
    mask: float32 [B, N], 1 on the completion, its stop token included.
    lengths: int32 [B], the sum of the mask.
    finished: bool [B], whether the stop token was sampled; False if N tokens were not enough.
  """

  tokens: jax.Array
  logps: jax.Array
  mask: jax.Array
  lengths: jax.Array
  finished: jax.Array

  @property
  def running(self) -> jax.Array:
    """The rows, bool [B], that have begun and can still grow."""
    return (self.lengths > 0) & (self.lengths < self.tokens.shape[1]) & ~self.finished


# The ranges of a sampler's options, for every caller.
RANGES = {
  "max_new_tokens": Count,
  "temperature": Annotated[NonNegative, "0 takes the likeliest token"],
  "top_k": Annotated[Whole, "0 keeps all tokens"],
  "top_p": Annotated[ShareAboveZero, "1 keeps all tokens"],
  "batch_size": Count,
}


def generate(
  model: Model,
  params: Params,
  prompts: jax.Array,
  prompt_lengths: jax.Array,
  *,
  key: jax.Array,
  prompt_ids: jax.Array,
  sample_ids: jax.Array,
  max_new_tokens: int,
  stop_id: jax.Array | int,
  pad_id: jax.Array | int | None,
  temperature: jax.Array | float = 1.0,
  top_k: jax.Array | int | None = None,
  top_p: jax.Array | float | None = None,
) -> Samples:
  """Completes prompts int32 [B, Tp]; a pure function, which `make_generate` jits.

  Args:
    model: its forward and cache.
    params: its parameters.
    prompts: left-padded, so that every row writes its next token to the same column of the cache.
    prompt_lengths: int32 [B]; a row of length 0 is absent and yields a completion of length 0.
    key: the run's PRNG key.
    prompt_ids: int32 [B], the number of each prompt in the whole run.
    sample_ids: int32 [B], the number of each completion among those of its prompt.
    max_new_tokens: N; static.
    stop_id: ends a completion; -1: none does.
    pad_id: fills the columns after the stop, and is never sampled. None fills with 0 and leaves every token possible:
      `logps` then equal a rescoring over the whole vocabulary exactly, which importance ratios need.
    temperature: divides the logits. 0 is greedy: it takes the best token, and returns log-probs at temperature 1.
    top_k: keeps the k best tokens; 0 or None keep all, and None compiles no truncation.
    top_p: then keeps the fewest best tokens that hold this share of the remaining probability; 1 or None keep all.
  """
  begin, extend = sampler(model, params, max_new_tokens, stop_id, pad_id, temperature, top_k, top_p)
  keys = noise_keys(key, prompt_ids, sample_ids)
  rows, width = prompts.shape
  state = begin(prompts, prompt_lengths, keys, model.init_cache(rows, width + max_new_tokens))

  def unfinished(state):
    samples, _ = state
    return jnp.any(samples.running)

  def step(state):
    return extend(*state, prompt_lengths, keys)

  samples, _ = jax.lax.while_loop(unfinished, step, state)
  return samples


def noise_keys(key: jax.Array, prompt_ids: jax.Array | np.ndarray, sample_ids: jax.Array | np.ndarray) -> jax.Array:
  """Folds the keys [B] of the completions' noise from the run's key and the ids [B] of prompts and samples."""
  return jax.vmap(functools.partial(noise_key, key))(prompt_ids, sample_ids)


def noise_key(key: jax.Array, prompt_id: jax.Array | np.ndarray, sample_id: jax.Array | np.ndarray) -> jax.Array:
  """Folds the key of one completion's noise from a key and the ids of its prompt and sample."""
  return jax.random.fold_in(jax.random.fold_in(key, prompt_id), sample_id)


def read_prompts(
  model: Model, params: Params, prompts: jax.Array, lengths: jax.Array, cache: Any
) -> tuple[jax.Array, Any]:
  """Runs the model over prompts int32 [B, Tp], left-padded, of `lengths` [B]; returns (states [B, Tp, D], the cache).

  Args:
    model: of the policy.
    params: stacked, as training has them: one program for all layers.
    prompts, lengths: see above; a prompt of length 0 is absent.
    cache: empty, of B rows.
  """
  width = prompts.shape[1]
  positions = jnp.arange(width) - (width - lengths[:, None])  # < 0 on padding
  segment_ids = (positions >= 0).astype(jnp.int32)
  return model.forward(params, prompts, segment_ids, jnp.maximum(positions, 0), cache)


class Sampler(NamedTuple):
  """The two steps of sampling, for rows that may have begun at different times.

  Attributes:
    begin: (prompts [B, Tp], prompt_lengths [B], noise_keys [B], cache) -> (samples, cache): a prefill, and the first
      token of every prompt that is not absent.
    extend: (samples, cache, prompt_lengths [B], noise_keys [B]) -> (samples, cache): adds a token to the running rows.
  """

  begin: Callable[..., tuple[Samples, Any]]
  extend: Callable[..., tuple[Samples, Any]]


def sampler(
  model: Model,
  params: Params,
  max_new_tokens: int,
  stop_id: jax.Array | int,
  pad_id: jax.Array | int | None,
  temperature: jax.Array | float = 1.0,
  top_k: jax.Array | int | None = None,
  top_p: jax.Array | float | None = None,
) -> Sampler:
  """Returns the steps that `generate` takes; the arguments are those of `generate`.

  The parameters are unstacked here, once: call it outside of the loop over tokens.
  """
  stacked = params  # for the prefill: one program for all layers
  params = model.unstack(stacked)  # for the loop

  def emit(samples, hidden, running, noise_keys):
    """Samples with the next token of the running rows."""
    logits = last_logits(hidden, model.unembedding(params))
    keys = jax.vmap(jax.random.fold_in)(noise_keys, samples.lengths)
    tokens, logps = draw(sampling_logps(logits, temperature, top_k, top_p, pad_id), keys, temperature)
    here = running[:, None] & (jnp.arange(max_new_tokens) == samples.lengths[:, None])
    return samples.replace(
      tokens=jnp.where(here, tokens[:, None], samples.tokens),
      logps=jnp.where(here, logps[:, None], samples.logps),
      mask=jnp.where(here, 1.0, samples.mask),
      lengths=samples.lengths + running,
      finished=samples.finished | (running & (tokens == stop_id)),
    )

  def begin(prompts, prompt_lengths, noise_keys, cache):
    hidden, cache = read_prompts(model, stacked, prompts, prompt_lengths, cache)
    return emit(blank(len(prompts), max_new_tokens, pad_id), hidden, prompt_lengths > 0, noise_keys), cache

  def extend(samples, cache, prompt_lengths, noise_keys):
    # Rows that are not running are computed too; what they write is never read.
    place = jnp.maximum(samples.lengths - 1, 0)[:, None]
    tokens = jnp.take_along_axis(samples.tokens, place, axis=1)
    hidden, cache = model.forward(params, tokens, jnp.ones_like(tokens), prompt_lengths[:, None] + place, cache)
    return emit(samples, hidden, samples.running, noise_keys), cache

  return Sampler(begin, extend)


def blank(rows: int, max_new_tokens: int, pad_id: jax.Array | int | None) -> Samples:
  """Makes the samples of rows that have not begun: pads (0 if `pad_id` is None), with lengths of 0."""

  def filled(value, dtype):
    return constrain(jnp.full((rows, max_new_tokens), value, dtype), "batch", None)

  return Samples(
    tokens=filled(0 if pad_id is None else pad_id, jnp.int32),
    logps=filled(0, jnp.float32),
    mask=filled(0, jnp.float32),
    lengths=jnp.zeros(rows, jnp.int32),
    finished=jnp.zeros(rows, bool),
  )


def last_logits(hidden: jax.Array, unembedding: jax.Array | Capped) -> jax.Array:
  """Computes float32 logits [B, V] at the last of hidden states [B, T, D], the only ones that sampling needs.

  Args:
    hidden: after the final norm.
    unembedding: of `Model.unembedding`.
  """
  unembedding = chunks.capped(unembedding).take(None, hidden.dtype)
  logits = chunks.logits(hidden[:, -1:], unembedding)[:, 0]
  return constrain(logits.astype(jnp.float32), "batch", "vocab")


def draw(logps: jax.Array, keys: jax.Array, temperature: jax.Array | float) -> tuple[jax.Array, jax.Array]:
  """Draws tokens int32 [B] from logps [B, V], each row with its own key; returns them and their log-probs [B].

  Gumbel-max: an argmax samples from exp(logps), without a sort and with the vocabulary left sharded. At temperature 0
  there is no noise, so that the best token is taken.

  Args:
    logps: of `sampling_logps`, already tempered and truncated.
    keys: [B].
    temperature: only compared with 0 here.
  """
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logps.shape[-1:]))(keys)
  noise = jnp.where(jnp.asarray(temperature) > 0, noise, 0.0)
  # The first of the best, as argmax takes it, which is four times slower on CPUs. The barrier keeps the compiler from
  # drawing the noise twice.
  noisy = jax.lax.optimization_barrier(logps + noise)
  best = noisy == jnp.max(noisy, axis=-1, keepdims=True)
  last = logps.shape[-1] - 1
  tokens = jnp.min(jnp.where(best, jnp.arange(last + 1), last), axis=-1).astype(jnp.int32)
  return tokens, jnp.take_along_axis(logps, tokens[:, None], axis=-1)[:, 0]


def sampling_logps(
  logits: jax.Array,
  temperature: jax.Array | float = 1.0,
  top_k: jax.Array | int | None = None,
  top_p: jax.Array | float | None = None,
  excluded: jax.Array | int | None = None,
) -> jax.Array:
  """Computes the log-probs [..., V] (nats, -inf outside of the support) that `generate` samples from.

  The temperature comes first, then the rule of `losses.support.Support`. `losses.logps.token_scores` computes the same.

  Args:
    logits: [..., V].
    temperature: divides them; 0 counts as 1.
    top_k, top_p: see `generate`.
    excluded: a token that is never sampled; None: none.
  """
  temperature = jnp.asarray(temperature, jnp.float32)
  logits = logits / jnp.where(temperature > 0, temperature, 1.0)
  return jax.nn.log_softmax(mask_logits(logits, Support(excluded, top_k, top_p)))


@functools.cache
def make_generate(model: Model, max_new_tokens: int) -> Callable[..., Samples]:
  """Jits `generate` for a model and a token budget: (params, prompts, prompt_lengths, *, key, ...) -> Samples.

  The same model and budget give the same function, so that a second call recompiles nothing. Key, temperature, top_k,
  top_p, stop_id and pad_id are traced: new values recompile nothing. Another shape of prompts recompiles, and so does
  switching truncation on or off.
  """
  return jax.jit(functools.partial(generate, model, max_new_tokens=max_new_tokens))


class Completion(NamedTuple):
  """One sampled answer.

  Attributes:
    text: decoded, without control tokens.
    tokens: its ids, the stop token included. Train on these: tokenizing the text again may give others.
    logps: float32 [len(tokens)], nats, of the distribution that sampled them.
    finished: True if the stop token was sampled; False if the answer was cut.
  """

  text: str
  tokens: list[int]
  logps: np.ndarray
  finished: bool


def sample_text(
  model: Model,
  params: Params,
  tokenizer,
  prompts: Sequence[Sequence[int]],
  *,
  key: jax.Array,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  prompt_ids: Sequence[int] | None = None,
  sample_ids: Sequence[int] | None = None,
  batch_size: int = 64,
) -> list[Completion]:
  """Samples one completion per prompt, in the order of the prompts.

  Prompts of similar length share a batch, padded to one of few widths (`bucket`), so that few programs are compiled.
  Neither the batch size nor the other prompts change a completion.

  Args:
    model: its forward and cache.
    params: its parameters.
    tokenizer: gives stop_id, pad_id and decode.
    prompts: token ids, rendered with the generation prompt (`tokenizer.render`).
    key: the run's PRNG key.
    max_new_tokens: the number of tokens at which an answer is cut.
    temperature: see `generate`.
    top_k: see `generate`; None keeps all tokens.
    top_p: see `generate`; None keeps all tokens.
    prompt_ids: the numbers of the prompts in the run; 0, 1, .. by default.
    sample_ids: the number of each completion among those of its prompt; 0 by default. For several completions, repeat
      a prompt with other sample ids.
    batch_size: the most rows that are decoded together; rounded up to a multiple of the mesh's shards.

  Raises:
    InputError: an empty prompt, one that is too long, or a sampling option out of range.
  """
  _check_options(max_new_tokens, temperature, top_k, top_p, batch_size)
  for index, prompt in enumerate(prompts):
    if not len(prompt):
      raise InputError(f"prompt {index} (from 0) has no tokens; give it at least one, such as bos")
  if prompt_ids is None:
    prompt_ids = range(len(prompts))
  if sample_ids is None:
    sample_ids = [0] * len(prompts)
  run = make_generate(model, max_new_tokens)
  shards = ways("batch")
  rows = -(-min(batch_size, max(len(prompts), 1)) // shards) * shards
  for index, prompt in enumerate(prompts):
    check_length(model, len(prompt), rows, max_new_tokens, f"prompt {index} (from 0)")
  order = sorted(range(len(prompts)), key=lambda index: bucket(len(prompts[index])))
  completions: dict[int, Completion] = {}
  for start in range(0, len(order), rows):
    chosen = order[start : start + rows]
    width = bucket(max(len(prompts[index]) for index in chosen))
    tokens = np.full((rows, width), tokenizer.pad_id, np.int32)
    lengths, prompt_id, sample_id = np.zeros((3, rows), np.int32)  # missing rows: length 0
    for row, index in enumerate(chosen):
      lengths[row] = len(prompts[index])
      prompt_id[row] = prompt_ids[index]
      sample_id[row] = sample_ids[index]
      tokens[row, width - lengths[row] :] = prompts[index]
    samples = run(
      params,
      tokens,
      lengths,
      key=key,
      prompt_ids=prompt_id,
      sample_ids=sample_id,
      stop_id=tokenizer.stop_id,
      pad_id=pad_of(tokenizer),
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
    )
    samples = multihost_utils.process_allgather(samples, tiled=True)
    for row, index in enumerate(chosen):
      ids = samples.tokens[row, : samples.lengths[row]].tolist()
      logps = samples.logps[row, : len(ids)]
      completions[index] = Completion(tokenizer.decode(ids), ids, logps, bool(samples.finished[row]))
  return [completions[index] for index in range(len(prompts))]


def check_length(model: Model, length: int, rows: int, max_new_tokens: int, name: str) -> None:
  """Checks that a prompt fits the model's positions and the devices' memory.

  All scores of a layer's attention are in memory at once, in float32.

  Args:
    model: its config is read.
    length: tokens of the prompt.
    rows: of the batch.
    max_new_tokens: the largest number of tokens that are added.
    name: of the prompt, for the error message.

  Raises:
    InputError: it has too many tokens for either.
  """
  c = model.config
  if 0 < c.max_positions < length:
    raise InputError(f"{name} has {length} tokens, more than the {c.max_positions} positions of the model; shorten it")
  width = bucket(length)
  needed = 4 * rows * c.heads * width * (width + max_new_tokens)
  available = device_bytes()
  if needed > available:
    raise InputError(
      f"{name} has {length} tokens; attention in a batch of {rows} takes {needed / 2**30:.0f} GiB, and there are "
      f"{available / 2**30:.0f}; shorten it, or sample fewer together"
    )


@functools.cache
def device_bytes() -> int:
  """Returns the memory of all devices in bytes; if they do not report it, as CPUs do not, that of the hosts."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"] * jax.device_count()
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * jax.process_count()


def pad_of(tokenizer) -> int | None:
  """Returns the pad id, which is never sampled; None if it is the stop id too, which must be sampled."""
  if tokenizer.pad_id == tokenizer.stop_id:
    return None
  return tokenizer.pad_id


def bucket(length: int) -> int:
  """Returns the padded width, 32, 48, 64, 96, 128, ..., of `length` tokens: few programs to compile, little padding."""
  power = 32
  while power < length:
    power *= 2
  three_quarters = power * 3 // 4
  if 32 < length <= three_quarters:
    return three_quarters
  return power


def _check_options(max_new_tokens, temperature, top_k, top_p, batch_size):
  """Raises InputError unless the options of `sample_text` are in `RANGES`."""
  given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "batch_size": batch_size}
  given |= {name: value for name, value in (("top_k", top_k), ("top_p", top_p)) if value is not None}
  ranges.check_all("", given, RANGES)
