"""A SentencePiece tokenizer written in Hugging Face's files gives the same ids there."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from alignjax.data import load_tokenizer
from alignjax.data.sentencepiece_json import convert
from alignjax.errors import InputError
from tests import trl_environment

LETTERS = "abcdefgh  \n\t0123é漢😀.,'THE the<>|\u2581\x00"
DIALOGUES = [
  [{"role": "user", "content": "red cat"}],
  [
    {"role": "system", "content": "Be\n\nkind. "},
    {"role": "user", "content": "  What is 12 + 5?\n"},
    {"role": "assistant", "content": "17"},
    {"role": "user", "content": "Why?"},
  ],
]
SCRIPT = """
import json, sys
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
apply = lambda dialogue: tokenizer.apply_chat_template(dialogue, add_generation_prompt=True)["input_ids"]
print(json.dumps([apply(dialogue) for dialogue in json.loads(sys.argv[2])]))
"""


def written(tokenizer, folder: Path) -> Path:
  for name, text in convert(tokenizer).items():
    (folder / name).write_text(text)
  return folder


def test_ids_of_texts_and_dialogues_are_the_same(tokenizer, tmp_path):
  theirs, rng = load_tokenizer(written(tokenizer, tmp_path)), random.Random(0)
  for _ in range(500):
    text = "".join(rng.choice(LETTERS) for _ in range(rng.randint(0, 60)))
    assert theirs.encode(text) == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
  for dialogue in DIALOGUES:
    assert theirs.render(dialogue, True) == tokenizer.render(dialogue, True)
    answer = [{"role": "assistant", "content": " yes"}]
    assert theirs.complete(dialogue, answer) == tokenizer.complete(dialogue, answer)
  ids = lambda x: (x.bos_id, x.pad_id, x.stop_id, x.vocab_size)
  assert ids(theirs) == ids(tokenizer)


@pytest.mark.skipif("ALIGNJAX_DATA" not in os.environ, reason="needs ALIGNJAX_DATA")
def test_a_model_that_changes_text_is_refused():
  mistral = load_tokenizer(Path(os.environ["ALIGNJAX_DATA"]) / "tokenizers" / "mistral-v3.model")
  with pytest.raises(InputError, match=r"copy the \.model file"):
    convert(mistral)


@pytest.mark.slow
def test_transformers_applies_the_same_template(tokenizer, tmp_path):
  command = [trl_environment.python(), "-c", SCRIPT, str(written(tokenizer, tmp_path)), json.dumps(DIALOGUES)]
  done = subprocess.run(command, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  assert json.loads(done.stdout) == [tokenizer.render(dialogue, True) for dialogue in DIALOGUES]
