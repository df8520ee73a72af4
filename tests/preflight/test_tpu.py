"""What the TPU compiler must make of our programs; skipped where it is not installed (the extra `compile`)."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from alignjax.errors import InputError
from alignjax.preflight import chip, hlo
from alignjax.preflight.run import place_of, preflight
from alignjax.preflight.steps import Vocabulary, make_program
from alignjax.runs.build import make_mesh
from alignjax.runs.config import load_config
from alignjax.system import sharding
from benchmarks.preflight_runs import RUNS, mesh, rows
from tests import smoke

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]


def test_dpo_of_all_weights_of_8b_fits_sixteen_small_chips_with_room_to_spare(tmp_path):
  out = tmp_path / "numbers.json"
  command = [sys.executable, "-m", "alignjax.cli", "compile", *RUNS["8b-dpo"], "--json", str(out)]
  subprocess.run(command, check=True, timeout=1500, cwd=smoke.ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"})
  numbers = json.loads(out.read_text())
  prepare, update = numbers["steps"]
  for step in (prepare, update):
    assert step["memory"]["total"] <= 0.85 * step["memory"]["capacity"]
    assert step["kernels"] > 0
    assert 0 < step["kernel_flops"] < step["flops"] / 4
  assert prepare["collectives"]["all-gather"]["count"] >= 7 * 32  # every matrix of every layer,
  assert "collective-permute" not in prepare["collectives"]  # and not as a loop of permutes with partial sums
  assert numbers["host_peak_bytes"] < 4e9


@pytest.fixture
def no_cache():
  """It keeps no program of devices that are not there."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  yield
  jax.config.update("jax_enable_compilation_cache", before)


def program(config, topology):
  """The text of a run's first step, compiled for TPUs."""
  _, devices = chip.devices(topology)
  place = make_mesh(config.mesh, devices)
  with jax.sharding.use_abstract_mesh(place.abstract_mesh):
    run = make_program(config, Vocabulary(config.model.vocab), place)
    return run.steps[0].function.trace(*run.steps[0].arguments(run.batch)).lower().compile().as_text()


def reached(computations, name):
  """The computations that one calls, itself included, but for the insides of fusions."""
  found = {name}
  for i in computations[name]:
    for key in ("body", "condition", "to_apply") if i.opcode != "fusion" else ():
      if (called := i.called(key)) and called not in found:
        found |= reached(computations, called)
  return found


@pytest.mark.parametrize("slots", [0, 16])
def test_a_decode_step_copies_no_cache(slots, no_cache):
  sizes = dict(vocab=32_000, layers=2, embed=1024, heads=8, kv_heads=4, head_dim=128, mlp=2048, dtype="bfloat16")
  overrides = [f"--config.model.{key}={value}" for key, value in sizes.items()]
  overrides += [*rows(16, 128), *mesh(2, 2), "--config.data.eval=", "--config.algorithm.num_generations=2"]
  overrides += ["--config.algorithm.max_new_tokens=256", "--config.optimizer.microbatches=1"]
  overrides += [f"--config.algorithm.slots={slots}"]
  config = load_config(f"{smoke.CONFIGS / 'grpo.py'}:smoke", [o.removeprefix("--config.") for o in overrides])
  computations, entry = hlo.parse(program(config, "v5e:2x2"))
  loops = [i for name in reached(computations, entry) for i in computations[name] if i.opcode == "while"]
  cache = sorted([(slots or 32) // 2, 2, 128, 128 + 256])  # of a device: rows, heads, their dimensions, columns
  reads = 0
  for loop in loops:
    for name in reached(computations, loop.called("body")):
      for i in computations[name]:
        shapes = [sorted(map(int, dims.split(","))) for dims in re.findall(r"bf16\[([\d,]+)\]", i.shape)]
        reads += cache in shapes
        prefetch = "S(1)" in i.shape  # into the chip's own memory, to be read
        assert prefetch or i.opcode not in ("copy", "copy-start", "transpose") or cache not in shapes, i
  assert reads  # it is there at all


@pytest.mark.parametrize(
  ("topology", "slices", "sizes"),
  [("v6e:16x16", 4, (4, 256, 1)), ("v6e:4x4", 2, (4, 4, 2)), ("v5p:16x16x16", 1, (1, 512, 8))],
)
def test_only_data_goes_over_slices(topology, slices, sizes):
  _, devices = chip.devices(topology, slices)
  placed = sharding.make_mesh(*sizes, devices=devices).devices
  assert placed.shape == (*sizes[:2], 1, sizes[2])
  of = np.vectorize(lambda device: getattr(device, "slice_index", 0))(placed)
  assert (of == of[:, :1, :1, :1]).all()
  assert sorted({*of.flat}) == list(range(slices))


def test_data_that_the_slices_do_not_divide_says_so():
  _, devices = chip.devices("v5e:2x2", 2)
  with pytest.raises(InputError, match=r"across 2 slices.*set mesh\.data to 2"):
    sharding.make_mesh(1, 8, 1, devices=devices)


@pytest.mark.parametrize("rank", [0, 16])
def test_moments_on_the_host_leave_the_device_and_have_no_copy(rank, no_cache):
  sizes = dict(vocab=2048, layers=8, embed=1024, heads=8, kv_heads=4, head_dim=128, mlp=4096, dtype="bfloat16")
  overrides = [f"model.{key}={value}" for key, value in sizes.items()]
  overrides += ["data.rows=4", "data.row_length=128", "data.eval=", f"lora.rank={rank}", "model.remat=full"]
  found = []
  for on in (False, True):
    config = load_config(f"{smoke.CONFIGS / 'dpo.py'}:smoke", [*overrides, f"optimizer.offload={on}"])
    quiet = lambda line: None
    found += preflight(config, Vocabulary(2048), place_of("v5e:2x2"), tell=quiet).estimates[:2]
  _, plain, prepare, update = (step.memory for step in found)
  assert plain.host == 0
  assert update.host == prepare.host > 0  # in place: what lies there all the time, and no more
  assert update.arguments["optimizer"] == plain.arguments["optimizer"] - update.host
  if not rank:  # factors' are no more than the compiler's moods
    assert update.total < plain.total - 0.8 * update.host
