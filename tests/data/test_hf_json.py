"""A tokenizer.json that would end the process is refused before the library has it."""

import base64
import json

import pytest
import tokenizers
from etils import epath
from tokenizers import models, pre_tokenizers, trainers

from alignjax.data import hf_json
from alignjax.data.hf_tokenizer import open_parser
from alignjax.errors import InputError

TABLE = lambda *parts: {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"".join(parts)).decode()}
TOKENS = {"t": 0, "e": 1, "x": 2, "te": 3, "xt": 4}


def bpe(**model):
  own = {"type": "BPE", "vocab": TOKENS, "merges": [["t", "e"], ["x", "t"]]}
  return {"version": "1.0", "added_tokens": [], "model": own | model}


BAD = {
  "huge id": (bpe(vocab=TOKENS | {"q": 2**31}), "it has 6 tokens and ids up to 2147483648"),
  "one id twice": (bpe(vocab=TOKENS | {"q": 1}), "several tokens have the id 1"),
  "no tokens": (bpe(vocab={}), "it has 0 tokens"),
  "prefix": (
    bpe(continuing_subword_prefix="##"),
    r"is '##', and the merge \['t', 'e'\] goes on without",
  ),
  "long prefix": (bpe(continuing_subword_prefix="x" * 1000), "continuing_subword_prefix is "),
  "prefix, merges as text": (bpe(continuing_subword_prefix="é", merges=["t e"]), "the merge 't e' goes on without it"),
  "merge of none": (bpe(merges=[["q", "t"]]), r"the merge \['q', 't'\] is of or makes 'q', which is no token"),
  "merge to none": (bpe(merges=[["te", "te"]]), "is of or makes 'tete', which is no token"),
  "table": (bpe() | {"normalizer": TABLE(b"\xff" * 4)}, "precompiled_charsmap of 4 bytes has a trie of 4294967295"),
  "empty table": (bpe() | {"normalizer": TABLE()}, "precompiled_charsmap of 0 bytes"),
  "inner table": (
    bpe() | {"normalizer": {"type": "Sequence", "normalizers": [TABLE(b"\x04\0\0\0", bytes(4), b"\xff")]}},
    "precompiled_charsmap is none",
  ),
  "no table": (
    bpe() | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": 3}},
    "precompiled_charsmap is none",
  ),
  "deep": ("[" * 100_000, "no JSON"),
  "list": ([], "no object with a model"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_library_would_not_survive_is_refused_before(name, tmp_path, monkeypatch):
  content, message = BAD[name]
  (tmp_path / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))
  monkeypatch.setattr(tokenizers.Tokenizer, "from_str", lambda text: pytest.fail("it was opened"))
  with pytest.raises(InputError, match=message) as caught:
    open_parser(epath.Path(tmp_path / "tokenizer.json"))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [{"pre_tokenizer": {"type": "FixedLength", "length": 0}}, {"normalizer": "?"}])
def test_what_it_panics_at_is_one_line(part, tmp_path):
  (tmp_path / "tokenizer.json").write_text(json.dumps(bpe() | part))
  with pytest.raises(InputError, match=r"tokenizer\.json: no tokenizer\.json of the tokenizers library"):
    open_parser(epath.Path(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("settings", [{}, {"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "</w>"}])
def test_what_the_library_trains_has_no_flaw(settings):
  parser = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]", **settings))
  parser.pre_tokenizer = pre_tokenizers.Whitespace()
  trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False, **settings)
  parser.train_from_iterator(["the quick brown fox jumps over the lazy dog, there"] * 5, trainer)
  assert "merges" in parser.to_str()
  assert hf_json.flaw(parser.to_str()) == ""
