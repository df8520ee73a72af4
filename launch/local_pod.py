r"""A pod on one machine: several processes, each with CPU devices of its own, joined by JAX over the loopback.

  python launch/local_pod.py --hosts 2 --devices-per-host 4 -- \
    alignjax train --config configs/dpo.py:smoke --workdir runs/pod

What breaks on a pod breaks here first. When a host dies the others leave by themselves, and all start again on a fresh
port; a training run then continues from its newest good checkpoint. SIGTERM to this program, or to any host, makes all
of them save the same step and stop.
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

INPUT_ERROR, STOPPED, GAVE_UP = 2, 143, 1  # exit statuses: of a mistake in the input, of SIGTERM, and our own
LEFT = (75, -signal.SIGABRT)  # of a host that left because another was gone: by alignjax, and by JAX's own service
GRACE = 15.0  # seconds beyond the heartbeat in which the others should have left by themselves


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command on every simulated host, again and again until it ends or the restarts are spent."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--hosts", type=int, default=2, help="processes")
  parser.add_argument("--devices-per-host", type=int, default=4, help="CPU devices of each")
  parser.add_argument("--restarts", type=int, default=3, help="how often all start again after one has died")
  parser.add_argument("--heartbeat", type=int, default=20, help="seconds of silence after which a host counts as dead")
  parser.add_argument("--dry-run", action="store_true", help="print the commands and leave")
  parser.add_argument("command", nargs=argparse.REMAINDER, help="after --: what every host runs")
  arguments = parser.parse_args(argv)
  command = arguments.command[arguments.command[:1] == ["--"] :]
  if not command or arguments.hosts < 1 or arguments.devices_per_host < 1:
    parser.error("give a command after --, and at least one host with one device")
  if command[0] == "alignjax":
    command = [sys.executable, "-m", "alignjax.cli", *command[1:]]
  if arguments.dry_run:
    for index in range(arguments.hosts):
      own = _environment(arguments, index, port=0)
      print(" ".join([*(f"{name}={value}" for name, value in own.items()), shlex.join(command)]))
    return 0
  told = threading.Event()  # to stop
  for attempt in range(arguments.restarts + 1):
    if attempt:
      _say(f"restart {attempt} of {arguments.restarts}")
    status = _attempt(arguments, command, told)
    if status in (0, INPUT_ERROR, STOPPED) or told.is_set():
      return STOPPED if status == GAVE_UP else status
  _say(f"gave up after {arguments.restarts} restarts")
  return GAVE_UP


def _attempt(arguments: argparse.Namespace, command: Sequence[str], told: threading.Event) -> int:
  """One life of the pod, and what it ended with."""
  port = _free_port()  # a fresh one: the last life's may linger
  hosts, readers = [], []
  for index in range(arguments.hosts):
    environment = os.environ | _environment(arguments, index, port)
    host = subprocess.Popen(
      command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    readers.append(threading.Thread(target=_copy, args=(index, host.stdout), daemon=True))
    readers[-1].start()
    hosts.append(host)
  _say(f"{len(hosts)} hosts on port {port}: processes {' '.join(str(host.pid) for host in hosts)}")
  with _passing_on(hosts, told):
    failed = _wait(hosts, arguments.heartbeat + GRACE)
  for reader in readers:
    reader.join(timeout=5)
  statuses = [host.returncode for host in hosts]
  if failed is None:
    return 0
  if all(status == STOPPED for status in statuses):
    _say("stopped: the same command continues")
    return STOPPED
  first, seconds, slow = failed
  if statuses[first] in LEFT:  # both ended between two looks: the other one is the cause
    causes = (index for index, status in enumerate(statuses) if status and status not in LEFT and index not in slow)
    first = next(causes, first)
  killed = f"; hosts {slow} did not and were killed" if slow else ""
  _say(f"host {first} ended first ({_reason(statuses[first])}); the others left within {seconds:.1f} s{killed}")
  return INPUT_ERROR if INPUT_ERROR in statuses else GAVE_UP


def _wait(hosts: Sequence[subprocess.Popen], patience: float) -> tuple[int, float, list[int]] | None:
  """None if all end well; else the first that did not, how long the others took, and those that had to be killed."""
  first, began = None, 0.0
  while any(host.poll() is None for host in hosts):
    time.sleep(0.1)
    if first is None:
      first = next((index for index, host in enumerate(hosts) if host.poll()), None)
      began = time.monotonic()
    elif time.monotonic() - began > patience:
      slow = [index for index, host in enumerate(hosts) if host.poll() is None]
      for index in slow:
        hosts[index].kill()
        hosts[index].wait()
      return first, patience, slow
  if first is None:
    first = next((index for index, host in enumerate(hosts) if host.returncode), None)
    began = time.monotonic()
  return None if first is None else (first, time.monotonic() - began, [])


@contextlib.contextmanager
def _passing_on(hosts: Sequence[subprocess.Popen], told: threading.Event):
  """SIGTERM and Ctrl-C go to a host as SIGTERM: it tells the others. None outlives this program."""

  def pass_on(*_):
    told.set()
    for host in hosts[:1]:
      if host.poll() is None:
        host.send_signal(signal.SIGTERM)

  before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    for host in hosts:
      if host.poll() is None:
        host.kill()
        host.wait()


def _environment(arguments: argparse.Namespace, index: int, port: int) -> dict[str, str]:
  """What makes a process the host of that index."""
  return {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(arguments.devices_per_host),
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port or 'PORT'}",
    "JAX_NUM_PROCESSES": str(arguments.hosts),
    "JAX_PROCESS_ID": str(index),
    "ALIGNJAX_HEARTBEAT": str(arguments.heartbeat),
  }


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def _copy(index: int, stream) -> None:
  for line in stream:
    if line.startswith(b"[Gloo] Rank"):  # one for each connection
      continue
    sys.stdout.write(f"[{index}] {line.decode(errors='replace')}")
    sys.stdout.flush()


def _reason(status: int) -> str:
  return f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _say(text: str) -> None:
  print(f"local_pod: {text}", flush=True)


if __name__ == "__main__":
  sys.exit(main())
