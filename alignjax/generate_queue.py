"""Continuous batching inside one compiled program: a queue of prompts, and slots that take the next as they fall free.

A slot is a row of the decode loop. The cache is a ring in which all slots write the same column at the same time; a new
prompt is laid into the columns just behind it, with segment ids that hide what the slot's last prompt left. So no row
waits for the longest, nothing is read back to the host, and all shapes are static. Completions are those of `generate`:
their noise depends on neither slot nor neighbours.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from alignjax.errors import InputError
from alignjax.generate import Samples, blank, noise_keys, sampler
from alignjax.model import Model
from alignjax.sharding import constrain, row_shards
from alignjax.types import Params


@flax.struct.dataclass
class Occupancy:
  """How well the slots were used.

  Attributes:
    steps: int32 [], decode steps that all slots took together.
    refills: int32 [], prefills.
    share: float32 [], of the slots, averaged over the decode steps, whose token was wanted.
  """

  steps: jax.Array
  refills: jax.Array
  share: jax.Array


@flax.struct.dataclass
class _State:
  """Slots [S], each with a row of the queue (its length where the slot is unused), and how much is taken and done."""

  samples: Samples
  row: jax.Array
  cache: Any
  taken: jax.Array  # int32 [F], prompts of each shard's queue
  done: Samples  # of the queue
  steps: jax.Array
  refills: jax.Array


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
  """The completions that `generate` gives for these arguments, with `slots` rows decoded at a time; a pure function.

  On a mesh every shard of the rows has its own part of the queue and of the slots; the shards step together.

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
    refill: how many prompts a shard prefills at once, as soon as it has slots for them; static. Few leave less idle,
      many use the device better. None: a quarter of its slots.
    stop_id: ends a completion.
    pad_id: fills what comes after.
    options: temperature, top_k, top_p.

  Returns:
    Samples [Q, N], in the order of the queue, and how well the slots were used.

  Raises:
    InputError: slots that the mesh does not divide.
  """
  shards = row_shards()
  if slots < 1 or slots % shards:
    raise InputError(f"slots={slots} is not a positive multiple of the mesh's {shards} shards of rows; use one")
  size, width = prompts.shape
  absent = -size % shards  # prompts of length 0 that make the shards' queues equally long
  share = lambda x: x.reshape(shards, -1, *x.shape[1:])
  whole = lambda x: _batch(jnp.pad(x, ((0, absent), *((0, 0),) * (x.ndim - 1))))
  prompts, prompt_lengths = share(whole(prompts)), share(whole(prompt_lengths))
  keys = share(noise_keys(key, whole(prompt_ids), whole(sample_ids)))
  length = prompts.shape[1]
  slots = min(slots // shards, length)  # of a shard, from here on
  refill = min(slots, -(-slots // 4) if refill is None else refill)
  columns = width + max_new_tokens
  order = jnp.argsort(prompt_lengths == 0, axis=1, stable=True)
  present = jnp.sum(prompt_lengths > 0, axis=1)
  begin, extend = sampler(model, params, max_new_tokens, stop_id, pad_id, **options)

  def fill(state):
    """Prompts for the free slots of every shard, `refill` at most, with their first token."""
    running = share(state.samples.running)
    slot = jnp.argsort(running, axis=1, stable=True)[:, :refill]  # the free ones first
    place = state.taken[:, None] + jnp.arange(refill)
    admitted = ~_pick(running, slot) & (place < present[:, None])
    row = _pick(order, jnp.minimum(place, length - 1))
    lengths = jnp.where(admitted, _pick(prompt_lengths, row), 0)
    # Written behind the columns that the others have filled; the rest of these rows is empty.
    index = state.cache["index"]
    cache = model.init_cache(shards * refill, columns) | {"index": index - width}
    samples, cache = begin(_rows(_pick(prompts, row)), _rows(lengths), _rows(_pick(keys, row)), cache)

    slot = jnp.where(admitted, slot, slots)  # beyond the last: nothing is written there
    put = lambda old, new: _rows(_put(share(old), slot, share(new)))
    arrays = {name: jax.tree.map(put, old, cache[name]) for name, old in state.cache.items() if name != "index"}
    return state.replace(
      done=store(state),
      samples=jax.tree.map(put, state.samples, samples),
      row=put(state.row, _rows(row)),
      cache=arrays | {"index": index},
      taken=state.taken + jnp.sum(admitted, axis=1),
      refills=state.refills + 1,
    )

  def store(state):
    """`done` with what the slots hold, finished or not."""
    return jax.tree.map(lambda old, new: _put(old, share(state.row), share(new)), state.done, state.samples)

  def due(state, running):
    """Whether a shard has as many free slots as are to be filled at once, or as prompts are left."""
    waiting = present - state.taken
    free = slots - jnp.sum(share(running), axis=1)
    return jnp.any((waiting > 0) & (free >= jnp.minimum(refill, waiting)))

  def decode(state):
    """Tokens for all running slots, until slots are to be filled."""
    row = share(state.row)
    lengths, slot_keys = _rows(_pick(prompt_lengths, row)), _rows(_pick(keys, row))
    steps, samples, cache = jax.lax.while_loop(
      lambda carry: jnp.any(carry[1].running) & ~due(state, carry[1].running),
      lambda carry: (carry[0] + 1, *extend(*carry[1:], lengths, slot_keys)),
      (state.steps, state.samples, state.cache),
    )
    return state.replace(steps=steps, samples=samples, cache=cache)

  state = _State(
    samples=blank(shards * slots, max_new_tokens, pad_id),
    row=jnp.full(shards * slots, length),
    cache=model.init_cache(shards * slots, columns),
    taken=jnp.zeros(shards, jnp.int32),
    done=jax.tree.map(share, blank(shards * length, max_new_tokens, pad_id)),
    steps=jnp.int32(0),
    refills=jnp.int32(0),
  )
  state = jax.lax.while_loop(lambda state: jnp.any(state.taken < present), lambda state: decode(fill(state)), state)
  samples = jax.tree.map(lambda x: _rows(x)[:size], store(state))
  decoded = jnp.sum(samples.lengths) - jnp.sum(present)  # the first token of each is the prefill's
  used = decoded / jnp.maximum(state.steps * shards * slots, 1)
  return samples, Occupancy(state.steps, state.refills, used)


_pick = jax.vmap(lambda x, index: x.at[index].get(mode="clip"))
_put = jax.vmap(lambda x, index, new: x.at[index].set(new, mode="drop"))


def _rows(x):
  return x.reshape(-1, *x.shape[2:])


def _batch(x):
  return constrain(x, "batch", *(None,) * (x.ndim - 1))


@functools.cache
def make_generate_queue(
  model: Model, max_new_tokens: int, slots: int, refill: int | None = None
) -> Callable[..., tuple[Samples, Occupancy]]:
  """`generate_queue` jitted, as `make_generate` jits `generate`."""
  bound = functools.partial(generate_queue, model, max_new_tokens=max_new_tokens, slots=slots, refill=refill)
  return jax.jit(bound)
