"""The server's numbers in Prometheus' text format."""

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping

from alignjax.serving.device import Device

BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # of the histogram of seconds


class Requests:
  """What the routes count: responses by path and status, and the seconds that they took."""

  def __init__(self) -> None:
    self.responses: Counter[tuple[str, int]] = Counter()
    self.seconds: Counter[int] = Counter()  # by the place of the bound above them
    self.total = 0.0

  def note(self, path: str, status: int, seconds: float) -> None:
    """Counts a response."""
    self.responses[path, status] += 1
    self.seconds[bisect.bisect_left(BOUNDS, seconds)] += 1
    self.total += seconds


def text(device: Device, requests: Requests) -> str:
  """Writes all numbers."""
  return "".join(f"{line}\n" for line in _lines(device, requests))


def _lines(device: Device, requests: Requests) -> Iterator[str]:
  yield from _family("requests_total", "counter", "responses")
  for (path, status), count in sorted(requests.responses.items()):
    yield _sample("requests_total", {"path": path, "status": str(status)}, count)
  yield from _family("request_seconds", "histogram", "from the request to the end of its response")
  below = 0
  for place, bound in enumerate((*map(str, BOUNDS), "+Inf")):
    below += requests.seconds[place]
    yield _sample("request_seconds_bucket", {"le": bound}, below)
  yield _sample("request_seconds_sum", {}, round(requests.total, 6))
  yield _sample("request_seconds_count", {}, below)
  yield from _family("jobs_waiting", "gauge", "completions without a slot")
  yield _sample("jobs_waiting", {}, device.waiting)
  yield from _family("failures_total", "counter", "exceptions while decoding")
  yield _sample("failures_total", {}, device.failures)
  yield from _family("slots", "gauge", "rows that are decoded together")
  yield from (_sample("slots", {"model": name}, engine.rows) for name, engine in device.engines.items())
  yield from _family("slots_busy", "gauge", "of these, those with a completion")
  yield from (_sample("slots_busy", {"model": name}, engine.busy) for name, engine in device.engines.items())
  counted = {
    "jobs": "completions that ended",
    "cancelled": "completions whose clients went away",
    "prompt_tokens": "tokens of prompts",
    "tokens": "tokens of completions",
    "steps": "decode steps",
    "slot_steps": "slots that took a decode step",
    "prefills": "groups of prompts that were read together",
  }
  for field, meaning in counted.items():
    yield from _family(f"{field}_total", "counter", meaning)
    for name, engine in device.engines.items():
      yield _sample(f"{field}_total", {"model": name}, getattr(engine.counts, field))


def _family(name: str, kind: str, meaning: str) -> tuple[str, str]:
  return f"# HELP alignjax_{name} {meaning}", f"# TYPE alignjax_{name} {kind}"


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
  pairs = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())
  if pairs:
    pairs = f"{{{pairs}}}"
  return f"alignjax_{name}{pairs} {value}"


def _escaped(value: str) -> str:
  return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
