"""Eight CPU devices, compiled programs kept from run to run, and the small things that many tests share."""
# ruff: noqa: E402  (jax reads the environment when it is imported)

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """The tests of a file run in one process, which share what they compile."""
  from xdist.scheduler import LoadFileScheduling

  return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
  """Lets compiled programs go before they are too many: each takes memory maps, and Linux allows a process 65,530."""
  yield
  maps = Path("/proc/self/maps")
  if maps.exists() and maps.read_text().count("\n") > 30_000:
    jax.clear_caches()


def forget_programs():
  """Lets go of the models, algorithms and learners that equal runs of a process share."""
  for function in (decoder.make, lora.adapt, critic.attach, build._built, learner.make_learner):
    function.cache_clear()


@pytest.fixture(autouse=True)
def no_stale_programs(request):
  """After a test that replaces anything: what it traced is not used again."""
  yield
  if "monkeypatch" in request.fixturenames:
    forget_programs()


@pytest.fixture
def monkeypatch(monkeypatch):
  """As pytest's; what was traced before a replacement does not hide it."""
  for name in ("setattr", "delattr", "setitem", "delitem"):  # setenv and syspath_prepend go through these
    setattr(monkeypatch, name, _anew(getattr(monkeypatch, name)))
  return monkeypatch


def _anew(replace):
  def replace_anew(*args, **kwargs):
    forget_programs()
    return replace(*args, **kwargs)

  return replace_anew


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
