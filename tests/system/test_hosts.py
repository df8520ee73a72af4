"""Who the other processes are is the environment's to say, and hosts that differ are named."""

import collections
import contextlib
import errno
import types
from unittest import mock

import pytest

from alignjax import errors
from alignjax.errors import InputError
from alignjax.runs.workdir import same_everywhere
from alignjax.system import hosts
from tests import smoke

COORDINATOR = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
  "environ",
  [
    {},
    {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script, outside of srun
    {"TPU_WORKER_HOSTNAMES": "one"},
    COORDINATOR | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
  ],
)
def test_a_process_alone_stays_alone(environ):
  assert hosts.setup(environ) is None


@pytest.mark.parametrize(
  "environ",
  [
    {"SLURM_STEP_NUM_TASKS": "2"},
    {"TPU_WORKER_HOSTNAMES": "one,two"},
    {"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "one"},
    {"ALIGNJAX_HOSTS": "auto"},
  ],
)
def test_jax_finds_out_where_a_scheduler_started_several(environ):
  assert hosts.setup(environ) == {}


def test_a_coordinator_is_taken_from_the_environment():
  found = hosts.setup(COORDINATOR)
  assert (found["coordinator_address"], found["num_processes"], found["process_id"]) == ("10.0.0.1:1234", 2, 1)
  assert "coordinator_bind_address" not in found
  local = hosts.setup(COORDINATOR | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1234", "JAX_PROCESS_ID": "0"})
  assert local["coordinator_bind_address"] == "127.0.0.1:1234"  # and not every interface


@pytest.mark.parametrize(
  ("change", "word"),
  [
    ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID"),
    ({"JAX_PROCESS_ID": "2"}, "not below"),
    ({"JAX_NUM_PROCESSES": "two"}, "whole numbers"),
  ],
)
def test_half_a_description_is_an_error(change, word):
  with pytest.raises(InputError, match=word):
    hosts.setup(COORDINATOR | change)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "MEGASCALE_NUM_SLICES"])
def test_a_variable_that_is_no_number_is_named(name):
  with pytest.raises(InputError, match=f"{name}=two: use a whole number"):
    hosts.setup({name: "two"})


def test_the_host_that_differs_from_most_is_named():
  same, other = {"rows": 8, "code": "a"}, {"rows": 16, "code": "a"}
  assert hosts.disagreement({0: same, 1: same}) is None
  assert hosts.disagreement({0: other, 1: same, 2: same}) == (0, ["rows is 16 there and 8 elsewhere"])
  assert hosts.disagreement({0: same, 1: other})[0] == 1


def test_what_hosts_must_share_has_config_code_and_batch_but_not_where_files_lie():
  config = smoke.config("dpo")
  facts = same_everywhere(config)
  assert facts["batch_shape"] == [8, 128]
  assert {"commit", "source", "versions"} <= facts["code"].keys()
  assert same_everywhere(config.replace({"data.train": "elsewhere.jsonl", "run.compile_cache": "/x"})) == facts
  assert same_everywhere(config.replace({"data.rows": 16}))["config_hash"] != facts["config_hash"]


def test_what_the_first_host_cannot_open_is_the_error_of_all(monkeypatch):
  said = {}
  client = types.SimpleNamespace(
    key_value_set=said.__setitem__, blocking_key_value_get=lambda place, patience: said[place]
  )

  def refuse(error):
    raise error

  full = OSError(errno.ENOSPC, "No space left on device", "/x")
  look = "host 0 failed at its output; look at its log"
  for index in (0, 1):
    monkeypatch.setattr(hosts, "_rounds", collections.Counter())
    state = types.SimpleNamespace(client=client, process_id=index, num_processes=2)
    monkeypatch.setattr(hosts.distributed, "global_state", state)
    opened = mock.Mock(return_value=contextlib.nullcontext())
    with hosts.held("folder", opened):
      assert opened.call_count == (index == 0)
    with pytest.raises(InputError, match="process 7 trains here"):
      hosts.by_first("workdir", lambda: refuse(InputError("process 7 trains here")))
    for error, line in ((full, errors.os_error(full)), (ZeroDivisionError("a fault"), look), (SystemExit(1), look)):
      with pytest.raises(InputError if index else type(error)) as caught:
        hosts.by_first("output", lambda error=error: refuse(error))
      assert str(caught.value) == line if index else caught.value is error


def test_alone_nothing_is_compared_and_an_error_is_just_an_error():
  hosts.agree("nothing", {})
  assert hosts.run(lambda: 3) == 3
  with pytest.raises(ZeroDivisionError), hosts.leaving():
    raise ZeroDivisionError
