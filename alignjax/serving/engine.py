"""Completions for many clients at once: jobs join and leave a model's decode loop between its chunks.

An engine is driven by one thread (`device.py`), and the only code here that other threads read are its counts.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from alignjax.errors import InputError
from alignjax.runs.run import Run, check_writes
from alignjax.sampling import slots
from alignjax.sampling.generate import bucket, check_length, device_bytes, pad_of
from alignjax.serving.grammar import Grammars, Growing
from alignjax.serving.text import Text
from alignjax.system.sharding import ways

CHUNK = 8  # tokens between two looks at the queue; a stop string wastes at most so many
_SMALLEST = 64  # columns of the cache
_PATIENCE = 16  # chunks in which a quarter of the cache was enough, before it shrinks
_SHARE = 8  # of the devices' memory, 1 / so much is for the attention scores of a prefill


@dataclasses.dataclass(frozen=True)
class Ask:
  """One completion to sample: what `alignjax generate` takes, and what a client may ask beside.

  Attributes:
    prompt: token ids, at least one.
    max_tokens: the most tokens; 0 scores the prompt alone.
    seed, prompt_id, sample_id: of the noise.
    temperature, top_k, top_p: of the sampler.
    stops: texts that end the completion, and are not part of it.
    reported: whether log-probs of the tokens are wanted.
    top_of_prompt: the likeliest tokens wanted beside each of the prompt; 0: the prompt is not scored.
    streamed: whether the text is wanted before its end.
    schema: JSON schema as text, which the completion must fit; "": none.
  """

  prompt: tuple[int, ...]
  max_tokens: int
  seed: int = 0
  prompt_id: int = 0
  sample_id: int = 0
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  stops: tuple[str, ...] = ()
  reported: bool = False
  top_of_prompt: int = 0
  streamed: bool = False
  schema: str = ""


class TokenScore(NamedTuple):
  """A token's log-prob in nats at temperature 1, and the likeliest tokens' (id, log-prob), best first."""

  token: int
  logp: float
  top: list[tuple[int, float]]


class Piece(NamedTuple):
  """What a job has got since its last piece.

  Attributes:
    text: new text; "" unless the job is streamed or this is the last piece, which has the rest.
    scores: of the new tokens, if they are reported.
    finish: "stop" or "length" in the last piece, otherwise "".
    tokens: of the whole completion, in the last piece; the stop token included.
    prompt_scores: of the prompt's tokens but the first, in the first piece of a job that asks for them.
    failure: why the job ended without a completion; "" if it did not.
  """

  text: str = ""
  scores: Sequence[TokenScore] = ()
  finish: str = ""
  tokens: Sequence[int] = ()
  prompt_scores: Sequence[TokenScore] = ()
  failure: str = ""

  @property
  def last(self) -> bool:
    """Whether nothing follows."""
    return bool(self.finish or self.failure)


class Job:
  """An `Ask` on its way.

  Attributes:
    ask: what is wanted.
    receive: called with each `Piece` (see `device.Device`).
    cancelled: set it, from any thread, when nobody waits any more.
    begun: when it was submitted, by time.monotonic.
  """

  def __init__(self, ask: Ask, receive: Callable[[Piece], None]):
    self.ask = ask
    self.receive = receive
    self.cancelled = False
    self.begun = time.monotonic()


@dataclasses.dataclass
class Load:
  """What an engine has done since it began."""

  jobs: int = 0
  cancelled: int = 0
  prompt_tokens: int = 0
  tokens: int = 0
  steps: int = 0
  slot_steps: int = 0  # slots that ran, summed over the steps
  prefills: int = 0


@dataclasses.dataclass
class _Seat:
  """What the host knows of a slot's job."""

  job: Job
  text: Text
  scores: list[TokenScore] = dataclasses.field(default_factory=list)  # that were not handed over
  ended: bool = False
  growing: Growing | None = None  # of a completion that must fit a schema

  @property
  def columns(self) -> int:
    """The columns of the cache that its text takes."""
    return len(self.job.ask.prompt) + len(self.text.ids)


class _Size(NamedTuple):
  """Of the cache: slots, and columns."""

  rows: int
  columns: int


Handed = tuple[Job, Piece]


class Engine:
  """The slots of one run's model. All but the attributes is for one thread, inside of `jax.set_mesh(run.mesh)`.

  Attributes:
    run: of a policy.
    rows: the most slots. Fewer are decoded while there are fewer jobs.
    context: the most tokens of a prompt with its completion.
    waiting: jobs without a slot, in the order of their coming.
    counts: of what was done.
  """

  def __init__(self, run: Run, rows: int, context: int, base: "Engine | None" = None):
    """Makes empty slots.

    Args:
      run: of a policy.
      rows: slots, rounded up to a multiple of the mesh's shards of rows.
      context: the most tokens of a prompt with its completion.
      base: an engine of a run with the same base under its LoRA factors: this one shares the base's arrays.

    Raises:
      InputError: a reward model, several processes, a context longer than the model's positions or than memory holds.
    """
    check_writes(run)
    if jax.process_count() > 1:
      raise InputError("serve: needs one process, and this run has several; start it without the launcher")
    positions = run.model.config.max_positions
    if 0 < positions < context:
      raise InputError(f"--context={context}: more than the {positions} positions of the model; use at most so many")
    self._shards = ways("batch", run.mesh)
    self.run = run
    self.rows = -(-rows // self._shards) * self._shards
    self.context = context
    self.waiting: collections.deque[Job] = collections.deque()
    self.counts = Load()
    self._widest = bucket(context) + CHUNK  # columns
    _check_memory(run, self.rows, self._widest)
    check_length(run.model, context, self._shards, 0, f"--context={context}: a prompt that fills it")
    trained, held = run.model.split(run.params)
    self._params = jax.jit(run.model.unstack)(trained)
    if base is not None:
      self.run = run._replace(params=trained | {name: base.run.params[name] for name in held})
      self._params |= {name: base._params[name] for name in held}
    else:
      self._params |= jax.jit(run.model.unstack)(held)
    self._programs = slots.make_programs(run.model, CHUNK, run.tokenizer.stop_id, pad_of(run.tokenizer))
    self.clear()

  def clear(self) -> None:
    """Empties the slots."""
    self._patience = _PATIENCE
    self._size = _Size(self._shards, _SMALLEST)
    self._slots = self._programs.empty(*self._size)
    self._seats: dict[int, _Seat] = {}

  @functools.cached_property
  def grammars(self) -> Grammars:
    """The schemas that completions may have to fit; for every thread. Raises InputError without the package."""
    return Grammars(self.run.tokenizer, self.run.model.config.vocab)

  def jobs(self) -> list[Job]:
    """Returns the jobs in the slots."""
    return [seat.job for seat in self._seats.values()]

  def warm(self) -> None:
    """Compiles what a short request needs, so that errors come before the first client."""
    self.waiting.append(Job(Ask(prompt=(self.run.tokenizer.stop_id,), max_tokens=2, temperature=0.0), _forget))
    while self.waiting or self._seats:
      self.advance()
    self.counts = Load()

  @property
  def busy(self) -> int:
    """The number of slots with a job."""
    return len(self._seats)

  def advance(self) -> list[Handed]:
    """Gives free slots to waiting jobs, decodes a chunk, and returns the pieces that the jobs have got."""
    self._drop_cancelled()
    handed: list[Handed] = []
    begun = []
    while jobs := self._next_group():
      begun.append(self._begin(jobs))
      if jobs[0].ask.schema:  # its next token depends on the first
        self._read_first(*begun.pop(), handed)
    chunk = None
    if self._seats:
      chunk = self._decode()
    for read in begun:
      self._read_first(*read, handed)
    if chunk is not None:
      self._read_chunk(chunk, handed)
    return handed

  def _drop_cancelled(self):
    """Frees the slots, and the places in the queue, of jobs whose clients are gone."""
    gone = [place for place, seat in self._seats.items() if seat.job.cancelled]
    for place in gone:
      del self._seats[place]
    present = [job for job in self.waiting if not job.cancelled]
    self.counts.cancelled += len(gone) + len(self.waiting) - len(present)
    if len(present) < len(self.waiting):
      self.waiting = collections.deque(present)

  def _next_group(self) -> list[Job]:
    """Takes jobs from the queue that can be read together, for slots that are free; [] if there is none.

    They are the first one and others whose prompts are padded to the same width; a power of four of them, for which few
    programs are compiled, and no more than memory has room for.
    """
    free = self.rows - len(self._seats)
    if not self.waiting or not free:
      return []
    first = self.waiting[0].ask
    alike = [job for job in self.waiting if _kind(job.ask) == _kind(first)]
    width = bucket(len(first.prompt))
    room = device_bytes() // _SHARE // (4 * self.run.model.config.heads * width * width)
    count = 1
    while 4 * count <= min(len(alike), free, room):
      count *= 4
    taken = set(map(id, alike[:count]))
    self.waiting = collections.deque(job for job in self.waiting if id(job) not in taken)
    return alike[:count]

  def _begin(self, jobs: Sequence[Job]) -> tuple[list[_Seat], slots.Drawn, slots.Scores | None]:
    """Reads prompts into slots; returns their seats, the first tokens, and the scores of the prompts, or None."""
    asks = [job.ask for job in jobs]
    top, width, _ = _kind(asks[0])
    new = [self._seat(job) for job in jobs]
    prompts = _prompts(asks, width, self._shards)
    begun, drawn, prompt_scores = self._programs.prefill(
      self.run.params,
      prompts,
      top=min(top, self.run.model.config.vocab),
      allowed=self._allowed(dict(enumerate(new)), len(prompts.lengths)),
    )
    self._make_room(len(jobs), width)
    free = (place for place in range(self._size.rows) if place not in self._seats)
    seats = dict(zip(free, new, strict=False))
    places = np.full(len(drawn.counts), self._size.rows, np.int32)
    places[: len(jobs)] = list(seats)
    self._slots = self._programs.join(self._slots, begun, places)
    self._seats |= seats
    self.counts.prefills += 1
    self.counts.prompt_tokens += sum(len(ask.prompt) for ask in asks)
    return new, drawn, prompt_scores

  def _seat(self, job: Job) -> _Seat:
    """Makes what the host knows of a job that gets a slot."""
    seat = _Seat(job, Text(self.run.tokenizer, job.ask.stops))
    if job.ask.schema:
      seat.growing = self.grammars.begin(job.ask.schema)
    return seat

  def _allowed(self, seats: Mapping[int, _Seat], rows: int) -> np.ndarray | None:
    """Returns the tokens that may come next in each of the rows, as bits; None if every token may in all of them."""
    growing = {place: seat.growing for place, seat in seats.items() if seat.growing is not None}
    if not growing:
      return None
    allowed = np.full((rows, -(-self.run.model.config.vocab // 32)), -1, np.int32)
    for place, state in growing.items():
      allowed[place] = state.allowed()
    return allowed

  def _make_room(self, jobs: int = 0, width: int = 0) -> None:
    """Gives the cache rows for so many more jobs, and columns for the longest text and a chunk, or for a prompt.

    Both are powers of two, so that few programs are compiled. The cache grows at once, and shrinks where a quarter
    would have done for a while: clients that come again together leave it empty for a moment.
    """
    rows = self._shards
    while rows < len(self._seats) + jobs:
      rows *= 2
    needed = max([width, *(seat.columns for seat in self._seats.values())]) + CHUNK + 1
    columns = _SMALLEST
    while columns < needed:
      columns *= 2
    wanted = _Size(min(rows, self.rows), min(columns, self._widest))
    size = _Size(max(wanted.rows, self._size.rows), max(wanted.columns, self._size.columns))
    if size == self._size and not jobs:
      roomy = 4 * wanted.rows <= size.rows or 4 * wanted.columns <= size.columns
      self._patience -= 1
      if not roomy:
        self._patience = _PATIENCE
      if not self._patience:
        size = wanted
    if size == self._size:
      return
    self._patience = _PATIENCE
    taken = np.full(size.rows, self._size.rows, np.int32)
    taken[: len(self._seats)] = list(self._seats)
    self._slots = self._programs.resize(self._slots, taken, columns=size.columns)
    self._seats = dict(enumerate(self._seats.values()))
    self._size = size

  def _decode(self) -> slots.Drawn:
    """Decodes until the chunk is full, or until as many slots are free as shall be filled together."""
    self._make_room()
    kept = np.zeros(self._size.rows, bool)
    kept[list(self._seats)] = True
    floor = 1
    if self.waiting:
      floor = len(self._seats) + 1 - min(len(self.waiting), -(-self.rows // 4))
    steps = CHUNK
    allowed = self._allowed(self._seats, self._size.rows)
    if allowed is not None:
      steps = 1  # what may follow depends on the token
    self._slots, drawn = self._programs.decode(
      self._params, self._slots, kept, np.int32(steps), np.int32(floor), allowed=allowed
    )
    return drawn

  def _read_first(self, seats, drawn, prompt_scores, handed):
    """Adds the first tokens of jobs, and the scores of their prompts."""
    tokens, counts = jax.device_get((drawn.tokens, drawn.counts))
    scores = _scores_for(seats, drawn)
    if prompt_scores is not None:
      prompt_scores = jax.device_get(prompt_scores)
    for row, seat in enumerate(seats):
      ask = seat.job.ask
      of_prompt: Sequence[TokenScore] = ()
      if prompt_scores is not None:
        start = prompt_scores.logps.shape[1] - len(ask.prompt)
        of_prompt = [
          _token_score(ask.prompt[i], prompt_scores, (row, start + i), ask.top_of_prompt)
          for i in range(1, len(ask.prompt))
        ]
      self._add(seat, tokens[row, : counts[row]].tolist(), scores, row, handed, of_prompt)
    self._free()

  def _read_chunk(self, drawn, handed):
    """Adds the tokens of a chunk to all jobs in slots."""
    tokens, counts = jax.device_get((drawn.tokens, drawn.counts))
    scores = _scores_for(self._seats.values(), drawn)
    self.counts.steps += int(counts.max())
    self.counts.slot_steps += int(counts.sum())
    for place, seat in self._seats.items():
      self._add(seat, tokens[place, : counts[place]].tolist(), scores, place, handed)
    self._free()

  def _free(self):
    """Frees the slots of jobs that have ended."""
    self._seats = {place: seat for place, seat in self._seats.items() if not seat.ended}

  def _add(self, seat, tokens, scores, row, handed, of_prompt=()):
    """Adds tokens to a job; appends its next piece, if there is one, to `handed`."""
    ask = seat.job.ask
    text = seat.text
    before = len(text.ids)
    text.add(tokens)
    added = len(text.ids) - before  # a stop string drops those after it
    complete = seat.growing is not None and seat.growing.add(tokens)
    self.counts.tokens += added
    if ask.reported:
      seat.scores += [_token_score(tokens[i], scores, (row, i), slots.TOP) for i in range(added)]
    finish = ""
    if text.stopped or complete or text.ids[-1:] == [self.run.tokenizer.stop_id]:
      finish = "stop"
    elif len(text.ids) >= ask.max_tokens:
      finish = "length"
    if finish:
      seat.ended = True
      self.counts.jobs += 1
      handed.append((seat.job, Piece(text.rest(), seat.scores, finish, text.ids, of_prompt)))
      return
    shown = ""
    if ask.streamed:
      shown = text.shown()
    if shown or of_prompt:
      handed.append((seat.job, Piece(shown, seat.scores, "", (), of_prompt)))
      seat.scores = []


def _scores_for(seats, drawn):
  """Returns the scores of drawn tokens on the host; None if no job wants them."""
  if any(seat.job.ask.reported for seat in seats):
    return jax.device_get(drawn.scores)
  return None


def _forget(piece: Piece) -> None:
  """Receives the pieces of a job that nobody waits for."""


def _kind(ask: Ask) -> tuple[int, int, bool]:
  """Returns what the prompts of one prefill have in common: the likeliest tokens that are scored, the width, and
  whether they have a schema.
  """
  top = 0
  if ask.top_of_prompt:
    top = 1 if ask.top_of_prompt == 1 else slots.TOP
  return top, bucket(len(ask.prompt)), bool(ask.schema)


def _prompts(asks: Sequence[Ask], width: int, shards: int) -> slots.Prompts:
  """Makes the arrays of a group's prompts, with absent rows up to a multiple of the shards."""
  absent = -len(asks) % shards

  def column(values: Iterable[Any], dtype: Any) -> Any:
    return np.array([*values, *[0] * absent], dtype)

  tokens: Any = np.zeros((len(asks) + absent, width), np.int32)
  for row, ask in enumerate(asks):
    tokens[row, width - len(ask.prompt) :] = ask.prompt
  return slots.Prompts(
    tokens=tokens,
    lengths=column((len(ask.prompt) for ask in asks), np.int32),
    seeds=column((ask.seed for ask in asks), np.uint32),
    prompt_ids=column((ask.prompt_id for ask in asks), np.int32),
    sample_ids=column((ask.sample_id for ask in asks), np.int32),
    options=slots.Options(
      keys=None,
      temperature=column((ask.temperature for ask in asks), np.float32),
      top_k=column((ask.top_k for ask in asks), np.int32),
      top_p=column((ask.top_p for ask in asks), np.float32),
      limits=column((ask.max_tokens for ask in asks), np.int32),
      reported=column((ask.reported for ask in asks), bool),
    ),
  )


def _token_score(token: int, scores: slots.Scores, place: tuple[int, int], most: int) -> TokenScore:
  """Makes the record of one token from arrays on the host, with at most `most` of the likeliest ones."""
  tops = zip(scores.top_tokens[place][:most].tolist(), scores.top_logps[place][:most].tolist(), strict=True)
  return TokenScore(int(token), float(scores.logps[place]), list(tops))


def _check_memory(run: Run, rows: int, columns: int) -> None:
  """Raises InputError unless weights, their unstacked copy and two caches of that size fit into the devices' memory."""

  def size(function, *arguments):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(function, *arguments)))

  cache = size(lambda: run.model.init_cache(rows, columns))
  weights = size(lambda params: (params, run.model.unstack(params)), run.params)
  available = device_bytes()
  if 2 * cache + weights > available:
    raise InputError(
      f"--slots={rows}, --context={columns - CHUNK}: two caches of {cache / 2**30:.1f} GiB and weights of "
      f"{weights / 2**30:.1f} GiB do not fit into {available / 2**30:.1f} GiB; lower one of them"
    )
