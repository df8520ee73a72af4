"""Continuous batching inside one compiled program: a queue of prompts, and slots that take the next as they fall free.

A slot is a row of the decode loop. The cache is a ring in which all slots write the same column at the same time; a new
prompt is laid into the columns just behind it, with segment ids that hide what the slot's last prompt left. So no row
waits for the longest, nothing is read back to the host, and all shapes are static. Completions are those of `generate`:
their noise depends on neither slot nor neighbours.
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
  """How well the slots were used.

  Attributes:
    steps: int32 [], decode steps that all slots took together.
    refills: int32 [], prefills.
    share: float32 [], of the slots, averaged over the decode steps, whose token was wanted.
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
  shards = ways("batch")
  if slots < 1 or slots % shards:
    raise InputError(f"slots={slots} is not a positive multiple of the mesh's {shards} shards of rows; use one")
  queue = _deal(shards, prompts, prompt_lengths, key, prompt_ids, sample_ids)
  length, width = queue.prompts.shape[1:]
  slots = min(slots // shards, length)  # of a shard, from here on
  refill = min(slots, -(-slots // 4) if refill is None else refill)
  empty = lambda rows: model.init_cache(shards * rows, width + max_new_tokens)
  begin, extend = sampler(model, params, max_new_tokens, stop_id, pad_id, **options)
  state = _State(
    samples=blank(shards * slots, max_new_tokens, pad_id),
    row=jnp.full((shards, slots), length),
    cache=empty(slots),
    taken=jnp.zeros(shards, jnp.int32),
    done=_share(blank(shards * length, max_new_tokens, pad_id), shards),
    steps=jnp.int32(0),
    refills=jnp.int32(0),
  )

  def fill_and_decode(state):
    state = _fill(state, queue, begin, refill, empty(refill))
    return _decode(state, queue, extend, refill)

  unfinished = lambda state: jnp.any(state.taken < queue.present)
  state = jax.lax.while_loop(unfinished, fill_and_decode, state)
  samples = jax.tree.map(lambda x: x[: len(prompts)], _rows(_done(state)))
  decoded = jnp.sum(samples.lengths) - jnp.sum(queue.present)  # the first token of each is the prefill's
  used = decoded / jnp.maximum(state.steps * shards * slots, 1)
  return samples, Occupancy(state.steps, state.refills, used)


class _Queue(NamedTuple):
  """What is to be sampled: a part [Q / F] of the queue for each of F shards."""

  prompts: jax.Array
  lengths: jax.Array
  keys: jax.Array
  order: jax.Array  # rows of the part in the order in which they are taken: those of absent prompts last
  present: jax.Array  # [F], how many are not absent


@flax.struct.dataclass
class _State:
  """Slots, s of each shard and S = F * s in all."""

  samples: Samples  # [S, N], of the slots
  row: jax.Array  # [F, s], the row of its shard's queue that a slot holds; that queue's length in an unused slot
  cache: Any  # of S rows
  taken: jax.Array  # [F], how many prompts of the queue have had a slot
  done: Samples  # [F, Q / F, N], of the queue, without what the slots hold
  steps: jax.Array
  refills: jax.Array


def _deal(shards, prompts, lengths, key, prompt_ids, sample_ids):
  """The queue in `shards` parts of one length, filled up with absent prompts."""
  absent = -len(prompts) % shards
  whole = lambda x: jnp.pad(x, ((0, absent), *((0, 0),) * (x.ndim - 1)))
  spread = lambda x: constrain(_share(whole(x), shards), "batch", *(None,) * x.ndim)
  lengths = spread(lengths)
  return _Queue(
    prompts=spread(prompts),
    lengths=lengths,
    keys=_share(noise_keys(key, whole(prompt_ids), whole(sample_ids)), shards),
    order=jnp.argsort(lengths == 0, axis=1, stable=True),
    present=jnp.sum(lengths > 0, axis=1),
  )


def _fill(state, queue, begin, refill, cache):
  """Prompts in the free slots of every shard, `refill` at most, with their first tokens; the cache is an empty one."""
  shards, slots = state.row.shape
  running = _share(state.samples.running, shards)
  slot = jnp.argsort(running, axis=1, stable=True)[:, :refill]  # the free ones first
  place = state.taken[:, None] + jnp.arange(refill)
  admitted = ~_pick(running, slot) & (place < queue.present[:, None])
  row = _pick(queue.order, place)
  lengths = jnp.where(admitted, _pick(queue.lengths, row), 0)
  index, width = state.cache["index"], queue.prompts.shape[-1]
  # The prompts go to the columns behind those that the running slots share; the rest of their rows is empty.
  prompts, lengths, keys = _rows((_pick(queue.prompts, row), lengths, _pick(queue.keys, row)))
  samples, cache = begin(prompts, lengths, keys, cache | {"index": index - width})

  slot = jnp.where(admitted, slot, slots)  # beyond the last: nothing is written there
  put = lambda old, new: _rows(_put(_share(old, shards), slot, _share(new, shards)))
  kept = {name: jax.tree.map(put, old, cache[name]) for name, old in state.cache.items() if name != "index"}
  return state.replace(
    done=_done(state),
    samples=jax.tree.map(put, state.samples, samples),
    row=_put(state.row, slot, row),
    cache=kept | {"index": index},
    taken=state.taken + jnp.sum(admitted, axis=1),
    refills=state.refills + 1,
  )


def _decode(state, queue, extend, refill):
  """Tokens for all running slots, until a shard has as many free as are to be filled, or as prompts wait for them."""
  shards, slots = state.row.shape
  lengths, keys = _rows((_pick(queue.lengths, state.row), _pick(queue.keys, state.row)))
  waiting = queue.present - state.taken

  def busy(carry):
    running = _share(carry[1].running, shards)
    free = slots - jnp.sum(running, axis=1)
    due = (waiting > 0) & (free >= jnp.minimum(refill, waiting))
    return jnp.any(running) & ~jnp.any(due)

  step = lambda carry: (carry[0] + 1, *extend(*carry[1:], lengths, keys))
  steps, samples, cache = jax.lax.while_loop(busy, step, (state.steps, state.samples, state.cache))
  return state.replace(steps=steps, samples=samples, cache=cache)


def _done(state):
  """The queue's samples with what the slots hold, finished or not."""
  return jax.tree.map(lambda old, new: _put(old, state.row, new), state.done, _share(state.samples, len(state.row)))


def _share(tree, shards):
  """Rows [F, R / F, ..] of each shard, from all R."""
  return jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), tree)


def _rows(tree):
  """All R rows again."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


_pick = jax.vmap(lambda x, index: x.at[index].get(mode="clip"))
_put = jax.vmap(lambda x, index, new: x.at[index].set(new, mode="drop"))


@functools.cache
def make_generate_queue(
  model: Model, max_new_tokens: int, slots: int, refill: int | None = None
) -> Callable[..., tuple[Samples, Occupancy]]:
  """`generate_queue` jitted, as `make_generate` jits `generate`."""
  bound = functools.partial(generate_queue, model, max_new_tokens=max_new_tokens, slots=slots, refill=refill)
  return jax.jit(bound)
