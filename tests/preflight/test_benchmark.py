"""The runs of benchmarks/preflight.py, and the docs that are drawn from their numbers."""

import argparse

import pytest

from alignjax.preflight.command import planned
from alignjax.runs.config import load_config
from benchmarks import preflight_table
from benchmarks.preflight_runs import ALL, LEVERS
from tests import smoke


def arguments(name):
  """What of a run is not its config's, and its overrides."""
  parser = argparse.ArgumentParser()
  for flag in ("--config", "--topology", "--model", "--slices"):
    parser.add_argument(flag)
  parser.add_argument("--no-levers", action="store_true")
  known, overrides = parser.parse_known_args(ALL[name])
  return known, [override.removeprefix("--config.") for override in overrides]


@pytest.mark.parametrize("name", ALL)
def test_every_run_is_one_that_could_be(name):
  known, overrides = arguments(name)
  config, _ = planned(load_config(str(smoke.ROOT / known.config), overrides), known.model)
  assert config.model.dtype == "bfloat16"
  lever = name.partition(", ")[2]
  if lever.startswith("remat=") or lever == "attention=xla":
    key, value = lever.split("=")
    assert getattr(config.model, key) == value  # the later override
  assert not lever or lever in LEVERS


@pytest.mark.parametrize("page", preflight_table.DOCS, ids=lambda page: page.stem)
def test_docs_have_the_tables_of_the_numbers(page):
  text = page.read_text()
  assert preflight_table.MARKED.search(text)
  assert preflight_table.replaced(text) == text  # python -m benchmarks.preflight_table
