"""Continuous batching inside one compiled program: a queue of prompts, and slots that take the next when they are free.

A slot is a row of the decode loop. The cache is a ring in which all slots write the same column at the same time. A new
prompt is written to the columns before that one, with segment ids that hide the entries of the slot's last prompt. So
no row waits for the longest, nothing is read back to the host, and all shapes are static. Completions are those of
`generate`: their noise depends on neither slot nor neighbours.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from alignjax.errors import InputError
from alignjax.model import Model
from alignjax.sampling.generate import Samples, blank, noise_keys, sampler
from alignjax.system.sharding import constrain, ways
from alignjax.types import Params


@flax.struct.dataclass
class Occupancy:
  """The use of the slots.

  Attributes:
    steps: int32 [], decode steps, which all slots take together.
    refills: int32 [], prefills.
    share: float32 [], the share of slots that were running, averaged over the decode steps.
  """

  steps: jax.Array
  refills: jax.Array
  share: jax.Array


def generate_queue(
  model: Model,
  params: Params,
  prompts: jax.Array,
  prompt_lengths: jax.Array,
  *,
  key: jax.Array,
  prompt_ids: jax.Array,
  sample_ids: jax.Array,
  max_new_tokens: int,
  slots: int,
  refill: int | None = None,
  stop_id: jax.Array | int,
  pad_id: jax.Array | int | None,
  **options: Any,
) -> tuple[Samples, Occupancy]:
  """Gives the completions of `generate` for these arguments, with `slots` rows decoded at a time; a pure function.

  On a mesh every shard of the rows has its own part of the queue and of the slots. The shards step together.

  Args:
    model: its forward and cache, a dict of the "index" and of arrays [rows, columns, ...].
    params: its parameters.
    prompts: the queue, int32 [Q, Tp], left-padded.
    prompt_lengths: int32 [Q]; prompts of length 0 take no slot.
    key: see `generate`; so are the others that are not named here.
    prompt_ids: int32 [Q].
    sample_ids: int32 [Q].
    max_new_tokens: N; static.
    slots: S, a multiple of the mesh's shards of rows; static.
    refill: the number of prompts that a shard prefills at once, as soon as it has slots for them; static. A small
      number leaves fewer slots idle, a large one uses the device better. None: a quarter of its slots.
    stop_id: ends a completion.
    pad_id: fills the columns after the stop.
    options: temperature, top_k, top_p.

  Returns:
    Samples [Q, N], in the order of the queue, and the use of the slots.

  Raises:
    InputError: the mesh does not divide the slots.
  """
  shards = ways("batch")
  if slots < 1 or slots % shards:
    raise InputError(f"slots={slots} is not a positive multiple of the mesh's {shards} shards of rows; use one")
  queue = _deal(shards, prompts, prompt_lengths, key, prompt_ids, sample_ids)
  length, width = queue.prompts.shape[1:]
  slots = min(slots // shards, length)  # of a shard, from here on
  if refill is None:
    refill = -(-slots // 4)
  refill = min(slots, refill)
  begin, extend = sampler(model, params, max_new_tokens, stop_id, pad_id, **options)

  def empty_cache(rows):
    return model.init_cache(shards * rows, width + max_new_tokens)

  def unfinished(state):
    return jnp.any(state.admitted < queue.present)

  def fill_and_decode(state):
    state = _fill(state, queue, begin, refill, empty_cache(refill))
    return _decode(state, queue, extend, refill)

  state = _State(
    samples=blank(shards * slots, max_new_tokens, pad_id),
    row=jnp.full((shards, slots), length),
    cache=empty_cache(slots),
    admitted=jnp.zeros(shards, jnp.int32),
    done=_by_shard(blank(shards * length, max_new_tokens, pad_id), shards),
    steps=jnp.int32(0),
    refills=jnp.int32(0),
  )
  state = jax.lax.while_loop(unfinished, fill_and_decode, state)
  samples = jax.tree.map(lambda x: x[: len(prompts)], _all_rows(_done(state)))
  decoded = jnp.sum(samples.lengths) - jnp.sum(queue.present)  # the prefill gives the first token of each
  share = decoded / jnp.maximum(state.steps * shards * slots, 1)
  return samples, Occupancy(state.steps, state.refills, share)


class _Queue(NamedTuple):
  """The queue of prompts, a part [Q / F] for each of F shards."""

  prompts: jax.Array
  lengths: jax.Array
  keys: jax.Array
  order: jax.Array  # the rows of the part in the order in which they get slots; absent prompts come last
  present: jax.Array  # [F], the number of prompts that are not absent


@flax.struct.dataclass
class _State:
  """The state of the loop, with s slots of each shard and S = F * s in all."""

  samples: Samples  # [S, N], of the slots
  row: jax.Array  # [F, s], the row of its shard's queue that is in a slot; the length of that queue in an unused slot
  cache: Any  # of S rows
  admitted: jax.Array  # [F], the number of prompts of the queue that have had a slot
  done: Samples  # [F, Q / F, N], of the queue, without those in the slots
  steps: jax.Array
  refills: jax.Array


def _deal(shards, prompts, lengths, key, prompt_ids, sample_ids):
  """Splits the queue into `shards` parts of one length, filled up with absent prompts."""
  absent = -len(prompts) % shards

  def filled_up(x):
    return jnp.pad(x, ((0, absent), *((0, 0),) * (x.ndim - 1)))

  def dealt(x):
    return constrain(_by_shard(filled_up(x), shards), "batch", *(None,) * x.ndim)

  lengths = dealt(lengths)
  return _Queue(
    prompts=dealt(prompts),
    lengths=lengths,
    keys=_by_shard(noise_keys(key, filled_up(prompt_ids), filled_up(sample_ids)), shards),
    order=jnp.argsort(lengths == 0, axis=1, stable=True),
    present=jnp.sum(lengths > 0, axis=1),
  )


def _fill(state, queue, begin, refill, cache):
  """Prefills prompts into free slots of every shard, at most `refill`, and draws their first tokens.

  `cache` is an empty one, of `refill` rows a shard.
  """
  shards, slots = state.row.shape
  running = _by_shard(state.samples.running, shards)
  slot = jnp.argsort(running, axis=1, stable=True)[:, :refill]  # the free ones first
  place = state.admitted[:, None] + jnp.arange(refill)
  admitted = ~_pick(running, slot) & (place < queue.present[:, None])
  row = _pick(queue.order, place)
  lengths = jnp.where(admitted, _pick(queue.lengths, row), 0)
  index = state.cache["index"]
  width = queue.prompts.shape[-1]
  # The prompts end at the column that the running slots have just written; the rest of their rows is empty.
  prompts, lengths, keys = _all_rows((_pick(queue.prompts, row), lengths, _pick(queue.keys, row)))
  samples, cache = begin(prompts, lengths, keys, cache | {"index": index - width})
  slot = jnp.where(admitted, slot, slots)  # beyond the last slot: nothing is written there

  def put(old, new):
    return _all_rows(_put(_by_shard(old, shards), slot, _by_shard(new, shards)))

  arrays = {name: jax.tree.map(put, old, cache[name]) for name, old in state.cache.items() if name != "index"}
  return state.replace(
    done=_done(state),
    samples=jax.tree.map(put, state.samples, samples),
    row=_put(state.row, slot, row),
    cache=arrays | {"index": index},
    admitted=state.admitted + jnp.sum(admitted, axis=1),
    refills=state.refills + 1,
  )


def _decode(state, queue, extend, refill):
  """Decodes the running slots until a shard has `refill` free slots, or as many as prompts wait for one."""
  shards, slots = state.row.shape
  lengths, keys = _all_rows((_pick(queue.lengths, state.row), _pick(queue.keys, state.row)))
  waiting = queue.present - state.admitted

  def busy(carry):
    _, samples, _ = carry
    running = _by_shard(samples.running, shards)
    free = slots - jnp.sum(running, axis=1)
    due = (waiting > 0) & (free >= jnp.minimum(refill, waiting))
    return jnp.any(running) & ~jnp.any(due)

  def step(carry):
    steps, samples, cache = carry
    return (steps + 1, *extend(samples, cache, lengths, keys))

  steps, samples, cache = jax.lax.while_loop(busy, step, (state.steps, state.samples, state.cache))
  return state.replace(steps=steps, samples=samples, cache=cache)


def _done(state):
  """Returns the queue's samples with those in the slots, finished or not."""
  in_slots = _by_shard(state.samples, len(state.row))
  return jax.tree.map(lambda old, new: _put(old, state.row, new), state.done, in_slots)


def _by_shard(tree, shards):
  """Splits all R rows into those of each shard, [F, R / F, ..]."""
  return jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), tree)


def _all_rows(tree):
  """Joins all R rows [R, ..] from those of each shard [F, R / F, ..]."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


@jax.vmap
def _pick(x, index):
  """For each shard, x[index]; an index beyond the end takes the last row."""
  return x.at[index].get(mode="clip")


@jax.vmap
def _put(x, index, new):
  """For each shard, x with x[index] = new; an index beyond the end writes nothing."""
  return x.at[index].set(new, mode="drop")


@functools.cache
def make_generate_queue(
  model: Model, max_new_tokens: int, slots: int, refill: int | None = None
) -> Callable[..., tuple[Samples, Occupancy]]:
  """Jits `generate_queue`: (params, prompts, prompt_lengths, *, key, ...) -> (Samples, Occupancy).

  The same arguments give the same function; `make_generate` says what is traced.
  """
  bound = functools.partial(generate_queue, model, max_new_tokens=max_new_tokens, slots=slots, refill=refill)
  return jax.jit(bound)
