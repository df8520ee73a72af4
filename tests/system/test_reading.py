"""What is read back is an ordinary file: nothing waits for a pipe, or reads a device without end."""

import json
import os

import pytest
from etils import epath

from alignjax import report
from alignjax.commands import resumable
from alignjax.data.files import expand
from alignjax.data.source import open_source
from alignjax.data.tokenizer import load_tokenizer
from alignjax.errors import InputError
from alignjax.model.huggingface import tensor_file
from alignjax.runs import array_store
from alignjax.system import hub, output, reading
from alignjax.training import metrics

PIPE = "is a pipe or a device, which is read once"


def from_saved(path):
  """A folder of `datasets` that names the file."""
  (path.parent / "state.json").write_text(json.dumps({"_data_files": [{"filename": path.name}]}))
  return open_source(expand(path.parent))


READERS = {
  "sealed": (output.read_json, "config.json"),
  "lines": (metrics.read, "metrics.jsonl"),
  "report": (lambda path: report.render(path.parent), "metrics.jsonl"),
  "summary": (lambda path: report.render(path.parent), "summary.json"),
  "hub": (lambda path: hub.read_json(epath.Path(path)), "config.json"),
  "tokenizer.json": (load_tokenizer, "tokenizer.json"),
  "tokenizer.model": (load_tokenizer, "tokenizer.model"),
  "folder of a tokenizer": (lambda path: load_tokenizer(path.parent), "tokenizer.json"),
  "weights": (tensor_file.read_header, "model.safetensors"),
  "data set": (from_saved, "data-00000.arrow"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_refused_in_one_line(name, tmp_path):
  read, file = READERS[name]
  os.mkfifo(tmp_path / file)
  with pytest.raises(InputError, match=PIPE) as caught:
    read(tmp_path / file)
  assert "\n" not in str(caught.value)


def test_what_is_made_again_if_damaged_is_made_again(tmp_path):
  os.mkfifo(tmp_path / "a.json")
  assert array_store.json_object(tmp_path / "a.json") is None
  (tmp_path / "000000.jsonl").touch()
  os.mkfifo(tmp_path / "000000.json")
  assert not resumable._is_whole(tmp_path / "000000.jsonl")


def test_links_to_files_are_read_and_all_else_is_named(tmp_path):
  (tmp_path / "a").write_text("x\r\ny\n")
  (tmp_path / "link").symlink_to("a")
  assert reading.read_bytes(tmp_path / "link") == b"x\r\ny\n"
  assert reading.read_text(str(tmp_path / "link")) == "x\ny\n"
  with pytest.raises(InputError, match="is a folder; name a file"):
    reading.read_text(tmp_path)
  with pytest.raises(InputError, match=f"/dev/zero: {PIPE}"):
    reading.read_bytes("/dev/zero")
  (tmp_path / "b").write_bytes(b"ab\xff")
  with pytest.raises(InputError, match=r"b: cannot be read \(byte 2 is not UTF-8"):
    reading.read_text(tmp_path / "b")
