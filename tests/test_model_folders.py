"""Folders of models that somebody else made: what is malformed in one is a line that names file and field, and nothing
outside of it is read.
"""

import json
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from alignjax.commands import export
from alignjax.data import load_tokenizer
from alignjax.errors import InputError
from alignjax.model import decoder
from alignjax.model.huggingface import tensor_file, weights
from alignjax.system import hub, sharding
from tests import chat_templates

SAVED = Path(__file__).parent / "model" / "huggingface" / "families"
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5000


def one_line(call):
  """The message of the InputError that a call raises: one short line."""
  with pytest.raises(InputError) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  assert len(message) < 600
  return message


# --- config.json -----------------------------------------------------------------------------------------------------


def config_of(family="llama", **changed):
  raw = json.loads((SAVED / family / "config.json").read_text()) | changed
  return {name: value for name, value in raw.items() if value is not ...}


ROPES = ({"rope_type": 5}, {}, {"factor": None}, {"factor": 0}, {"factor": float("nan")})
FULLS = (None, 5, {"rope_theta": "x"})
WRONG_FIELDS = [
  ("llama", name, value)
  for name, values in {
    "vocab_size": [512.5, 512.0, 0, -1, "512", None, True, 10**400, float("nan")],
    "num_hidden_layers": [0, -2, 1e3, 10**12, [2]],
    "hidden_size": [-16, 0, "16", 2**70],
    "intermediate_size": [None, -1, 24.5],
    "num_attention_heads": [0, -4, 3, 7.0],
    "num_key_value_heads": [3, -2, 0, "2"],
    "head_dim": [7, -8, 1, 8.5, {}],
    "rms_norm_eps": [float("nan"), float("inf"), -1e-6, 0, "1e-6", None],
    "max_position_embeddings": [-1, 0, 2048.5],
    "hidden_act": [None, 5, "relu"],
    "architectures": ["LlamaForCausalLM", [5], {"a": 1}],
    "tie_word_embeddings": ["true", 1],
    "attention_bias": ["no"],
    "model_type": [None, 5, ["llama"], "x" * 100_000, ...],
    "pretraining_tp": [2, [1], "1"],
    "rope_scaling": [[], "linear", *({"rope_type": "linear"} | more for more in ROPES)],
    "rope_parameters": [5, {"rope_theta": None}, {"rope_theta": -1.0}, *({"full_attention": x} for x in FULLS)],
  }.items()
  for value in values
] + [
  ("qwen2", "max_window_layers", -1),
  ("gemma2", "query_pre_attn_scalar", 0),
  ("gemma2", "query_pre_attn_scalar", -256),
  ("gemma2", "attn_logit_softcapping", -50.0),
  ("gemma2", "layer_types", "full_attention"),
  ("gemma2", "layer_types", ["chunked_attention", "full_attention"]),
  ("gemma2", "layer_types", ["full_attention"] * 5),
  ("gemma2", "sliding_window", -4),
  ("gemma3", "sliding_window_pattern", 0),
  ("llama_reward", "id2label", [1]),
  ("llama_reward", "id2label", {"0": 1, "1": None}),
]


@pytest.mark.parametrize(("family", "name", "value"), WRONG_FIELDS, ids=lambda x: str(x)[:24])
def test_a_field_of_config_json_that_holds_what_it_may_not_is_named(tmp_path, family, name, value):
  if name == "sliding_window_pattern":
    changed = {name: value, "layer_types": ...}
  elif name in ("rope_scaling", "rope_theta"):
    changed = {name: value, "rope_parameters": ...}
  else:
    changed = {name: value}
  (tmp_path / "config.json").write_text(json.dumps(config_of(family, **changed)))
  message = one_line(lambda: weights.read_config(str(tmp_path)))
  assert message.startswith(f"{tmp_path / 'config.json'}: ")
  ours = {"num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "hidden_act": "activation"}
  assert any(word in message for word in (name, ours.get(name, name), "rope_type", "factor"))


@pytest.mark.parametrize("value", [None, -1.0, 0, "10000", [], float("inf")])
def test_a_base_of_rotary_positions_is_a_positive_number(tmp_path, value):
  (tmp_path / "config.json").write_text(json.dumps(config_of(rope_theta=value, rope_parameters=...)))
  assert "rope_theta" in one_line(lambda: weights.read_config(str(tmp_path)))


BROKEN_JSON = {
  "deep": DEEP,
  "deep in an object": f'{{"model_type": {DEEP}}}',
  "a long integer": f'{{"model_type": "llama", "vocab_size": {LONG}}}',
  "a list": '["model_type"]',
  "a number": "5",
  "null": "null",
  "a text": '"model_type"',
  "cut off": '{"model_type": "lla',
  "nothing": "",
  "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("text", BROKEN_JSON.values(), ids=BROKEN_JSON)
@pytest.mark.parametrize("name", [hub.CONFIG, hub.INDEX])
def test_a_json_file_that_is_none_is_named(tmp_path, name, text):
  folder = Path(shutil.copytree(SAVED / "llama", tmp_path / "llama"))
  (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
  read = weights.read_config if name == hub.CONFIG else weights.read_tensors
  assert one_line(lambda: read(str(folder))).startswith(str(folder / name))
  assert hub.is_folder(folder)  # so that what opens the folder says what is wrong with it


def test_a_file_that_is_too_long_to_be_one_is_not_read(tmp_path):
  with (tmp_path / "config.json").open("wb") as file:
    file.truncate(hub.LARGEST + 1)
  assert "config.json: holds" in one_line(lambda: weights.read_config(str(tmp_path)))


# --- model.safetensors -----------------------------------------------------------------------------------------------


def write_header(path, header, data=b"\0" * 16, length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
  return epath.Path(path)


def row(**changed):
  return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changed


WHOLE = {"a": row(), "b": row(data_offsets=[8, 16])}
WRONG_HEADERS = {
  "a row is a list": {"a": [1]},
  "a row is null": {"a": None},
  "a row is a text": {"a": "F32"},
  "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
  "dtype is a list": {"a": row(dtype=["F32"])},
  "dtype is unknown": {"a": row(dtype="F" * 10_000)},
  "shape is a number": {"a": row(shape=2)},
  "shape is null": {"a": row(shape=None)},
  "shape holds texts": {"a": row(shape=["2"])},
  "shape holds a half": {"a": row(shape=[1.5])},
  "shape is negative": {"a": row(shape=[-2])},
  "shape is twice negative": {"a": row(shape=[-1, -2])},
  "shape holds true": {"a": row(shape=[True, 2])},
  "shape is huge": {"a": row(shape=[10**300])},
  "shape is long": {"a": row(shape=[1] * 100_000)},
  "offsets are null": {"a": row(data_offsets=None)},
  "offsets are three": {"a": row(data_offsets=[0, 8, 16])},
  "offsets are texts": {"a": row(data_offsets=["0", "8"])},
  "offsets are floats": {"a": row(data_offsets=[0.0, 8.0])},
  "offsets are a text": {"a": row(data_offsets="08")},
  "offsets are turned round": {"a": row(data_offsets=[8, 0])},
  "offsets lie before the file": {"a": row(data_offsets=[-8, 0])},
  "offsets lie in the header": {"a": row(data_offsets=[-80, -72]), "b": row()},
  "offsets lie behind the file": {"a": row(data_offsets=[80, 88])},
  "tensors overlap": {"a": row(), "b": row(data_offsets=[4, 12])},
  "two tensors are one": {"a": row(), "b": row()},
  "a gap between tensors": {"a": row(), "b": row(shape=[1], data_offsets=[12, 16])},
  "bytes behind the last": {"a": row()},
  "a size of another shape": {"a": row(shape=[3])},
  "a list": [1, 2],
  "a number": 5,
  "deep": DEEP.encode(),
  "a long integer": f'{{"a": {LONG}}}'.encode(),
  "no text": b"\xff\xfe\x00\x01",
  "no JSON": b"{'a': 1}",
}


@pytest.mark.parametrize("header", WRONG_HEADERS.values(), ids=WRONG_HEADERS)
def test_a_header_that_says_nothing_sound_is_one_line(tmp_path, header):
  path = write_header(tmp_path / "model.safetensors", header)
  assert str(path) in one_line(lambda: tensor_file.read_header(path))


@pytest.mark.parametrize("length", [0, 2**63, 2**64 - 1, 10**8 + 1, 10_000])
def test_a_header_longer_than_its_file_is_not_read(tmp_path, length):
  path = write_header(tmp_path / "model.safetensors", WHOLE, length=length)
  assert "safetensors" in one_line(lambda: tensor_file.read_header(path))


def test_a_sound_header_is_read_and_a_tensor_may_be_empty(tmp_path):
  empty = {"c": row(shape=[0, 4], data_offsets=[8, 8])}
  found = tensor_file.read_header(write_header(tmp_path / "model.safetensors", WHOLE | empty | {"__metadata__": {}}))
  assert {name: tensor.shape for name, tensor in found.items()} == {"a": (2,), "b": (2,), "c": (0, 4)}
  tensors = {"x": np.arange(3, dtype=np.float32), "y": np.ones((2, 2), np.float16), "z": np.zeros((0, 3), np.float64)}
  save_file(tensors, tmp_path / "theirs.safetensors")
  for name, tensor in tensor_file.read_header(epath.Path(tmp_path / "theirs.safetensors")).items():
    np.testing.assert_array_equal(tensor_file.read(tensor).reshape(tensor.shape), tensors[name])


# --- the index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "places", [None, [], {}, "model.safetensors", 5, {"a": None}, {"a": 5}, {"a": ["x"]}, {"a": ""}]
)
def test_an_index_that_names_no_files_is_one_line(tmp_path, places):
  folder = Path(shutil.copytree(SAVED / "llama", tmp_path / "llama"))
  (folder / hub.INDEX).write_text(json.dumps({"weight_map": places}))
  message = one_line(lambda: weights.read_tensors(str(folder)))
  assert "index.json: weight_map" in message


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/{}/other/model.safetensors", "..", "a\0b", "x\\y"])
def test_an_index_reads_no_file_outside_of_its_folder(tmp_path, name):
  folder = Path(shutil.copytree(SAVED / "llama", tmp_path / "llama"))
  shutil.copytree(SAVED / "llama", tmp_path / "other")
  name = name.replace("{}", str(tmp_path).strip("/"))
  tensors = tensor_file.read_header(epath.Path(folder / hub.WEIGHTS))
  (folder / hub.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
  assert "a file beside it" in one_line(lambda: weights.read_tensors(str(folder)))


# --- the tokenizer ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
  return chat_templates.write(tmp_path_factory.mktemp("tokenizer") / "chatml", "chatml")


WRONG_TOKENIZERS = {
  "tokenizer_config.json": [
    {"added_tokens_decoder": {"one": {"content": "<x>"}}},
    {"added_tokens_decoder": {"-1": {"content": "<x>"}}},
    {"added_tokens_decoder": {"1.5": {"content": "<x>"}}},
    {"added_tokens_decoder": {"1_0": {"content": "<x>"}}},
    {"added_tokens_decoder": {LONG: {"content": "<x>"}}},
    {"added_tokens_decoder": {"9999999999": {"content": "<x>"}}},
    {"added_tokens_decoder": {"": {"content": "<x>"}}},
    {"added_tokens_decoder": {"1": None}},
    {"added_tokens_decoder": {"1": {"content": 5}}},
    {"added_tokens_decoder": {"1": {"special": True}}},
    {"added_tokens_decoder": {"1": {"content": "<x>", "special": "yes"}}},
    {"added_tokens_decoder": [1]},
    {"additional_special_tokens": 5},
    {"extra_special_tokens": "<x>"},
    {"chat_template": 5, "is": "no file"},
    {"chat_template": {"default": "x"}, "is": "no file"},
    {"chat_template": [5], "is": "no file"},
    {"chat_template": [{"template": "x"}], "is": "no file"},
    {"chat_template": [{"name": "default"}], "is": "no file"},
    {"chat_template": [{"name": "default", "template": 5}], "is": "no file"},
    {"bos_token": "<nowhere>"},
  ],
  "special_tokens_map.json": [{"additional_special_tokens": 5}],
  "generation_config.json": [
    {"bos_token_id": "1"},
    {"bos_token_id": [1.5]},
    {"pad_token_id": -2},
    {"pad_token_id": {}},
    {"pad_token_id": True},
    {"pad_token_id": 2**40},
  ],
  "tokenizer.json": [
    {},
    {"model": None},
    {"model": {"type": "BPE", "vocab": {}, "merges": []}},
    {"model": {"type": "BPE", "vocab": {"a": 4_000_000_000}, "merges": []}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}},
    {"model": {"type": "Unigram", "vocab": []}},
  ],
}


@pytest.mark.parametrize(
  ("name", "content"),
  [(name, content) for name, contents in WRONG_TOKENIZERS.items() for content in contents]
  + [(name, text) for name in ("tokenizer_config.json", "tokenizer.json") for text in BROKEN_JSON.values()],
  ids=lambda x: str(x)[:48] if isinstance(x, str | dict) else "bytes",
)
def test_a_tokenizer_that_is_malformed_is_one_line(tmp_path, tokenizer_folder, name, content):
  folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))
  if isinstance(content, dict) and "is" in content:
    (folder / "chat_template.jinja").unlink()
  if isinstance(content, dict):
    content = json.dumps(content)
  (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  if name == "generation_config.json":
    (folder / "tokenizer_config.json").write_text("{}")
  assert str(folder) in one_line(lambda: load_tokenizer(folder))


def test_minus_one_says_that_there_is_no_such_token(tmp_path, tokenizer_folder):
  folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))
  (folder / "tokenizer_config.json").write_text("{}")
  (folder / "generation_config.json").write_text('{"bos_token_id": -1, "pad_token_id": -1}')
  tokenizer = load_tokenizer(folder)
  assert tokenizer.bos_id == -1
  assert tokenizer.pad_id == tokenizer.eos_id


def test_merges_that_a_file_would_leave_out_at_random_are_not(tmp_path, tokenizer_folder):
  folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))
  content = json.loads((folder / "tokenizer.json").read_text())
  content["model"]["dropout"] = 0.5
  (folder / "tokenizer.json").write_text(json.dumps(content))
  text = chat_templates.TEXT
  assert load_tokenizer(folder).encode(text) == load_tokenizer(tokenizer_folder).encode(text)


# --- links -----------------------------------------------------------------------------------------------------------


LINKED = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def whole_folder(tmp_path, tokenizer_folder):
  """Weights and a tokenizer."""
  folder = Path(shutil.copytree(SAVED / "llama", tmp_path / "model"))
  shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
  return folder


@pytest.mark.parametrize("name", LINKED)
def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path, whole_folder, name):
  secret = tmp_path / "elsewhere" / name
  secret.parent.mkdir()
  (whole_folder / name).rename(secret)
  (whole_folder / name).symlink_to(secret)
  read = (
    (lambda: weights.read_config(str(whole_folder))) if name == hub.CONFIG else lambda: load_tokenizer(whole_folder)
  )
  assert "is a link to" in one_line(read)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_export_copies_no_file_from_outside(tmp_path, whole_folder, name):
  tokenizer = load_tokenizer(whole_folder)
  (tmp_path / "secret").write_text("of somebody else")
  (whole_folder / name).unlink()
  (whole_folder / name).symlink_to(tmp_path / "secret")
  out = epath.Path(tmp_path / "out")
  out.mkdir()
  assert "is a link to" in one_line(lambda: export._write_tokenizer(out, tokenizer, str(whole_folder)))
  assert not list(tmp_path.glob("out/*"))


def test_links_of_the_hub_s_cache_and_within_a_folder_are_followed(tmp_path, whole_folder):
  repository = tmp_path / "models--someone--model"
  snapshot = repository / "snapshots" / "0123abc"
  blobs = repository / "blobs"
  snapshot.mkdir(parents=True)
  blobs.mkdir()
  for number, path in enumerate(sorted(whole_folder.iterdir())):
    shutil.copy(path, blobs / f"{number:040}")
    (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040}")
  config = weights.read_config(str(snapshot))
  assert config == weights.read_config(str(whole_folder))
  model = decoder.make(config)
  weights.load(str(snapshot), model, model.abstract(sharding.make_mesh(devices=jax.devices()[:1])))
  assert load_tokenizer(snapshot).fingerprint == load_tokenizer(whole_folder).fingerprint
  (tmp_path / "alias").symlink_to(whole_folder)  # the folder itself is the user's to name
  load_tokenizer(tmp_path / "alias")
  (whole_folder / "chat_template.jinja").rename(whole_folder / "template.txt")
  (whole_folder / "chat_template.jinja").symlink_to("template.txt")
  load_tokenizer(whole_folder)
