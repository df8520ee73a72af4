"""The Colab notebook runs from top to bottom, small."""

import json
import os

import pytest

from tests import smoke

NOTEBOOK = smoke.ROOT / "launch" / "colab" / "quickstart.ipynb"

# As papermill would: after the cell of the parameters, with other values and a quickstart of a few steps.
SMALLER = """
WORKDIR = {workdir!r}
MODEL = {model!r}
PAIRS = {pairs!r}
STEPS, ROWS, ROW_LENGTH, RANK = 4, 8, 128, 2

from alignjax.commands import quickstart as whole

for stage in whole.STAGES.values():
  stage["data"].update(rows=8, row_length=128)
  stage["optimizer"].update(warmup_steps=1)
  stage["run"].update(steps=3, save_every=2, log_every=1)
whole.STAGES["ppo"]["algorithm"].update(max_new_tokens=8, minibatches=1)
whole.MODEL = dict(layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=64, tied=True)
whole.VOCAB, whole.MAX_NEW_TOKENS = 400, 8
whole.DATA = dict(sft=240, preference=200, evaluation=40, prompts=12)
"""


def cells():
  return json.loads(NOTEBOOK.read_text())["cells"]


def test_the_notebook_is_kept_without_outputs():
  code = [cell for cell in cells() if cell["cell_type"] == "code"]
  assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
  assert code[0]["metadata"]["tags"] == ["parameters"]


@pytest.mark.long
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
  nbformat = pytest.importorskip("nbformat")
  nbclient = pytest.importorskip("nbclient")
  pytest.importorskip("ipykernel")
  monkeypatch.setenv("PYTHONPATH", str(smoke.ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""))
  monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  smaller = SMALLER.format(
    workdir=str(tmp_path / "runs"), model=str(smoke.DATA / "qwen3"), pairs=str(smoke.DATA / "preference.jsonl")
  )
  (first,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
  notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(smaller))
  nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute(cwd=str(tmp_path))

  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  shown = [kind for cell in code for output in cell.outputs for kind in output.get("data", {})]
  assert shown.count("image/png") == 3  # the curves
  text = "".join(output.get("text", "") for cell in code for output in cell.outputs)
  assert "better than SFT on" in text
  assert " after | What is 12 + 5? |" in text
  assert (tmp_path / "runs" / "mine-exported" / "model.safetensors").is_file()
