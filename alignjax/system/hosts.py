"""Several processes as one run: they find each other, agree on what they do, and end together.

`jax.distributed` connects the processes, XLA's collectives do the rest. The environment names the other processes; they
are never guessed, so on a laptop nothing in this module has an effect.
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
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath
from jax._src import distributed  # its key-value store has no public name; Orbax uses it too
from jax.experimental import multihost_utils

from alignjax import errors
from alignjax.errors import InputError, explain

LOST = 75  # exit status (sysexits.h, "try again"): another host is lost, the same command continues the run
STOPPED = 143  # exit status after SIGTERM: everything is saved, the same command continues the run
_rounds: collections.Counter[str] = (
  collections.Counter()
)  # of each comparison, because a key of the store can be written only once
_LAST = 3.0  # seconds that the first process, which keeps the others connected, waits before it leaves


def setup(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """Returns the arguments of `jax.distributed.initialize` for the run of this process; None if it is alone.

  A process is one of several if it is given a coordinator (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID),
  or if JAX detects the others: several tasks of a Slurm step, a TPU slice of several hosts on GKE, and any
  machine with ALIGNJAX_HOSTS=auto, such as the workers of a TPU VM.

  Raises:
    InputError: only some of the three variables are set, or a variable that must be a number is none.
  """
  given = {name: environ[name] for name in _COORDINATOR if environ.get(name)}
  if given:
    return _coordinated(given)
  slurm = _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1  # set by srun: a batch script alone is one process
  slices = "," in environ.get("TPU_WORKER_HOSTNAMES", "") or _number(environ, "MEGASCALE_NUM_SLICES", 1) > 1
  if slurm or slices or environ.get("ALIGNJAX_HOSTS") == "auto":
    return {}
  return None


_COORDINATOR = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def _coordinated(given: Mapping[str, str]) -> dict[str, Any] | None:
  """Returns the arguments for a coordinator, from those of its three variables that are set."""
  if len(given) < len(_COORDINATOR):
    missing = ", ".join(name for name in _COORDINATOR if name not in given)
    raise InputError(f"{', '.join(given)} set without {missing}: set all three, or none")
  _, count_name, index_name = _COORDINATOR
  address, count_text, index_text = (given[name] for name in _COORDINATOR)
  try:
    count = int(count_text)
    index = int(index_text)
  except ValueError as error:
    raise InputError(f"{count_name}={count_text}, {index_name}={index_text}: use whole numbers") from error
  if not 0 <= index < count:
    raise InputError(f"{index_name}={index} is not below {count_name}={count}")
  if count == 1:
    return None
  arguments = {"coordinator_address": address, "num_processes": count, "process_id": index}
  if address.rpartition(":")[0] in ("127.0.0.1", "localhost") and not index:
    arguments["coordinator_bind_address"] = address  # JAX would listen on every interface
  return arguments | {"cluster_detection_method": "deactivate"}


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
  """Reads a whole number from the environment."""
  text = environ.get(name) or str(default)
  if not (text.isascii() and text.isdecimal() and len(text) < 10):
    raise InputError(f"{name}={text}: use a whole number")
  return int(text)


def join() -> bool:
  """Connects to the other processes, before anything touches a device; False if there are none.

  ALIGNJAX_HEARTBEAT is the number of seconds after which a silent process counts as dead, ALIGNJAX_JOIN the number of
  seconds to wait for all.

  Raises:
    InputError: not all of them came, or a variable is no number.
  """
  arguments = setup(os.environ)
  if arguments is None:
    return False
  patience = _number(os.environ, "ALIGNJAX_JOIN", 300)
  heartbeat = _number(os.environ, "ALIGNJAX_HEARTBEAT", 100)
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
  """True if this process is one of several; asking touches no device."""
  return distributed.global_state.client is not None


def _client() -> Any:
  """The store that several processes share."""
  client = distributed.global_state.client
  assert client is not None
  return client


def agree(
  what: str,
  facts: Mapping[str, Any],
  patience: float = 120.0,
  remedy: str = "start the same command and code on every host",
) -> None:
  """Raises InputError, in every process, if these facts (JSON) differ between processes.

  Nothing is computed on devices, where hosts that disagree would wait for each other without end.

  Args:
    what: the name of the facts for the error.
    facts: nested mappings are compared key by key.
    patience: seconds to wait for the others.
    remedy: the end of the error.
  """
  if not several():
    return
  state = distributed.global_state
  _rounds[what] += 1
  place = f"alignjax/{what}/{_rounds[what]}"
  own_facts = _flat({"hosts": state.num_processes, **facts})
  own_record = json.dumps({"name": socket.gethostname(), "facts": own_facts})
  _client().key_value_set(f"{place}/{state.process_id}", own_record)
  facts_of_host = {}
  names = {}
  for index in range(state.num_processes):
    try:
      record = json.loads(_client().blocking_key_value_get(f"{place}/{index}", int(patience * 1000)))
    except RuntimeError as error:
      raise InputError(
        f"host {index} of {state.num_processes} did not say what it runs within {patience:g} s (compared: {what}); "
        "look at its log"
      ) from error
    facts_of_host[index] = record["facts"]
    names[index] = record["name"]
    if record["facts"]["hosts"] != state.num_processes:
      break  # there may be no further host
  if problems := disagreement(facts_of_host):
    index, lines = problems
    differences = "; ".join(lines[:3])
    if len(lines) > 3:
      differences += f" and {len(lines) - 3} more"
    raise InputError(f"host {index} ({names[index]}) differs from the others in {what}: {differences}; {remedy}")


def by_first(what: str, do: Callable[[], Any], patience: float = 120.0) -> None:
  """Calls do() in the first process, for example to open an output; if that fails, all processes stop.

  Args:
    what: the name of the work for the error.
    do: the work.
    patience: seconds for which the others wait.

  Raises:
    InputError: in the other processes, with the line of the error of do(); in the first one, that error is raised.
  """
  if not several():
    do()
    return
  state = distributed.global_state
  _rounds[what] += 1
  place = f"alignjax/first/{what}/{_rounds[what]}"
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
      _client().key_value_set(place, json.dumps(problem))
  else:
    try:
      problem = json.loads(_client().blocking_key_value_get(place, int(patience * 1000)))
    except RuntimeError as error:
      raise InputError(f"host 0 did not come to its {what} within {patience:g} s; look at its log") from error
    if problem:
      raise InputError(problem)


@contextlib.contextmanager
def held(what: str, make: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
  """Enters the context that make() returns, in the first process alone; errors as in `by_first`."""
  with contextlib.ExitStack() as stack:
    by_first(what, lambda: stack.enter_context(make()))
    yield


def disagreement(facts: Mapping[int, Mapping[str, Any]]) -> tuple[int, list[str]] | None:
  """Returns (first host that differs from the majority, its differences); None if all agree.

  If several sets of facts are equally frequent, that of the first host counts as the majority.
  """
  text_of_host = {index: json.dumps(fact, sort_keys=True) for index, fact in facts.items()}
  texts = list(text_of_host.values())
  usual = max(texts, key=texts.count)
  odd = next((index for index, text in text_of_host.items() if text != usual), None)
  if odd is None:
    return None
  odd_facts = facts[odd]
  usual_facts = json.loads(usual)
  keys = [key for key in {**usual_facts, **odd_facts} if odd_facts.get(key) != usual_facts.get(key)]
  return odd, [f"{key} is {odd_facts.get(key)!r} there and {usual_facts.get(key)!r} elsewhere" for key in keys]


def anywhere(true: bool) -> bool:
  """True if `true` is True in any process; all processes call it, and get the same answer."""
  if not several():
    return true
  return bool(np.any(multihost_utils.process_allgather(np.array(true))))


def first(value: np.ndarray) -> np.ndarray:
  """Returns the first process's array, bit by bit, in every process; all arrays have the same shape and dtype."""
  if not several():
    return value
  sent = multihost_utils.broadcast_one_to_all(np.frombuffer(value.tobytes(), np.uint8))  # wider types would be rounded
  return np.frombuffer(np.asarray(sent).tobytes(), value.dtype).reshape(value.shape)


def meet() -> None:
  """Waits until every process has called it."""
  first(np.array(True))


def there(path: epath.Path) -> bool:
  """True if a file in a folder that all processes share exists for the first process."""
  return bool(first(np.array(path.exists())))


def say(text: str) -> None:
  """Prints a text, in the first process alone."""
  if jax.process_index() == 0:
    print(text, flush=True)


def run(main: Callable[[], int]) -> int:
  """Calls main() and returns its status; one of several processes joins them before, and leaves with them."""
  if not join():
    return main()
  with leaving():
    status = main()
    if not status:
      _client().shutdown()  # waits for all
    _leave(status)  # not jax.distributed.shutdown, which at times aborts when it stops the first process's server
  raise AssertionError("the process has not ended")


@contextlib.contextmanager
def leaving() -> Iterator[None]:
  """Ends the process with one line at the first error, if it is one of several; otherwise raises the error.

  An orderly end, which closes files and threads, would wait for processes that are lost.
  """
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    if not several():
      raise
    state = distributed.global_state
    host = f"host {state.process_id} of {state.num_processes} ({socket.gethostname()})"
    if explained := explain(error):
      status, line = explained
      if line:
        line = f"{host}: {line[:2000]}"
      errors.tell(line)
      _leave(status)
    if isinstance(error, RuntimeError) and _GONE.search(str(error)):
      errors.tell(
        f"{host}: another host is gone ({_short(error)}); the same command continues from the newest checkpoint"
      )
      _leave(LOST)
    traceback.print_exc()
    _leave(1)


_GONE = re.compile(r"gloo|connection (reset|closed|refused)|peer|heartbeat|coordination|UNAVAILABLE|DEADLINE", re.I)


def _leave(status: int) -> NoReturn:
  """Exits at once; the first process exits last, because it keeps the others connected."""
  if distributed.global_state.process_id == 0 and status != LOST:
    time.sleep(_LAST)
  errors.leave(status)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens a nested mapping to dotted keys, with values as JSON returns them."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= _flat(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
  return flat


def _short(error: BaseException, most: int = 160) -> str:
  return " ".join(str(error).split())[:most]
