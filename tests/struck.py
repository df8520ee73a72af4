"""A run that ends inside an iteration: in the rollout, the reward, the update or the save.

  python -m tests.struck PLACE NUMBER train --config ... --workdir ...

is `alignjax train`, ended by SIGKILL the NUMBER-th time that it is at PLACE.
"""

import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import jax

from alignjax import cli
from alignjax.runs.checkpoint import Checkpointer
from alignjax.training import iteration

# Where the host waits for what is in flight: the module, and which of its waits in an iteration.
WAITS = {
  "rollout": ("alignjax.training.iteration", 0, 2),
  "prepare": ("alignjax.training.iteration", 1, 2),
  "update": ("alignjax.training.loop", 0, 1),
}
PLACES = (*WAITS, "reward", "save")


@contextlib.contextmanager
def struck(place: str, number: int, blow: Callable[[], None]) -> Iterator[None]:
  """Within, `blow` falls the `number`-th time (from 1) that a run is at a place; evaluations count as iterations."""
  times = itertools.count(1)

  def at_last(do):
    def maybe(*args, **kwargs):
      if next(times) != number:
        return do(*args, **kwargs)
      if place == "save":
        do(*args, **kwargs)  # which goes on behind
      return blow()

    return maybe

  if place == "save":
    patch = mock.patch.object(Checkpointer, "save", at_last(Checkpointer.save))
  elif place == "reward":
    patch = mock.patch.object(iteration.rewards, "score", at_last(iteration.rewards.score))
  else:
    module, turn, turns = WAITS[place]
    wait, waits = jax.block_until_ready, itertools.count()
    struck_wait = at_last(wait)

    def waiting(x):
      if sys._getframe(1).f_globals["__name__"] != module or next(waits) % turns != turn:
        return wait(x)
      return struck_wait(x)

    patch = mock.patch.object(jax, "block_until_ready", waiting)
  with patch:
    yield


if __name__ == "__main__":
  with struck(sys.argv[1], int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL)):
    sys.exit(cli.main(sys.argv[3:]))
