"""Runs rewards over a batch, each in a thread of its own, and accounts for those that fail."""

import asyncio
import copy
import inspect
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from alignjax.errors import InputError
from alignjax.rewards.process_state import ProcessState
from alignjax.rewards.protocol import LARGEST, Columns, Failure, Prompt, Reward, Scores, question, told
from alignjax.rewards.sandbox.isolation import ReportedError

MOST_HUNG = 8  # calls of one reward that may still run past their limit before a run stops
_OPEN = object()  # no answer yet
_RANGE = f"rewards lie between {-LARGEST:g} and {LARGEST:g}"


def score(
  rewards: Mapping[str, Reward],
  prompts: Sequence[Prompt],
  completions: Sequence[str],
  token_ids: Sequence[Sequence[int]],
  columns: Columns | None = None,
  *,
  time_limit_s: float = 60.0,
  report: Callable[[str], None] = print,
  where: Callable[[int], str] | None = None,
) -> Scores:
  """Runs rewards on N completions, all of them at the same time, and returns their Scores: [N, R] and the failures.

  Each reward is given copies of its own, so that what it changes in them no other reward sees. The working directory,
  the environment, the standard streams and the recursion limit are put back where a reward has changed them, and that
  is reported; a reward that changes the process while others run belongs in `isolated`.

  A reward that raises for the batch, or returns a wrong number of entries, is asked again for one completion at a time.
  What is not answered after `time_limit_s` (which includes that) has timed out: a coroutine is cancelled; a plain
  function can not be stopped, so its thread is left to itself, and its late answer is dropped. It goes on using a core,
  and where it never lets go of Python's lock (a regular expression, a huge integer) everything waits for it. A function
  that may hang belongs in `isolated`, whose process is killed.

  Args:
    rewards: by name, the order of the result.
    prompts: N texts or lists of messages.
    completions: N texts, without prompt and special tokens.
    token_ids: the sampled tokens of each, with the stop token.
    columns: the other fields of the prompts' records, N entries each; None for none.
    time_limit_s: seconds, for each reward.
    report: is given one line for each reward that failed, with the first of its prompts.
    where: index of a completion -> the place of its prompt's record, for that line.

  Raises:
    InputError: `MOST_HUNG` earlier calls of a reward still run.
    ValueError: the arguments are not of one length.
  """
  columns = columns or {}
  lengths = {len(prompts), len(completions), len(token_ids), *map(len, columns.values())}
  if len(lengths) != 1:
    raise ValueError(f"prompts, completions, token_ids and columns have {sorted(lengths)} entries")
  for name in rewards:
    _refuse_hung(name)
  calls = [
    _Call(name, reward, (prompts, completions, token_ids, columns), time_limit_s) for name, reward in rewards.items()
  ]
  deadline = time.monotonic() + time_limit_s
  with ProcessState() as state:
    for call in calls:
      call.thread.start()
    for call in calls:
      call.thread.join(max(0.0, deadline - time.monotonic()))
      call.expired.set()
    changed = state.put_back()
  if changed:
    report(
      f"reward {' or '.join(rewards)}: changed {', '.join(changed)} of the process, which is put back; "
      "wrap it in alignjax.rewards.isolated"
    )
  values, failures = np.full((len(completions), len(calls)), np.nan), []
  retried, seconds = {}, {}
  for place, call in enumerate(calls):
    failed = []
    for i, answer in enumerate(list(call.answers)):
      kind, cause = "timed out", f"no answer within {time_limit_s:g} s"
      if answer is not _OPEN:
        values[i, place], kind, cause = _understood(answer)
      if kind:
        failed.append(Failure(call.name, i, question(prompts[i]), kind, cause))
    if call.error:
      retried[call.name] = call.error
    seconds[call.name] = call.seconds
    if failed or call.error:
      report(_line(call, failed, where))
    failures += failed
  return Scores(tuple(rewards), values, tuple(failures), retried, seconds)


class _Call:
  """One reward on one batch, in a thread."""

  def __init__(self, name: str, reward: Reward, batch: tuple, time_limit_s: float):
    self.name, self.reward, self._limit = name, reward, time_limit_s
    self._batch = _copied(batch)  # of the time of the call, and given to nobody
    self.answers: list[Any] = [_OPEN] * len(self._batch[1])
    self.error = ""  # of the call for the whole batch
    self.expired = threading.Event()
    self._began = self._ended = time.monotonic()
    self.thread = threading.Thread(target=self._run, name=_thread_name(name), daemon=True)

  @property
  def seconds(self) -> float:
    """How long it took, or takes so far."""
    return (time.monotonic() if self.thread.is_alive() else self._ended) - self._began

  def _run(self) -> None:
    try:
      if _is_async(self.reward):
        asyncio.run(self._all_in_time())
      else:
        self._all()
    except BaseException as error:  # of a task that the reward began itself
      if not self.expired.is_set():
        self.answers[:] = [error if answer is _OPEN else answer for answer in self.answers]
    self._ended = time.monotonic()

  def _all(self) -> None:
    try:
      self.answers[:] = _listed(self.reward(*_copied(self._batch)), len(self.answers))
    except BaseException as error:
      if self._alone(error):
        return
      for i in range(len(self.answers)):
        if self.expired.is_set():
          return
        try:
          self.answers[i] = _listed(self.reward(*self._one(i)), 1)[0]
        except BaseException as error_of_one:
          self.answers[i] = error_of_one

  async def _all_in_time(self) -> None:
    """Cancels what is open after the limit: it has timed out. A cancellation before is the reward's own."""
    task = asyncio.ensure_future(self._all_async())
    _, late = await asyncio.wait({task}, timeout=self._limit)
    if late:
      self.expired.set()
      task.cancel()

  async def _all_async(self) -> None:
    try:
      entries = self.reward(*_copied(self._batch))
      assert isinstance(entries, Awaitable)
      self.answers[:] = _listed(await entries, len(self.answers))
    except BaseException as error:
      if self.expired.is_set():
        raise
      if not self._alone(error):
        await asyncio.gather(*map(self._one_async, range(len(self.answers))))

  async def _one_async(self, i: int) -> None:
    try:
      entries = self.reward(*self._one(i))
      assert isinstance(entries, Awaitable)
      self.answers[i] = _listed(await entries, 1)[0]
    except BaseException as error:
      if self.expired.is_set():
        raise
      self.answers[i] = error

  def _alone(self, error: BaseException) -> bool:
    """Takes note of what the batch raised; whether it is the answer, since the batch is one completion."""
    if len(self.answers) == 1:
      self.answers[0] = error
      return True
    self.error = _cause(error)
    return False

  def _one(self, i: int) -> tuple:
    prompts, completions, token_ids, columns = self._batch
    one = [prompts[i]], [completions[i]], [token_ids[i]], {key: [entries[i]] for key, entries in columns.items()}
    return _copied(one)


def _copied(batch: tuple) -> tuple:
  """Returns a batch that shares nothing with another that can be changed."""
  prompts, completions, token_ids, columns = batch
  columns = {key: list(map(_deep, entries)) for key, entries in columns.items()}
  return list(map(_deep, prompts)), list(completions), list(map(_deep, token_ids)), columns


def _deep(value: Any) -> Any:
  """Returns a deep copy; fast for lists of numbers."""
  if type(value) in _FIXED:
    return value
  if type(value) is list:
    return list(value) if _FIXED.issuperset(map(type, value)) else list(map(_deep, value))
  if type(value) is dict:
    return {key: _deep(item) for key, item in value.items()}
  return copy.deepcopy(value)


_FIXED = frozenset((str, int, float, bool, type(None)))


class _WrongLengthError(ValueError):
  pass


def _listed(returned: Any, count: int) -> list:
  if isinstance(returned, str | bytes | Mapping | Set) or not hasattr(returned, "__iter__"):
    raise _WrongLengthError(f"returned a {type(returned).__name__}, not a list of {count}")
  entries = list(itertools.islice(returned, count + 1))  # it may have no end
  if len(entries) != count:
    number = len(returned) if hasattr(returned, "__len__") else f"{len(entries)} or more"
    raise _WrongLengthError(f"returned {number} entries for {count} completions")
  return entries


def _understood(answer: Any) -> tuple[float, str, str]:
  """What `_read` says; an entry that raises where it is read is no number."""
  try:
    return _read(answer)
  except BaseException as error:
    return math.nan, "not a number", f"returned a {type(answer).__name__} that raises {told(error)}"


def _read(answer: Any) -> tuple[float, str, str]:
  """(value, kind of the failure, its cause) of an entry; the kind is "" where all is well."""
  if answer is None:
    return math.nan, "", ""
  if isinstance(answer, BaseException):
    kinds = {_WrongLengthError: "wrong length", TimeoutError: "timed out"}
    kind = next((kind for error, kind in kinds.items() if isinstance(answer, error)), "raised")
    return math.nan, kind, _cause(answer)
  try:
    value = float(answer) if hasattr(answer, "__float__") else None  # a string of digits is no number
  except OverflowError:
    told = f"about 1e{math.log10(abs(answer)):.0f}" if isinstance(answer, int) else f"a {type(answer).__name__}"
    return math.nan, "too large", f"returned {told}; {_RANGE}"
  except (TypeError, ValueError):
    value = None
  if value is None:
    return math.nan, "not a number", f"returned {str(answer)[:80]!r}, a {type(answer).__name__}"
  if not math.isfinite(value):
    return math.nan, "not finite", f"returned {value}"
  if abs(value) > LARGEST:
    return math.nan, "too large", f"returned {value:g}; {_RANGE}"
  return value, "", ""


def _is_async(reward: Reward) -> bool:
  return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None))  # noqa: B004


def _cause(error: BaseException) -> str:
  return str(error) if isinstance(error, _WrongLengthError | ReportedError) else told(error)


def _line(call: _Call, failed: list[Failure], where: Callable[[int], str] | None = None) -> str:
  told = f"reward {call.name}: "
  if not failed:
    return f"{told}raised for the batch, not for single completions: {call.error}"
  kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(failure.kind for failure in failed).items())
  first = failed[0]
  place = f" ({where(first.index)})" if where else ""
  return (
    f"{told}{len(failed)} of {len(call.answers)} completions have none ({kinds}); "
    f"completion {first.index}: {first.cause}; prompt {first.prompt[:200]!r}{place}"
  )


def _thread_name(name: str) -> str:
  return f"reward {name}"


def _refuse_hung(name: str) -> None:
  hung = sum(thread.name == _thread_name(name) for thread in threading.enumerate())
  if hung >= MOST_HUNG:
    raise InputError(
      f"reward {name}: {hung} of its calls still run past their time limit, and a thread can not be stopped; "
      "wrap it in alignjax.rewards.isolated, whose process is killed"
    )
