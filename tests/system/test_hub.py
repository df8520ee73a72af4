"""What is on the hub is fetched once by the library for it, or one line says why not."""

import sys

import pytest

from alignjax.errors import InputError
from alignjax.system import hub


@pytest.fixture(autouse=True)
def nothing_remembered():
  hub.local.cache_clear()


def test_a_name_on_the_hub_needs_its_library(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  assert hub.is_folder("hf://someone/model")
  with pytest.raises(InputError, match="pip install huggingface_hub"):
    hub.local("hf://someone/model")


def test_a_name_that_can_not_be_fetched_is_one_line(monkeypatch):
  library = pytest.importorskip("huggingface_hub")

  def refuse(name, **kwargs):
    raise OSError(f"no way to {name} {kwargs['revision']}")

  monkeypatch.setattr(library, "snapshot_download", refuse)
  with pytest.raises(InputError, match=r"hf://someone/other@v2: cannot be fetched \(no way to someone/other v2\)"):
    hub.local("hf://someone/other@v2")


def test_a_name_that_is_fetched_is_the_folder_that_the_library_made(monkeypatch, tmp_path):
  library = pytest.importorskip("huggingface_hub")
  monkeypatch.setattr(library, "snapshot_download", lambda name, **kwargs: str(tmp_path / name))
  assert str(hub.local("hf://someone/other")) == str(tmp_path / "someone/other")


def test_no_name_is_no_folder_wherever_the_process_runs(monkeypatch, tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  monkeypatch.chdir(tmp_path)
  assert hub.is_folder(tmp_path)
  assert not hub.is_folder("")
