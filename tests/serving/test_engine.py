"""Laws of the engine and its thread: no job waits for ever, none is answered twice, the cache follows the load."""

import queue

import jax
import numpy as np
import pytest

from alignjax.serving.device import ClosedError, Device, FullError
from alignjax.serving.engine import Ask, Engine, Job
from tests.serving.conftest import SLOTS

PROMPT = tuple(range(20, 26))


class Inbox:
  """The pieces of a job."""

  def __init__(self, **options):
    self.pieces = queue.SimpleQueue()
    self.job = Job(Ask(PROMPT, **({"max_tokens": 6} | options)), self.pieces.put)

  def end(self):
    """The last piece; the text of all of them stands in it."""
    text = ""
    while True:
      piece = self.pieces.get(timeout=120)
      text += piece.text
      if piece.last:
        assert self.pieces.empty(), "a piece after the last"
        return piece._replace(text=text)


def run_until_idle(engine, inboxes):
  """Drives an engine by hand; returns the cache's rows at each turn."""
  engine.waiting.extend(inbox.job for inbox in inboxes)
  rows = []
  with jax.set_mesh(engine.run.mesh):
    while engine.waiting or engine.busy:
      for job, piece in engine.advance():
        job.receive(piece)
      rows.append(engine._size.rows)
  return rows


@pytest.fixture(scope="module")
def wide(run):
  with jax.set_mesh(run.mesh):
    return Engine(run, 4 * SLOTS, 96)


def test_the_cache_has_rows_for_those_that_are_there(wide):
  few = Inbox(max_tokens=40, seed=1)
  rows = run_until_idle(wide, [few])
  assert set(rows) == {SLOTS}  # a row for each of the devices
  many = [Inbox(seed=k, max_tokens=4 + k % 9) for k in range(3 * SLOTS)]
  rows = run_until_idle(wide, many)
  assert set(rows) == {4 * SLOTS}  # it does not shrink between two waves of clients
  assert all(len(inbox.end().tokens) <= 4 + k % 9 for k, inbox in enumerate(many))
  rows = [row for k in range(6) for row in run_until_idle(wide, [Inbox(max_tokens=80, seed=k)])]
  assert rows[0] == 4 * SLOTS
  assert rows[-1] == SLOTS
  assert few.end().tokens == alone(wide, max_tokens=40, seed=1)


def alone(engine, **options):
  """The tokens of a completion that is served by itself."""
  inbox = Inbox(**options)
  run_until_idle(engine, [inbox])
  return inbox.end().tokens


def test_a_job_of_a_client_that_is_gone_gets_nothing_more(wide):
  gone, stays = Inbox(max_tokens=60), Inbox(seed=2)
  gone.job.cancelled = True
  run_until_idle(wide, [gone, stays])
  assert gone.pieces.empty()
  assert stays.end().finish


def test_jobs_end_when_the_thread_is_closed(engine):
  device = Device({"tiny": engine}, 100)
  device.start()
  inboxes = [Inbox(max_tokens=80, seed=k) for k in range(40)]
  device.submit("tiny", [inbox.job for inbox in inboxes])
  device.close()
  ends = [inbox.end() for inbox in inboxes]
  assert all(end.finish or "shutting down" in end.failure for end in ends)
  assert any(end.failure for end in ends)
  with pytest.raises(ClosedError):
    device.submit("tiny", [Inbox().job])
  with jax.set_mesh(engine.run.mesh):
    engine.waiting.clear()
    engine.clear()


def test_a_request_is_queued_whole_or_not_at_all(engine):
  device = Device({"tiny": engine}, 3)  # it is not started
  device.submit("tiny", [Inbox().job for _ in range(SLOTS)])
  with pytest.raises(FullError) as full:
    device.submit("tiny", [Inbox().job for _ in range(4)])
  assert full.value.seconds >= 1
  assert device.waiting == SLOTS
  device.submit("tiny", [Inbox().job for _ in range(3)])


def test_a_thread_that_fails_again_and_again_says_so_and_takes_no_more(engine, monkeypatch):
  def broken(self):
    raise FloatingPointError("no")

  monkeypatch.setattr(Engine, "advance", broken)
  device = Device({"tiny": engine}, 10)
  inboxes = [Inbox() for _ in range(3)]
  device.start()
  device.submit("tiny", [inbox.job for inbox in inboxes])
  assert all("FloatingPointError" in inbox.end().failure for inbox in inboxes)
  assert device.failures == 3
  with pytest.raises(ClosedError, match="3 times in a row"):
    device.submit("tiny", [Inbox().job])
  engine.waiting.clear()


def test_pieces_of_a_stream_add_up(wide):
  streamed = Inbox(max_tokens=50, seed=4, streamed=True, stops=("\x00",))
  whole = Inbox(max_tokens=50, seed=4)
  run_until_idle(wide, [streamed, whole])
  count = streamed.pieces.qsize()
  assert count > 2
  one, other = streamed.end(), whole.end()
  assert one.text == other.text
  assert one.tokens == other.tokens


@pytest.mark.slow
def test_a_small_storm_answers_each_request_as_alone():
  from benchmarks.serving import storm

  told = storm(400)
  assert told["different"] == told["wrongly_answered"] == 0
  assert told["equal"] > 300


@pytest.mark.slow
def test_prompts_of_all_widths_are_read_in_the_order_of_their_coming(wide):
  lengths = [3, 40, 5, 70, 33, 2]
  rng = np.random.default_rng(0)
  inboxes = []
  for number, length in enumerate(lengths):
    inbox = Inbox(seed=number)
    inbox.job.ask = Ask(tuple(rng.integers(20, 400, length).tolist()), 5, seed=number)
    inboxes.append(inbox)
  run_until_idle(wide, inboxes)
  for inbox, (number, length) in zip(inboxes, enumerate(lengths), strict=True):
    solo = Inbox()
    solo.job.ask = inbox.job.ask
    run_until_idle(wide, [solo])
    assert inbox.end().tokens == solo.end().tokens, (number, length)
