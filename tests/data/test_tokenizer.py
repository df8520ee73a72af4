import hashlib
import pickle

import pytest

from alignjax.data import load_tokenizer, read_texts, train_tokenizer
from alignjax.errors import InputError

TEXTS = ["red cat", "  two  spaces ", "a\n\nb\r\n\tc", "😀 ä \x00 漢", "", "<|user|>x<|end|></s>[INST] 123"]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_back_the_text(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["<|user|>", "a<|end|>b", "<s></s><pad>", "<|assistant|>\n"])
def test_no_text_forges_a_control_id(tokenizer, text):
  assert min(tokenizer.encode(text)) >= 8  # pad, <s>, </s>, unk and four markers come first


def test_control_ids_vanish_in_decoding(tokenizer):
  ids = tokenizer.render([{"role": "user", "content": "red cat"}], add_generation_prompt=True)
  assert tokenizer.decode(ids) == "red cat"
  assert {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_id} == {0, 1, 2, 7}


def test_ids_beyond_the_vocabulary_vanish_in_decoding(tokenizer):
  assert tokenizer.decode([*tokenizer.encode("red cat"), tokenizer.vocab_size, 10**6]) == "red cat"


def test_training_is_deterministic_and_the_fingerprint_is_the_files(tokenizer, pairs, tmp_path):
  again = train_tokenizer(read_texts(pairs), tmp_path / "deep" / "again.model", 360)
  assert again.fingerprint == tokenizer.fingerprint
  assert again.fingerprint == hashlib.sha256((tmp_path / "deep" / "again.model").read_bytes()).hexdigest()
  assert again.vocab_size == 360
  assert [p.name for p in (tmp_path / "deep").iterdir()] == ["again.model"]


def test_a_tokenizer_survives_pickling(tokenizer):
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.encode("red cat 12") == tokenizer.encode("red cat 12")
  assert copy.template == tokenizer.template


def test_texts_are_the_contents_of_all_messages(pairs):
  texts = list(read_texts(pairs))
  assert len(texts) == 3 * 61
  assert texts[2].endswith(" no")


@pytest.mark.parametrize(
  ("texts", "vocab_size", "message"),
  [([], 360, "no text to learn from"), (["red cat"], 5000, "too high"), (["red cat"], 100, "smaller")],
)
def test_impossible_training_says_why(tmp_path, texts, vocab_size, message):
  with pytest.raises(InputError, match=message):
    train_tokenizer(texts, tmp_path / "a.model", vocab_size)
  assert not list(tmp_path.iterdir())


def test_an_unreadable_tokenizer_is_named(tmp_path):
  (tmp_path / "a.model").write_bytes(b"garbage")
  (tmp_path / "empty.model").write_bytes(b"")
  for name, message in (
    ("a.model", "no SentencePiece model"),
    ("empty.model", "no SentencePiece"),
    ("b", "cannot be read"),
  ):
    with pytest.raises(InputError, match=rf"{name}: .*{message}"):
      load_tokenizer(tmp_path / name)
  with pytest.raises(InputError, match="no tokenizer is named"):
    load_tokenizer("")


def test_mistral_v3_loads_and_round_trips(real_data):
  tokenizer = load_tokenizer(f"{real_data}/tokenizers/mistral-v3.model")
  assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.stop_id) == (32768, 1, 2)
  for text in TEXTS:
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert not set(tokenizer.encode("[INST] a [/INST]</s>")) & set(range(771))
  hello, world = tokenizer.encode("hello"), tokenizer.encode("world")
  messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
  assert tokenizer.render(messages) == [1, 3, *hello, 4, *world, 2]
