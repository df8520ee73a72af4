"""A run's own record gives no permission: what it names in Python is imported, and what it wants run is run, only if
the command line, the environment or the caller says so now."""

import contextlib
import json
import os
import sys

import pytest
from etils import epath

from alignjax import cli
from alignjax.data.tokenizer import load_tokenizer
from alignjax.errors import InputError, exit_status
from alignjax.evaluation.held_out import evaluate
from alignjax.runs.build import make_algorithm, make_model, with_sizes
from alignjax.runs.run import load
from alignjax.runs.trust import TRUST, trusting
from alignjax.runs.workdir import read_config, without_permissions
from tests import smoke


@pytest.fixture
def trap(tmp_path, monkeypatch):
  """A module on the path that leaves a file where it is imported."""
  (tmp_path / "trap_module.py").write_text(
    f"open({str(tmp_path / 'sprung')!r}, 'w').close()\ndef f(*args, **kwargs):\n  raise RuntimeError('sprung')\n"
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delenv(TRUST, raising=False)
  monkeypatch.delenv("ALIGNJAX_RUN_CODE", raising=False)
  yield tmp_path / "sprung"
  sys.modules.pop("trap_module", None)


def stored(name, to, **changes):
  """A copy of a DPO run, which has a reference; its record says that it is one of `name`: {"section.key": value}."""
  workdir = smoke.copy(smoke.finished("dpo")[0], to)
  record = json.loads((workdir / "config.json").read_text())
  del record["sha256"]  # as whoever changes it does
  record["config"] = smoke.config(name).to_dict()
  for key, value in changes.items():
    section, field = key.split("__")
    record["config"][section][field] = value
  (workdir / "config.json").write_text(json.dumps(record))
  return workdir


def test_a_module_that_a_record_names_is_not_imported(trap, tmp_path, capsys):
  workdir = stored("sft", tmp_path / "run", model__module="trap_module:f")
  commands = [
    ["evaluate", "--workdir", str(workdir)],
    ["generate", "--workdir", str(workdir), "--prompt", "Hi"],
    ["export", "--workdir", str(workdir), "--out", str(tmp_path / "out")],
  ]
  capsys.readouterr()
  for command in commands:
    assert exit_status(cli.main, command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"alignjax: {workdir}/config.json: would import Python that it names itself, trap_module:f")
    assert error.count("\n") == 1
  assert not trap.exists()
  assert exit_status(cli.main, [*commands[0], "--trust-run-code"]) == 2
  assert "RuntimeError: sprung" in capsys.readouterr().err
  assert trap.exists()


def test_a_run_that_another_takes_is_no_other(trap, tmp_path):
  workdir = stored("sft", tmp_path / "run", model__module="trap_module:f")
  with pytest.raises(InputError, match="would import Python"):
    with_sizes(smoke.config("dpo", run__init=str(workdir)), epath.Path(tmp_path / "new"))
  taken = with_sizes(smoke.config("dpo", run__init=str(workdir), model__module="trap_module:f"), epath.Path(tmp_path))
  assert taken.model.module == "trap_module:f"  # the command line names it
  judged = smoke.config("gkd", algorithm__teacher=str(workdir))
  tokenizer = load_tokenizer(judged.data.tokenizer)
  with pytest.raises(InputError, match="would import Python"):
    make_algorithm(judged, make_model(judged, tokenizer), tokenizer, epath.Path(tmp_path / "new"))
  assert not trap.exists()


def test_a_reward_that_a_record_names_is_not_imported(trap, tmp_path, monkeypatch):
  workdir = stored("rloo", tmp_path / "run", algorithm__rewards="trap_module:f", algorithm__reward_settings={})
  with pytest.raises(InputError, match=r"config\.json: would import Python that it names itself, trap_module:f"):
    evaluate(workdir)
  assert not trap.exists()
  load(workdir)  # no reward is asked
  assert not trap.exists()
  monkeypatch.setenv(TRUST, "1")
  with contextlib.suppress(InputError):  # it judges nothing
    evaluate(workdir)
  assert trap.exists()


def test_a_record_does_not_permit_to_run_code(trap, tmp_path):
  settings = {"run_code": "weak", "code_isolation": ""}
  workdir = stored("rloo", tmp_path / "run", algorithm__rewards="code_tests", algorithm__reward_settings=settings)
  with pytest.raises(InputError, match="code_tests runs code that a model wrote, and is off"):
    evaluate(workdir)
  config = read_config(epath.Path(workdir))
  assert config.options.reward_settings == settings  # it is still what it says
  assert without_permissions(config).options.reward_settings == {}


def test_the_permission_ends_where_it_was_given(monkeypatch):
  monkeypatch.delenv(TRUST, raising=False)
  with trusting(True):
    assert os.environ[TRUST] == "1"
  assert TRUST not in os.environ
