"""Eight CPU devices, compiled programs kept from run to run, and the small things that many tests share."""
# ruff: noqa: E402  (jax reads the environment when it is imported)

import gc
import os
from pathlib import Path

from tests import quick_to_compile

# Processes that tests start inherit all of it.
os.environ["XLA_FLAGS"] = f"{quick_to_compile.flags()} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignjax" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

from alignjax.model import Model, ModelConfig, critic, decoder, lora
from alignjax.runs import build
from alignjax.system import sharding
from alignjax.training import learner
from alignjax.types import Params
from tests import batches

# name -> (mesh sizes, order of the devices)
MESHES = {
  "1 device": ({"fsdp": 1}, range(1)),
  "8 devices": ({"fsdp": 8}, range(8)),
  "8 devices, permuted": ({"fsdp": 8}, (3, 0, 7, 1, 6, 2, 5, 4)),
  "4 x 2 devices": ({"fsdp": 4, "tensor": 2}, range(8)),
  "2 x 2 x 2 devices": ({"data": 2, "fsdp": 2, "tensor": 2}, range(8)),
  "2 x 2 x 2 devices that split rows": ({"fsdp": 2, "sequence": 2, "tensor": 2}, range(8)),
}


def make_mesh(name: str) -> jax.sharding.Mesh:
  """The mesh of that name in `MESHES`."""
  sizes, order = MESHES[name]
  return sharding.make_mesh(**sizes, devices=[jax.devices()[i] for i in order])


def pytest_collection():
  """Garbage is not looked for while tests are collected: they stay."""
  gc.disable()


def pytest_collection_finish():
  """Garbage is looked for seldom, and not among modules and tests: that took a sixth of the time."""
  gc.freeze()
  gc.set_threshold(50_000, 10, 10)
  gc.enable()


# Those of 20 seconds and more, the longest first. In pytest-xdist's own order, by how many tests a file has, some of
# few tests would begin when the other processes have nothing left.
LONG_FILES = (
  "commands/test_quickstart.py",
  "algorithms/test_online.py",
  "algorithms/test_algorithm.py",
  "model/test_quantised.py",
  "model/attention/test_attention.py",
  "test_train.py",
  "algorithms/test_online_update.py",
  "sampling/test_generate.py",
  "test_programs.py",
  "training/test_step.py",
  "algorithms/test_golden_preference.py",
  "model/huggingface/test_families.py",
  "model/test_lora.py",
  "commands/test_iterate.py",
  "model/test_flax.py",
  "runs/test_run.py",
  "commands/test_sweep.py",
  "losses/test_preference.py",
  "losses/test_advantages.py",
  "training/test_offload.py",
  "runs/test_checkpoint.py",
  "runs/test_reference_cache.py",
  "algorithms/test_preference.py",
  "algorithms/test_preference_invariance.py",
  "test_own_objective.py",
  "commands/test_export.py",
  "commands/test_adapter.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """The tests of a file run in one process, which share what they compile; files begin in the order of the tests."""
  from xdist.scheduler import LoadFileScheduling

  config.option.loadscopereorder = False
  return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(config, items):
  """For several processes, puts the tests of the longest files first."""
  if hasattr(config, "workerinput"):
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(autouse=True, scope="module")
def few_programs():
  """Lets compiled programs go before they are too many: each takes memory maps, and Linux allows a process 65,530."""
  yield
  maps = Path("/proc/self/maps")
  if maps.exists() and maps.read_text().count("\n") > 30_000:
    jax.clear_caches()
    gc.collect()


def forget_programs():
  """Lets go of the models, algorithms and learners that equal runs of a process share."""
  for function in (decoder.make, lora.adapt, critic.attach, build._built, learner.make_learner):
    function.cache_clear()


ON_THE_HOST = ("alignjax.commands", "alignjax.data", "alignjax.report", "os")  # os for os.environ


def is_traced(owner):
  """Whether a program may have been traced through what a module or class holds."""
  name = owner if isinstance(owner, str) else getattr(owner, "__module__", getattr(owner, "__name__", ""))
  return not f"{name}.".startswith(tuple(f"{room}." for room in ON_THE_HOST))


@pytest.fixture
def monkeypatch(monkeypatch):
  """As pytest's; what was traced before a replacement does not hide it, and what was traced under it is not used again.

  What works on the host alone is in no program, and neither is a variable of the environment: what is shared stays.
  """
  replaced = []

  def anew(replace):
    def replace_anew(*args, **kwargs):
      if is_traced(args[0]):
        forget_programs()
        replaced.append(args[0])
      return replace(*args, **kwargs)

    return replace_anew

  for name in ("setattr", "delattr", "setitem", "delitem"):  # setenv and delenv go through these
    setattr(monkeypatch, name, anew(getattr(monkeypatch, name)))
  yield monkeypatch
  if replaced:
    forget_programs()


ALIKE = ("8 devices", "4 x 2 devices")  # to the others


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.long if name in ALIKE else ()) for name in MESHES])
def mesh(request) -> jax.sharding.Mesh:
  """Every mesh of `MESHES`, one after the other; those that others are like in the long tests."""
  return make_mesh(request.param)


@pytest.fixture(scope="session")
def one_device() -> jax.sharding.Mesh:
  return make_mesh("1 device")


@pytest.fixture(scope="session")
def eight_devices() -> jax.sharding.Mesh:
  return make_mesh("8 devices")


@pytest.fixture(scope="session")
def config() -> ModelConfig:
  """A decoder whose every size differs from the others and divides over 8 devices."""
  return ModelConfig(vocab=96, layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=48)


@pytest.fixture(scope="session")
def model(config) -> Model:
  return decoder.make(config)


@pytest.fixture(scope="session")
def params(model) -> Params:
  """Weights of `model`; never donate them."""
  return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture
def preference_batch() -> dict:
  """16 rows of 32 tokens, one or two pairs in each, of ragged lengths: numpy, as data makes it."""
  return batches.preference(rows=16, length=32, pairs=2, vocab=96)


@pytest.fixture
def triple_batch() -> dict:
  """16 rows of 32 tokens, one or two pairs with a third completion in each: as data makes it."""
  return batches.triple(rows=16, length=32, pairs=2, vocab=96)


@pytest.fixture
def ranked_batch() -> dict:
  """16 rows of 32 tokens, one or two rankings of two or three responses in each: as data makes it."""
  return batches.ranked(rows=16, length=32, rankings=2, vocab=96)


@pytest.fixture
def stepwise_batch() -> dict:
  """16 rows of 32 tokens, two or three answers in steps in each: as data makes it."""
  return batches.stepwise(rows=16, length=32, answers=3, vocab=96)


@pytest.fixture
def mismatched_batch() -> dict:
  """16 rows of 32 tokens, two or three labelled examples in each, and mismatched rows beside: as data makes it."""
  return batches.mismatched(rows=16, length=32, examples=3, vocab=96)


@pytest.fixture
def unpaired_batch(mismatched_batch) -> dict:
  """The same without the mismatched rows."""
  return {name: values for name, values in mismatched_batch.items() if not name.startswith("kl_")}


@pytest.fixture
def sft_batch() -> dict:
  """16 rows of 32 tokens, two or three examples in each, of ragged lengths: numpy, as data makes it."""
  return batches.sft(rows=16, length=32, examples=3, vocab=96)
