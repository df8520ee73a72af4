"""Several processes as one run: how they find each other, agree on what they do, and end together.

The engine is JAX's own: `jax.distributed` connects the processes, XLA's collectives do the rest. Who the others are is
the environment's to say, never guessed: on a laptop nothing here does anything.
"""

import collections
import contextlib
import json
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax._src import distributed  # its key-value store has no public name; Orbax reaches for it too
from jax.experimental import multihost_utils

from alignjax import errors
from alignjax.errors import InputError, explain

LOST = 75  # exit status (sysexits.h, "try again"): another host is gone, the same command continues the run
STOPPED = 143  # told to stop by SIGTERM: everything is saved, the same command continues the run
# How often each comparison was made: a key of the store is written once.
_asked: collections.Counter[str] = collections.Counter()
_LAST = 3.0  # seconds by which the first process, which keeps the others connected, leaves after them


def setup(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """The arguments of `jax.distributed.initialize` for the run that this process is part of; None if it is alone.

  Part of one are processes that are given a coordinator (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID),
  and those where JAX finds it out itself: several tasks of a Slurm step, a TPU slice of several hosts on GKE, and any
  machine where ALIGNJAX_HOSTS=auto says so, such as the workers of a TPU VM.

  Raises:
    InputError: half of the three variables, or a variable that should be a number is none.
  """
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  given = {name: environ[name] for name in names if environ.get(name)}
  if given:
    if len(given) < len(names):
      missing = ", ".join(name for name in names if name not in given)
      raise InputError(f"{', '.join(given)} set without {missing}: set all three, or none")
    try:
      count, index = int(given[names[1]]), int(given[names[2]])
    except ValueError as error:
      raise InputError(f"{names[1]}={given[names[1]]}, {names[2]}={given[names[2]]}: use whole numbers") from error
    if not 0 <= index < count:
      raise InputError(f"{names[2]}={index} is not below {names[1]}={count}")
    if count == 1:
      return None
    address = given[names[0]]
    found = {"coordinator_address": address, "num_processes": count, "process_id": index}
    if address.rpartition(":")[0] in ("127.0.0.1", "localhost") and not index:
      found["coordinator_bind_address"] = address  # JAX would listen on every interface
    return found | {"cluster_detection_method": "deactivate"}
  slurm = _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1  # of srun: a batch script alone is one process
  slices = "," in environ.get("TPU_WORKER_HOSTNAMES", "") or _number(environ, "MEGASCALE_NUM_SLICES", 1) > 1
  return {} if slurm or slices or environ.get("ALIGNJAX_HOSTS") == "auto" else None


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
  """A whole number of the environment."""
  text = environ.get(name) or str(default)
  if not (text.isascii() and text.isdecimal() and len(text) < 10):
    raise InputError(f"{name}={text}: use a whole number")
  return int(text)


def join() -> bool:
  """Connects to the others, if there are any, and returns whether; before anything touches a device.

  ALIGNJAX_HEARTBEAT is the seconds after which a silent process counts as dead, ALIGNJAX_JOIN those to wait for all.

  Raises:
    InputError: they did not all come, or a variable is no number.
  """
  arguments = setup(os.environ)
  if arguments is None:
    return False
  patience, heartbeat = _number(os.environ, "ALIGNJAX_JOIN", 300), _number(os.environ, "ALIGNJAX_HEARTBEAT", 100)
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=patience,
      heartbeat_timeout_seconds=heartbeat,
      shutdown_timeout_seconds=60,
    )
  except (RuntimeError, ValueError) as error:
    raise InputError(
      f"the hosts did not find each other within {patience} s ({_short(error)}); start the same command on all of "
      f"them at about the same time, and let them reach {arguments.get('coordinator_address', 'the first one')}"
    ) from error
  return True


def several() -> bool:
  """Whether this process is one of several; it touches no device."""
  return distributed.global_state.client is not None


def agree(
  what: str,
  facts: Mapping[str, Any],
  patience: float = 120.0,
  remedy: str = "start the same command and code on every host",
) -> None:
  """Raises InputError, in every process, where these facts (JSON) are not the same in all of them.

  Nothing is computed on devices: hosts that disagree would wait for each other there without end.

  Args:
    what: a name for the error.
    facts: a nested one is compared key by key.
    patience: seconds to wait for the others.
    remedy: the end of the error.
  """
  if not several():
    return
  state = distributed.global_state
  _asked[what] += 1
  place = f"alignjax/{what}/{_asked[what]}"
  mine = _flat({"hosts": state.num_processes, **facts})
  said = json.dumps({"name": socket.gethostname(), "facts": mine})
  state.client.key_value_set(f"{place}/{state.process_id}", said)
  others, names = {}, {}
  for index in range(state.num_processes):
    try:
      found = json.loads(state.client.blocking_key_value_get(f"{place}/{index}", int(patience * 1000)))
    except RuntimeError as error:
      raise InputError(
        f"host {index} of {state.num_processes} did not say what it runs within {patience:g} s (compared: {what}); "
        "look at its log"
      ) from error
    others[index], names[index] = found["facts"], found["name"]
    if found["facts"]["hosts"] != state.num_processes:
      break  # there may be no further one
  problems = disagreement(others)
  if problems:
    index, lines = problems
    raise InputError(
      f"host {index} ({names[index]}) differs from the others in {what}: {'; '.join(lines[:3])}"
      f"{f' and {len(lines) - 3} more' if len(lines) > 3 else ''}; {remedy}"
    )


def by_first(what: str, do: Callable[[], Any], patience: float = 120.0) -> None:
  """Calls do() in the first process, such as what opens an output; where it cannot, none of them goes on.

  Raises:
    InputError: in the others, the line of what do() raised; in the first process, that error itself.
  """
  if not several():
    do()
    return
  state = distributed.global_state
  _asked[what] += 1
  place = f"alignjax/first/{what}/{_asked[what]}"
  if state.process_id == 0:
    problem = f"host 0 failed at its {what}; look at its log"
    try:
      do()
      problem = ""
    except (Exception, KeyboardInterrupt) as error:
      explained = explain(error)
      problem = (explained and explained[1]) or problem
      raise
    finally:
      state.client.key_value_set(place, json.dumps(problem))
  else:
    try:
      problem = json.loads(state.client.blocking_key_value_get(place, int(patience * 1000)))
    except RuntimeError as error:
      raise InputError(f"host 0 did not come to its {what} within {patience:g} s; look at its log") from error
    if problem:
      raise InputError(problem)


@contextlib.contextmanager
def held(what: str, make: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
  """Within, the first process has entered the context that make() gives; errors as in `by_first`."""
  with contextlib.ExitStack() as stack:
    by_first(what, lambda: stack.enter_context(make()))
    yield


def disagreement(facts: Mapping[int, Mapping[str, Any]]) -> tuple[int, list[str]] | None:
  """The first host that differs from most of them (of two, from the first), and in what; None if all agree."""
  sealed = {index: json.dumps(fact, sort_keys=True) for index, fact in facts.items()}
  texts = list(sealed.values())
  usual = max(texts, key=texts.count)  # the first of equals
  odd = next((index for index, text in sealed.items() if text != usual), None)
  if odd is None:
    return None
  here, there = facts[odd], json.loads(usual)
  keys = [key for key in {**there, **here} if here.get(key) != there.get(key)]
  return odd, [f"{key} is {here.get(key)!r} there and {there.get(key)!r} elsewhere" for key in keys]


def anywhere(true: bool) -> bool:
  """Whether it is true in any process; all of them ask, and get the same answer."""
  return bool(np.any(multihost_utils.process_allgather(np.array(true)))) if several() else true


def first(value: np.ndarray) -> np.ndarray:
  """The first process's array, bit by bit, in every process; the others give one of the same shape and dtype."""
  if not several():
    return value
  sent = multihost_utils.broadcast_one_to_all(np.frombuffer(value.tobytes(), np.uint8))  # wider ones would be rounded
  return np.frombuffer(np.asarray(sent).tobytes(), value.dtype).reshape(value.shape)


def meet() -> None:
  """Returns when every process has come here."""
  first(np.array(True))


def there(path: epath.Path) -> bool:
  """Whether a file of a folder that all share is there, as the first process sees it."""
  return bool(first(np.array(path.exists())))


def say(text: str) -> None:
  """Prints, in the first process."""
  if jax.process_index() == 0:
    print(text, flush=True)


def run(main: Callable[[], int]) -> int:
  """main(), as one of several processes where the environment says so: it joins before, and leaves with the others."""
  if not join():
    return main()
  with leaving():
    status = main()
    if not status:
      distributed.global_state.client.shutdown()  # when all have come here
    _leave(status)  # not by jax.distributed.shutdown: taking the first process's server down now and then aborts it


@contextlib.contextmanager
def leaving() -> Iterator[None]:
  """Ends the process with one line at the first error, where it is one of several.

  What closes files and threads in good order would wait for those that are gone. Alone, an error is just an error.
  """
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    if not several():
      raise
    state = distributed.global_state
    who = f"host {state.process_id} of {state.num_processes} ({socket.gethostname()})"
    if explained := explain(error):
      status, line = explained
      errors.tell(f"{who}: {line[:2000]}" if line else "")
      _leave(status)
    if isinstance(error, RuntimeError) and _GONE.search(str(error)):
      errors.tell(
        f"{who}: another host is gone ({_short(error)}); the same command continues from the newest checkpoint"
      )
      _leave(LOST)
    traceback.print_exc()
    _leave(1)


_GONE = re.compile(r"gloo|connection (reset|closed|refused)|peer|heartbeat|coordination|UNAVAILABLE|DEADLINE", re.I)


def _leave(status: int) -> None:
  """Exits at once; the first process last, for with it the connection of the others goes."""
  if distributed.global_state.process_id == 0 and status != LOST:
    time.sleep(_LAST)
  errors.leave(status)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """A nested mapping with dotted keys, as JSON gives it back."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
  return flat if prefix else json.loads(json.dumps(flat))


def _short(error: BaseException, most: int = 160) -> str:
  return " ".join(str(error).split())[:most]
