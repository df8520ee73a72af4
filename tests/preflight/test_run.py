"""A run's steps from shapes alone, and what is said of them."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from alignjax.cli import main
from alignjax.data.loader import Dataset
from alignjax.data.tokenizer import load_tokenizer
from alignjax.errors import InputError
from alignjax.model import decoder
from alignjax.preflight import chip as chips
from alignjax.preflight import run as runs
from alignjax.preflight.chip import Chip
from alignjax.preflight.command import VOCAB, compile_run, planned
from alignjax.preflight.estimate import sharded_bytes
from alignjax.preflight.run import place_of, preflight, with_levers
from alignjax.preflight.steps import Vocabulary, decode_reads, make_program
from alignjax.preflight.text import report
from alignjax.runs import build
from alignjax.runs.config import load_config, resolve
from alignjax.system import sharding
from alignjax.training import offload

CONFIGS = Path(__file__).parent.parent.parent / "configs"
WORDS = Vocabulary(64)
TINY = {
  "model": {"layers": 1, "embed": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "mlp": 16},
  "data": {"rows": 8, "row_length": 16, "max_examples": 1, "holdout": 0.0},
  "algorithm": {"name": "preference", "loss": "dpo"},
  "run": {"steps": 4},
}


def tiny(**sections):
  """The config of the smallest DPO run, with values changed by section."""
  base = TINY | {"lora": {}, "optimizer": {}}
  return resolve({name: values | sections.get(name, {}) for name, values in base.items()})


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "kto", "ppo"])
def test_the_batch_is_the_datas(name, eight_devices):
  config, words = planned(load_config(f"{CONFIGS / name}.py:smoke"))
  tokenizer = load_tokenizer(config.data.tokenizer)
  kind = "prompt" if name == "ppo" else {"sft": "sft", "kto": "mismatched"}.get(name, "preference")
  rows = next(Dataset.open(config.data, tokenizer, kind, "train", 0).batches())
  expected = {key: (x.shape, x.dtype) for key, x in rows.items() if not key.startswith("kl_")}
  with jax.sharding.use_abstract_mesh(eight_devices.abstract_mesh):
    found = make_program(config, words, eight_devices).batch
  assert {key: (x.shape, x.dtype) for key, x in found.rows.items() if key in expected} == expected


def test_memory_is_what_the_run_holds_and_what_the_program_needs():
  found = preflight(tiny(), WORDS, place_of("cpu:8"), tell=lambda line: None)
  prepare, update = found.estimates
  size = sharded_bytes(decoder.make(tiny(model={"vocab": 64}).model).abstract(sharding.make_mesh()))
  assert (prepare.step, update.step) == ("prepare", "update")
  assert prepare.memory.arguments["reference"] == size
  assert prepare.memory.beside["parameters"] == size
  assert update.memory.arguments["parameters"] == size
  assert update.memory.arguments["optimizer"] >= 2 * size
  assert update.memory.beside == {"reference": size}  # it stays, though the update does not read it
  parts = [*update.memory.arguments.values(), *update.memory.beside.values()]
  assert update.memory.total == sum(parts) + update.memory.temporaries + update.memory.output
  assert update.totals.count["all-gather"] > 0
  assert update.flops > 2 * prepare.flops > 0
  assert found.fits
  assert report(found)[-1] == "every step compiles; what a CPU's memory holds is not asked"
  assert not any("not understood" in line for line in report(found))
  assert found.to_dict()["steps"][1]["instructions_not_understood"] == 0
  partly_read = update._replace(totals=dataclasses.replace(update.totals, unread=3))
  assert any("3 instructions are not understood" in line for line in report(found._replace(estimates=[partly_read])))
  assert partly_read.to_dict()["instructions_not_understood"] == 3


@pytest.mark.slow
def test_a_kernels_matmuls_count_as_those_that_it_replaces():
  plain, kernel = (
    preflight(tiny(model={"attention": name}), WORDS, place_of("cpu:8"), tell=print) for name in ("xla", "splash")
  )
  assert [e.flops for e in kernel.estimates] == [e.flops for e in plain.estimates]
  assert all(e.kernel_flops > 0 for e in kernel.estimates)
  assert not any(e.kernel_flops for e in plain.estimates)
  assert kernel.useful_flops == plain.useful_flops


@pytest.mark.parametrize("tied", [True, False])
def test_a_decode_step_reads_the_weights_that_it_computes_with_and_the_cache(tied, eight_devices):
  config = tiny(
    model={"vocab": 64, "tied": tied, "dtype": "bfloat16"},
    algorithm={"name": "grpo", "loss": "grpo", "rewards": "gsm8k", "num_generations": 2, "max_new_tokens": 16},
  )
  model = decoder.make(config.model)
  with jax.sharding.use_abstract_mesh(eight_devices.abstract_mesh):
    reads = decode_reads(config, model, eight_devices)
  stored = model.abstract(eight_devices)
  looked_up = 0 if tied else sharded_bytes(stored["embed"])
  assert reads["weights"] == (sharded_bytes(stored) - looked_up) / 2  # float32, computed in bfloat16
  keys = 2 * 2 * 2 * 8 * 32  # of a device's two rows, in bfloat16
  segments = 4 * 16 * 32  # of all rows
  assert 2 * keys <= reads["cache"] <= 2 * keys + segments + 64


def test_a_cached_reference_is_not_in_memory(eight_devices):
  with jax.sharding.use_abstract_mesh(eight_devices.abstract_mesh):
    program = make_program(tiny(run={"reference_cache": "cache"}), WORDS, eight_devices)
  assert "reference" not in program.resident
  assert "reference_logps" in program.batch.rows


def test_the_base_under_factors_is_the_reference_and_has_no_moments(eight_devices):
  with jax.sharding.use_abstract_mesh(eight_devices.abstract_mesh):
    programs = [make_program(tiny(lora={"rank": rank}), WORDS, eight_devices) for rank in (0, 1)]
  whole, factors = (program.resident for program in programs)
  assert "base" in programs[1].steps[0].reads  # prepare's reference
  assert "reference" not in factors
  assert sharded_bytes(factors["base"]) == sharded_bytes(whole["parameters"])
  assert sharded_bytes(factors["optimizer"]) < sharded_bytes(whole["optimizer"]) / 2


def test_moments_on_the_host_count_there(eight_devices, monkeypatch):
  monkeypatch.setattr(offload, "has_own_memory", lambda mesh: True)
  with jax.sharding.use_abstract_mesh(eight_devices.abstract_mesh):
    programs = [make_program(tiny(optimizer={"offload": on}), WORDS, eight_devices) for on in (False, True)]
  plain, moved = (program.resident["optimizer"] for program in programs)
  layers = sum(
    sharded_bytes(weight) for name, weight in programs[0].resident["parameters"]["layers"].items() if "norm" not in name
  )
  assert sharded_bytes(plain, on_host=True) == 0
  assert sharded_bytes(moved, on_host=True) == 2 * layers
  assert sharded_bytes(moved) == sharded_bytes(plain) - 2 * layers


def test_where_it_does_not_fit_the_levers_are_compiled(monkeypatch):
  small = Chip("toy", flops=1e12, hbm=1e11, ici=1e10, capacity=20_000)
  monkeypatch.setattr(chips, "devices", lambda topology, slices: (small, jax.devices()[:1]))
  levers = lambda config, devices: [("lion", config.replace({"optimizer.name": "lion"})), ("none", config)]
  monkeypatch.setattr(runs, "levers", levers)
  monkeypatch.setattr(chips, "compiler", lambda chip: "a compiler")
  told = []
  found = preflight(tiny(), WORDS, place_of("toy:1"), tell=told.append)
  assert not found.fits
  assert not any("lever" in line for line in told)
  found = with_levers(found, tiny(), WORDS, tell=told.append)
  assert [line.split(":")[0] for line in told[-2:]] == ["lever lion", "lever none"]
  assert [name for name, _, _ in found.levers] == ["lion", "none"]
  assert 0 < found.mfu_ceiling < 1
  assert {"does not fit", "bound"} <= {
    word for line in report(found) for word in ("does not fit", "bound") if word in line
  }
  json.dumps(found.to_dict())


def test_levers_change_one_thing_each():
  found = dict(runs.levers(tiny(data={"rows": 32}), devices=8))
  assert found["optimizer.microbatches=4"].optimizer.microbatches == 4
  assert found["run.reference_cache=DIR"].run.reference_cache
  assert found["lora.rank=16, lora.base=bfloat16"].lora.rank == 16
  assert "mesh.tensor=4" not in found  # two key heads
  assert found["optimizer.offload=True"].optimizer.offload
  others = tiny(optimizer={"offload": True}), tiny(optimizer={"name": "adafactor"})
  assert not any("optimizer.offload=True" in dict(runs.levers(config, devices=8)) for config in others)


@pytest.mark.parametrize(
  ("topology", "says"), [("v5e-16", "use v5e:SHAPE"), ("cpu:many", "as cpu:8"), ("cpu:4096", "JAX_NUM_CPU_DEVICES")]
)
def test_an_unknown_topology_says_what_is_known(topology, says, eight_devices):
  with pytest.raises(InputError, match=says):
    place_of(topology)


@pytest.mark.slow
def test_rows_of_a_config_are_raised_to_what_the_mesh_divides_and_those_of_the_command_are_not(capsys):
  config, overrides = f"{CONFIGS / 'dpo.py'}:smoke", ["mesh.tensor=2", "optimizer.microbatches=3", "data.row_length=64"]
  assert compile_run(config, overrides, "cpu:8").tokens == 12 * 64
  assert "data.rows=8 does not divide over this mesh, so training refuses it: taken as 12" in capsys.readouterr().out
  with pytest.raises(InputError, match=r"data\.rows=8 is not divisible by"):
    compile_run(config, [*overrides, "data.rows=8"], "cpu:8")


@pytest.mark.parametrize("name", ["ppo", "grpo", "dpo"])
def test_rows_are_raised_no_further_than_they_must(name):
  config, _ = planned(load_config(str(CONFIGS / f"{name}.py"), ["data.rows=3"]), tell=lambda line: None)
  completions = build.completions_of(config)

  def check(rows):
    mesh, parts = sharding.make_mesh(), config.optimizer.microbatches
    sharding.check_rows(rows * completions, 64, parts, mesh, build.minibatches_of(config), completions)

  rows = runs.with_rows(config, place_of("cpu:8")).data.rows
  check(rows)
  for fewer in range(3, rows):
    with pytest.raises(InputError):
      check(fewer)


def test_without_a_tokenizer_a_vocabulary_is_assumed_and_that_is_said():
  told = []
  config = load_config(str(CONFIGS / "dpo.py"), ["data.tokenizer=nowhere.model"])
  assert planned(config, tell=told.append)[1].vocab_size == VOCAB
  assert told == ["data.tokenizer=nowhere.model is not there: its vocabulary is taken as 32,000"]


@pytest.mark.parametrize(("topology", "slices"), [("v5e:4x4", 0), ("v5e:4x4", -1), ("cpu:8", 2)])
def test_slices_that_there_can_not_be_are_an_input_error(topology, slices):
  with pytest.raises(InputError, match="--slices"):
    place_of(topology, slices)


def test_a_file_that_can_not_be_written_is_said_before_minutes_of_compiling(tmp_path):
  out = str(tmp_path / "none" / "x.json")
  arguments = ["--config", f"{CONFIGS / 'sft'}.py:smoke", "--topology", "cpu:8", "--json", out]
  with pytest.raises(InputError, match="--json"):
    main(["compile", *arguments])


def test_the_command_writes_what_it_prints(tmp_path, capsys):
  out = tmp_path / "numbers.json"
  small = ["model.layers=1", "data.rows=8", "data.row_length=16", "data.holdout=0.0"]
  arguments = ["--config", f"{CONFIGS / 'sft'}.py:smoke", "--topology", "cpu:8", "--json", str(out)]
  assert main(["compile", *arguments, *(f"--config.{override}" for override in small)]) == 0
  numbers = json.loads(out.read_text())
  assert [step["step"] for step in numbers["steps"]] == ["prepare", "update"]
  said = capsys.readouterr().out
  assert numbers["compiler"].startswith("jaxlib ")
  assert f"compiler estimates ({numbers['compiler']}), not measurements" in said


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_tpu_program_is_compiled_without_a_tpu(tmp_path):
  small = ["model.layers=2", "data.rows=8", "data.row_length=128", "data.holdout=0.0", "data.eval="]
  out = tmp_path / "numbers.json"
  command = [sys.executable, "-m", "alignjax.cli", "compile", "--config", f"{CONFIGS / 'dpo'}.py:smoke"]
  command += ["--topology", "v5e:2x4", "--json", str(out), *(f"--config.{override}" for override in small)]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  subprocess.run(command, check=True, timeout=900, env=environment)
  numbers = json.loads(out.read_text())
  assert numbers["devices"] == 8
  assert numbers["fits"]
  update = numbers["steps"][1]
  assert update["cycles"] > 0
  assert update["seconds"]["ici"] > 0
  assert update["memory"]["capacity"] == int(15.75 * 2**30)
