"""Slots that serve requests: prompts join and leave a decode loop between its chunks, each with options of its own.

The loop of `queue.py` with the host between its parts. All that a request decides (seed, temperature, truncation,
budget) is a traced array of the slots, so one program decodes them all. The cache is a ring in which all slots write
the same column; its size follows the longest text in it (`resize`). Completions are those of `generate`: their noise
depends on neither slot nor neighbours.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignjax.losses import chunks
from alignjax.losses.chunks import Capped
from alignjax.model import Model
from alignjax.sampling.generate import draw, last_logits, noise_key, read_prompts, sampling_logps
from alignjax.system.sharding import constrain, ways
from alignjax.types import Params

TOP = 20  # the likeliest tokens that are reported beside one that was drawn


class Options(NamedTuple):
  """How each row is sampled, all [R] or [S].

  Attributes:
    keys: PRNG keys of the completions' noise (`generate.noise_keys`); None where `prefill` makes them.
    temperature: float32; 0 takes the likeliest token.
    top_k: int32; 0 keeps all tokens.
    top_p: float32; 1 keeps all tokens.
    limits: int32, the most tokens of the completion.
    reported: bool, whether log-probs are wanted.
  """

  keys: jax.Array | None
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  limits: jax.Array
  reported: jax.Array


class Slots(NamedTuple):
  """The rows of the loop, all [S], and their cache.

  Attributes:
    tokens: int32, the last token of each.
    prompt_lengths: int32.
    lengths: int32, tokens that were drawn so far.
    running: bool, whether a row can still grow.
    options: how each is sampled.
    cache: of S rows, a dict of the "index" and of arrays [S, ..] with an axis of columns.
  """

  tokens: jax.Array
  prompt_lengths: jax.Array
  lengths: jax.Array
  running: jax.Array
  options: Options
  cache: Any


class Prompts(NamedTuple):
  """Prompts that get slots.

  Attributes:
    tokens: int32 [R, W], left-padded.
    lengths: int32 [R]; 0: an absent row.
    seeds: uint32 [R], of the keys, as `alignjax generate --seed`.
    prompt_ids: int32 [R], see `generate`.
    sample_ids: int32 [R].
    options: [R]; their keys are made from the seeds.
  """

  tokens: jax.Array
  lengths: jax.Array
  seeds: jax.Array
  prompt_ids: jax.Array
  sample_ids: jax.Array
  options: Options


class Scores(NamedTuple):
  """Log-probs in nats at temperature 1 over the whole vocabulary; those of rows that want none are of no meaning.

  Attributes:
    logps: float32 [.., n], of the tokens themselves.
    top_tokens: int32 [.., n, K], the likeliest first.
    top_logps: float32 [.., n, K].
  """

  logps: jax.Array
  top_tokens: jax.Array
  top_logps: jax.Array


class Drawn(NamedTuple):
  """Tokens that a program drew.

  Attributes:
    tokens: int32 [.., n].
    counts: int32 [..], how many of the n were drawn in each row.
    scores: of them.
  """

  tokens: jax.Array
  counts: jax.Array
  scores: Scores


class Begun(NamedTuple):
  """What `prefill` leaves for the slots: their fields [R], and a cache of the prompts alone, [R, .., W, ..]."""

  fields: Slots  # without a cache
  cache: Any


class Programs(NamedTuple):
  """What the host of the loop calls; `join` and `decode` donate the slots.

  Attributes:
    empty: (rows, columns) -> S slots of which none runs.
    resize: (slots, taken [S'], columns) -> these rows of the slots, in a cache of `columns`, which must hold every
      running row's text. A row of S or more is an empty slot.
    prefill: (params, prompts, top, allowed=None) -> (begun, drawn of [R, 1], scores of the prompts [R, W] or None).
      Column t scores token t given those before it; the first of a prompt has no meaning. top: static, the number of
      likeliest tokens in these scores; 0: None.
    join: (slots, begun, places [R]) -> the slots with these rows in the place of others; S is no place.
    decode: (params of `Model.unstack`, slots, kept [S], steps, floor, allowed=None) -> (slots, drawn of [S, chunk]). A
      row that is not kept stops. The loop ends after `steps` tokens, at most the chunk, or when fewer than `floor`
      rows run.

  `allowed` restricts the next token: int32 [.., ceil(V / 32)], a bit for each token of the vocabulary, the lowest
  first. With it, `decode` must be asked for a single step.
  """

  empty: Callable[..., Slots]
  resize: Callable[..., Slots]
  prefill: Callable[..., tuple[Begun, Drawn, Scores | None]]
  join: Callable[..., Slots]
  decode: Callable[..., tuple[Slots, Drawn]]


def make_programs(model: Model, chunk: int, stop_id: int, pad_id: int | None) -> Programs:
  """Jits the parts of the loop; call it, and them, inside `jax.set_mesh`.

  The numbers of rows, S and R, are multiples of the mesh's shards of rows.

  Args:
    model: its forward and cache.
    chunk: the most tokens that one call of `decode` adds to a row.
    stop_id: ends a completion.
    pad_id: is never sampled; None: every token may be.
  """
  axes = _column_axes(model)
  make_empty = functools.partial(jax.jit, functools.partial(empty, model), static_argnums=(0, 1))
  placed = jax.tree.map(lambda x: x.sharding, make_empty()(ways("batch"), 8))  # the same for every size
  donating = functools.partial(jax.jit, donate_argnames="slots")
  return Programs(
    empty=make_empty(out_shardings=placed),
    resize=jax.jit(functools.partial(resize, axes), static_argnames="columns", out_shardings=placed),
    prefill=jax.jit(functools.partial(prefill, model, stop_id, pad_id), static_argnames="top"),
    join=donating(functools.partial(join, axes), out_shardings=placed),
    decode=donating(functools.partial(decode, model, chunk, stop_id, pad_id), out_shardings=(placed, None)),
  )


def empty(model: Model, rows: int, columns: int) -> Slots:
  """Makes `rows` slots of which none runs, with an empty cache of `columns`."""

  def filled(value, dtype):
    return constrain(jnp.full(rows, value, dtype), "batch")

  options = Options(
    keys=jax.vmap(jax.random.key)(filled(0, jnp.uint32)),
    temperature=filled(1, jnp.float32),
    top_k=filled(0, jnp.int32),
    top_p=filled(1, jnp.float32),
    limits=filled(0, jnp.int32),
    reported=filled(False, bool),
  )
  return Slots(
    tokens=filled(0, jnp.int32),
    prompt_lengths=filled(0, jnp.int32),
    lengths=filled(0, jnp.int32),
    running=filled(False, bool),
    options=options,
    cache=model.init_cache(rows, columns),
  )


def resize(axes: Any, slots: Slots, taken: jax.Array, columns: int) -> Slots:
  """Moves rows of the slots to a cache of `columns`, in which the newest entries are the last columns.

  Args:
    axes: of `_column_axes`.
    slots: to move.
    taken: the rows, int32 [S'], S or more for an empty slot.
    columns: at least the tokens of every running row.
  """
  index = slots.cache["index"]

  def pick(x):
    return x.at[taken].get(mode="clip")

  def move(ring, axis):
    size = ring.shape[axis]
    oldest_first = jnp.roll(pick(ring), -index, axis)
    if columns <= size:
      return jax.lax.slice_in_dim(oldest_first, size - columns, size, axis=axis)
    widths = [(0, 0)] * ring.ndim
    widths[axis] = (columns - size, 0)
    return jnp.pad(oldest_first, widths)

  fields = jax.tree.map(pick, slots._replace(cache=None))
  return fields._replace(
    running=fields.running & (taken < len(slots.tokens)),
    cache=_rings(move, slots.cache, axes) | {"index": jnp.zeros_like(index)},
  )


def prefill(
  model: Model,
  stop_id: int,
  pad_id: int | None,
  params: Params,
  prompts: Prompts,
  top: int,
  allowed: jax.Array | None = None,
) -> tuple[Begun, Drawn, Scores | None]:
  """Reads prompts and draws the first token of each; `Programs` describes the arguments."""
  rows, width = prompts.tokens.shape
  cache = model.init_cache(rows, width)
  hidden, cache = read_prompts(model, params, prompts.tokens, prompts.lengths, cache)
  unembedding = model.unembedding(params)
  keys = jax.vmap(noise_key)(jax.vmap(jax.random.key)(prompts.seeds), prompts.prompt_ids, prompts.sample_ids)
  options = prompts.options._replace(keys=keys)
  present = prompts.lengths > 0
  first = jnp.zeros(rows, jnp.int32)
  tokens, scores = _next(last_logits(hidden, unembedding), options, first, present, pad_id, allowed)
  counts = (present & (options.limits > 0)).astype(jnp.int32)
  running = (counts > 0) & (counts < options.limits) & (tokens != stop_id)
  begun = Begun(Slots(tokens, prompts.lengths, counts, running, options, None), cache)
  drawn = Drawn(tokens[:, None], counts, jax.tree.map(lambda x: x[:, None], scores))
  if not top:
    return begun, drawn, None
  return begun, drawn, score(hidden, unembedding, prompts.tokens, top)


def join(axes: Any, slots: Slots, begun: Begun, places: jax.Array) -> Slots:
  """Writes rows that have begun into slots; `Programs` describes the arguments, `axes` is of `_column_axes`."""
  index = slots.cache["index"]

  def put(old, new):
    return old.at[places].set(new, mode="drop")

  def put_ring(ring, axis, new):
    width = new.shape[axis]
    widths = [(0, 0)] * ring.ndim
    widths[axis] = (0, ring.shape[axis] - width)
    # The prompts end at the column that was written last; the rest of their rows is empty.
    return put(ring, jnp.roll(jnp.pad(new, widths), index - width, axis))

  fields = jax.tree.map(put, slots._replace(cache=None), begun.fields)
  return fields._replace(cache=_rings(put_ring, slots.cache, axes, begun.cache) | {"index": index})


def decode(
  model: Model,
  chunk: int,
  stop_id: int,
  pad_id: int | None,
  params: Params,
  slots: Slots,
  kept: jax.Array,
  steps: jax.Array,
  floor: jax.Array,
  allowed: jax.Array | None = None,
) -> tuple[Slots, Drawn]:
  """Adds up to `chunk` tokens to every running row; `Programs` describes the arguments."""
  rows = len(slots.tokens)
  top = min(TOP, model.config.vocab)
  slots = slots._replace(running=slots.running & kept)
  drawn = Drawn(jnp.zeros((rows, chunk), jnp.int32), jnp.zeros(rows, jnp.int32), _no_scores((rows, chunk), top))

  def busy(state):
    step, slots, _ = state
    return (step < steps) & (jnp.sum(slots.running) >= jnp.maximum(floor, 1))

  def extend(state):
    step, slots, drawn = state
    positions = slots.prompt_lengths + jnp.maximum(slots.lengths - 1, 0)
    tokens = slots.tokens[:, None]
    hidden, cache = model.forward(params, tokens, jnp.ones_like(tokens), positions[:, None], slots.cache)
    running = slots.running
    logits = last_logits(hidden, model.unembedding(params))
    tokens, scores = _next(logits, slots.options, slots.lengths, running, pad_id, allowed)
    lengths = slots.lengths + running
    drawn = Drawn(
      tokens=drawn.tokens.at[:, step].set(tokens),
      counts=drawn.counts + running,
      scores=jax.tree.map(lambda old, new: old.at[:, step].set(new), drawn.scores, scores),
    )
    slots = slots._replace(
      tokens=jnp.where(running, tokens, slots.tokens),
      lengths=lengths,
      running=running & (tokens != stop_id) & (lengths < slots.options.limits),
      cache=cache,
    )
    return step + 1, slots, drawn

  _, slots, drawn = jax.lax.while_loop(busy, extend, (jnp.int32(0), slots, drawn))
  columns = slots.cache["segment_ids"].shape[1]
  # A ring's index may be any integer; a server would reach the largest.
  return slots._replace(cache=slots.cache | {"index": slots.cache["index"] % columns}), drawn


def _next(logits, options, lengths, running, pad_id, allowed):
  """Draws a token of each row [R] from logits [R, V]; returns it and its `Scores` [R], zeros if no row wants them."""
  temperature = options.temperature[:, None]
  possible = logits
  if allowed is not None:
    bits = (allowed[:, :, None] >> jnp.arange(32)) & 1
    possible = jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[1]] > 0, logits, -jnp.inf)

  def truncated():
    return sampling_logps(possible, temperature, options.top_k[:, None], options.top_p[:, None], pad_id)

  def whole():
    return sampling_logps(possible, temperature, None, None, pad_id)

  truncates = jnp.any(running & ((options.top_k > 0) | (options.top_p < 1)))
  keys = jax.vmap(jax.random.fold_in)(options.keys, lengths)
  tokens, _ = draw(jax.lax.cond(truncates, truncated, whole), keys, temperature)
  top = min(TOP, logits.shape[-1])
  scores = jax.lax.cond(
    jnp.any(running & options.reported), lambda: _scores(logits, tokens, top), lambda: _no_scores(tokens.shape, top)
  )
  return tokens, scores


def _no_scores(shape, top):
  """Makes the `Scores` of tokens [..] that want none."""
  shape_of_top = (*shape, top)
  return Scores(jnp.zeros(shape), jnp.zeros(shape_of_top, jnp.int32), jnp.zeros(shape_of_top))


def _scores(logits, tokens, top):
  """Returns the `Scores` of tokens [..] among logits [.., V]."""
  normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  best, ids = jax.lax.top_k(logits, top)
  own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
  return Scores((own - normaliser)[..., 0], ids.astype(jnp.int32), best - normaliser)


def score(hidden: jax.Array, unembedding: jax.Array | Capped, tokens: jax.Array, top: int) -> Scores:
  """Scores tokens [B, T] given those before them, a chunk of positions at a time; column 0 has no meaning.

  A token's own log-prob equals the best one bit for bit if it is the likeliest.

  Args:
    hidden: [B, T, D], the states of these tokens.
    unembedding: of `Model.unembedding`.
    tokens: int32 [B, T].
    top: K, the number of likeliest tokens; static.
  """
  length = tokens.shape[1]
  size = chunks.size(*tokens.shape)
  matrix = chunks.capped(unembedding).take(None, hidden.dtype).gathered()
  targets = chunks.split(chunks.pad(jnp.roll(tokens, -1, axis=1), size), size)
  states = chunks.split(chunks.pad(hidden, size), size)
  parts = jax.lax.map(lambda part: _scores(chunks.logits(part[0], matrix), part[1], top), (states, targets))
  return jax.tree.map(lambda x: jnp.roll(chunks.join(x)[:, :length], 1, axis=1), parts)


def _column_axes(model):
  """Returns the axis of the columns of each array of the model's cache; that of the index is -1."""
  sizes = [jax.eval_shape(functools.partial(model.init_cache, 1, columns)) for columns in (8, 16)]

  def axis(few, many):
    return next((place for place, sides in enumerate(zip(few.shape, many.shape, strict=True)) if len({*sides}) > 1), -1)

  return jax.tree.map(axis, *sizes)


def _rings(function, cache, axes, *others):
  """Applies function(ring, axis, ..) to every array of a cache but its index."""
  names = [name for name in cache if name != "index"]
  return {name: jax.tree.map(function, cache[name], axes[name], *(other[name] for other in others)) for name in names}
