"""What README and docs say there is, is what there is."""

import dataclasses
import importlib
import json
import re

import pytest

import alignjax
from alignjax.algorithms import ALGORITHMS
from alignjax.config import SECTIONS
from tests import chat_templates, smoke

README = (smoke.ROOT / "README.md").read_text()
OBJECTIVES = (smoke.ROOT / "docs" / "objectives.md").read_text()
ONLINE = (smoke.ROOT / "docs" / "online.md").read_text()
LOSSES = [(name, loss) for name, module in ALGORITHMS.items() for loss in module.LOSSES]


def first_cells(text):
  """The names in backquotes in the first cell of every row of every table."""
  rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
  return {name for row in rows for name in re.findall(r"`(.*?)`", row)}


@pytest.mark.parametrize(("algorithm", "loss"), LOSSES, ids=map(":".join, LOSSES))
def test_an_objective_has_a_line_in_readme_and_its_formula_in_docs(algorithm, loss):
  assert loss in first_cells(README)
  assert loss in first_cells(OBJECTIVES) or re.search(rf"`{loss}`[:\s]+`-", OBJECTIVES)
  assert re.search(rf'`(algorithm\.name = )?"?{algorithm}"?`', OBJECTIVES + ONLINE)


NAMED = set(re.findall(r"\w+", ONLINE + OBJECTIVES))


@pytest.mark.parametrize(("algorithm", "loss"), LOSSES, ids=map(":".join, LOSSES))
def test_docs_have_the_keys_of_an_objective_with_their_defaults(algorithm, loss):
  module = ALGORITHMS[algorithm]
  if "rewards" in module.OPTIONS:
    own = module.OPTIONS | module.hparams(loss)
    assert own.keys() <= NAMED  # a loss's keywords stand under their symbols in its own line
    return
  for key in module.OPTIONS:
    assert re.search(rf"`(algorithm\.)?{key}\b", OBJECTIVES), key
  line = next((line for line in OBJECTIVES.splitlines() if line.startswith("| ") and f"`{loss}`" in line[:40]), "")
  if "the same" in line or "those of both" in line:
    return
  for key, value in module.hparams(loss).items():
    assert re.search(rf"\b{key} (\(.\) )?{value:g}(?![\d.])", line), (key, value, line)


def test_every_config_is_in_the_tree():
  names = re.search(r"^configs/ +(.*?)^docs/", README, re.MULTILINE | re.DOTALL)[1]
  there = {path.stem for path in smoke.CONFIGS.glob("*.py") if "get_config" in path.read_text()}
  assert there <= set(re.findall(r"\w+", names))


def test_every_page_of_docs_is_in_the_tree():
  pages = re.search(r"^docs/ +(.*?)^launch/", README, re.MULTILINE | re.DOTALL)[1]
  there = {path.name for path in (smoke.ROOT / "docs").glob("*.md")}
  assert there == set(re.findall(r"(\w+\.md):", pages))


def test_docs_have_every_key_of_lora():
  text = (smoke.ROOT / "docs" / "lora.md").read_text()
  for field in dataclasses.fields(SECTIONS["lora"]):
    assert f"| `lora.{field.name}` |" in text


def test_the_snippet_of_chat_runs(tmp_path, monkeypatch):
  chat_templates.write(tmp_path / "tokenizer", "chatml")
  monkeypatch.chdir(tmp_path)
  (snippet,) = re.findall(
    r"^```python\n(.*?)^```", (smoke.ROOT / "docs" / "chat.md").read_text(), re.MULTILINE | re.DOTALL
  )
  exec(snippet, {})


def test_results_that_readme_names_are_there():
  for name in set(re.findall(r"benchmarks/results/\w+\.json", README)):
    assert json.loads((smoke.ROOT / name).read_text())


def test_nothing_names_the_machine_it_was_made_on():
  for path in (smoke.ROOT / "benchmarks" / "results").glob("*.json"):
    assert not re.search(r"(^|[\s\"'=])(\.\./|/(tmp|home|root|work|mnt)/)", path.read_text()), path


def test_every_benchmark_can_be_started():
  """Those of other environments (torch, TRL) are run by the slow tests that need them."""
  for path in (smoke.ROOT / "benchmarks").glob("*.py"):
    if not re.search(r"(import|from) (torch|transformers|trl|tunix)\b", path.read_text()):
      importlib.import_module(f"benchmarks.{path.stem}")


def test_the_package_shows_what_it_offers():
  assert set(alignjax.__all__) <= set(dir(alignjax))


def test_every_line_of_the_threat_model_has_a_test_that_there_is():
  text = (smoke.ROOT / "docs" / "security.md").read_text()
  there = {
    name
    for path in (smoke.ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
  }
  rows = [line for line in text.splitlines() if line.startswith("| ") and not line.endswith(("| test |", "| --- |"))]
  for row in rows:
    cells = row.split(" | ")[-1]
    named = re.findall(r"`(test_\w+)`", cells)
    assert named, row
    assert set(named) <= there, set(named) - there
