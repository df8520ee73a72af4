"""What README and docs say there is, is what there is."""

import dataclasses
import importlib
import json
import re

import pytest

import alignjax
from alignjax import cli
from alignjax.algorithms import ALGORITHMS
from alignjax.runs.config import SECTIONS
from benchmarks import kill_resume, quickstart
from tests import chat_templates, made, smoke

DOCS = smoke.ROOT / "docs"
README = (smoke.ROOT / "README.md").read_text()
ARCHITECTURE = (DOCS / "architecture.md").read_text()
CHOOSING = (DOCS / "choosing.md").read_text()
OBJECTIVES = (DOCS / "objectives.md").read_text()
ONLINE = (DOCS / "online.md").read_text()
LOSSES = [(name, loss) for name, module in ALGORITHMS.items() for loss in module.losses]


def test_readme_names_the_oldest_jax_that_setup_allows():
  (oldest,) = re.findall(r'"jax>=([\d.]+)"', (smoke.ROOT / "setup.py").read_text())
  assert f"JAX {oldest}, the oldest" in README


def first_cells(text):
  """The names in backquotes in the first cell of every row of every table."""
  rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
  return {name for row in rows for name in re.findall(r"`(.*?)`", row)}


@pytest.mark.parametrize(("algorithm", "loss"), LOSSES, ids=map(":".join, LOSSES))
def test_an_objective_has_a_line_on_when_to_choose_it_and_its_formula(algorithm, loss):
  assert loss in first_cells(CHOOSING)
  assert loss in first_cells(OBJECTIVES) or re.search(rf"`{loss}`[:\s]+`-", OBJECTIVES)
  assert re.search(rf'`(algorithm\.name = )?"?{algorithm}"?`', OBJECTIVES + ONLINE)


NAMED = set(re.findall(r"\w+", ONLINE + OBJECTIVES))


@pytest.mark.parametrize(("algorithm", "loss"), LOSSES, ids=map(":".join, LOSSES))
def test_docs_have_the_keys_of_an_objective_with_their_defaults(algorithm, loss):
  module = ALGORITHMS[algorithm]
  if module.online:
    own = made.defaults(module) | made.hparams(module, loss)
    assert own.keys() <= NAMED  # a loss's keywords stand under their symbols in its own line
    return
  for key in made.defaults(module):
    assert re.search(rf"`(algorithm\.)?{key}\b", OBJECTIVES), key
  line = next((line for line in OBJECTIVES.splitlines() if line.startswith("| ") and f"`{loss}`" in line[:40]), "")
  if "the same" in line or "those of both" in line:
    return
  for key, value in made.hparams(module, loss).items():
    assert re.search(rf"\b{key} (\(.\) )?{value:g}(?![\d.])", line), (key, value, line)


def test_every_config_is_in_the_tree():
  names = re.search(r"^- `configs/`: (.*?)^- `launch/`", ARCHITECTURE, re.MULTILINE | re.DOTALL)[1]
  there = {path.stem for path in smoke.CONFIGS.glob("*.py") if "get_config" in path.read_text()}
  assert there <= set(re.findall(r"`(\w+)`", names))


def test_the_tree_is_what_there_is():
  named = set(re.findall(r"`(alignjax/[\w/]+\.py)`", ARCHITECTURE))
  modules = {str(path.relative_to(smoke.ROOT)) for path in (smoke.ROOT / "alignjax").rglob("*.py")}
  assert named <= modules
  assert {path for path in modules if not path.endswith("/__init__.py")} <= named


def test_every_page_is_in_the_index_of_readme_and_of_the_site():
  pages = {path.stem: path.read_text() for path in DOCS.glob("*.md") if path.stem != "index"}
  included = {page for page, text in pages.items() if text.startswith("```{include}")}  # a file that README links
  assert pages.keys() - included == set(re.findall(r"\]\(docs/(\w+)\.md\)", README[README.index("## Documentation") :]))
  contents = (DOCS / "index.md").read_text()
  assert pages.keys() <= set(re.findall(r"^(\w+)$", contents, re.MULTILINE))


def test_every_command_has_a_line():
  named = set(re.findall(r"^\| `alignjax ([a-z -]+)` \|", (DOCS / "commands.md").read_text(), re.MULTILINE))
  assert named == cli.COMMANDS.keys() | {"train"}


def test_readme_is_one_page():
  lines = README.splitlines()
  assert len(lines) <= 130
  assert max(map(len, lines)) <= 120
  commands = re.search(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1].splitlines()
  assert commands == [
    "pip install -e . && alignjax quickstart --workdir runs/quickstart",
    "pip install -e '.[test]' && pytest -n 2",
  ]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_tables_of_the_quickstart_are_drawn_from_its_json(page):
  measured = json.loads((smoke.ROOT / "benchmarks" / "results" / "quickstart.json").read_text())
  text = (smoke.ROOT / page).read_text()
  assert quickstart.table(measured["runs"]) in text
  (commit,) = re.findall(r"`benchmarks/results/quickstart\.json`,? of\s+commit (\w+)", text)
  assert measured["commit"].startswith(commit)


def test_kills_are_those_of_the_json():
  record = json.loads((smoke.ROOT / "benchmarks" / "results" / "kill_resume.json").read_text())
  kinds = [record[kind] for kind in kill_resume.KINDS]
  assert all(kind["identical"] for kind in kinds)
  early = {kind["kills_before_the_last_checkpoint"] for kind in kinds}
  said = f"killed with `kill -9` {early.pop()} times each before the last checkpoint, end bit for bit"
  assert not early
  assert said in " ".join(README.split())
  results = " ".join((DOCS / "results.md").read_text().split())
  assert said in results
  assert f"{sum(kind['kills'] for kind in kinds)} kills in all" in results


def test_the_linter_of_a_commit_is_that_of_the_tests():
  version = re.search(r"ruff==([\d.]+)", (smoke.ROOT / "setup.py").read_text())[1]
  assert f"rev: v{version} " in (smoke.ROOT / ".pre-commit-config.yaml").read_text()


def test_docs_have_every_key_of_lora():
  text = (DOCS / "lora.md").read_text()
  for field in dataclasses.fields(SECTIONS["lora"]):
    assert f"| `lora.{field.name}` |" in text


def test_the_snippet_of_chat_runs(tmp_path, monkeypatch):
  chat_templates.write(tmp_path / "tokenizer", "chatml")
  monkeypatch.chdir(tmp_path)
  (snippet,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "chat.md").read_text(), re.MULTILINE | re.DOTALL)
  exec(snippet, {})


def test_results_that_pages_name_are_there():
  for page in (smoke.ROOT / "README.md", *DOCS.glob("*.md")):
    for name in set(re.findall(r"benchmarks/results/\w+\.(?:json|svg)", page.read_text())):
      assert (smoke.ROOT / name).read_text(), (page, name)


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
  text = (DOCS / "security.md").read_text()
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
