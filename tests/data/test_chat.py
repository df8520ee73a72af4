import pytest

from alignjax.data import chat
from alignjax.errors import InputError

MISTRAL = chat.find_template({"<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4})
ENCODE = lambda text: [100 + ord(c) for c in text]


def turn(role, content):
  return {"role": role, "content": content}


DIALOGUE = [
  turn("system", "s"),
  turn("user", "ab"),
  turn("assistant", "cd"),
  turn("user", "e"),
  turn("assistant", "f"),
]


@pytest.fixture(params=["alignjax", "mistral-v3"])
def template(request, tokenizer):
  return tokenizer.template if request.param == "alignjax" else MISTRAL


@pytest.mark.parametrize("first", [2, 4])
def test_prompt_and_completion_concatenate_to_the_dialogue(template, first):
  prompt = chat.render(template, ENCODE, DIALOGUE[:first], add_generation_prompt=True)
  ids, mask = chat.complete(template, ENCODE, DIALOGUE[first:])
  assert prompt + ids == chat.render(template, ENCODE, DIALOGUE)
  assert len(ids) == len(mask)


def test_the_loss_is_on_each_assistant_content_and_its_end_and_on_nothing_else(template):
  ids, mask = chat.complete(template, ENCODE, DIALOGUE[2:])
  stop = template.stop_id
  assert [i for i, m in zip(ids, mask, strict=True) if m] == [*ENCODE("cd"), stop, *ENCODE("f"), stop]


def test_native_rendering(tokenizer):
  system, user, assistant, end = (
    tokenizer.processor.piece_to_id(f"<|{x}|>") for x in ("system", "user", "assistant", "end")
  )
  ids = chat.render(tokenizer.template, ENCODE, DIALOGUE[:2], add_generation_prompt=True)
  assert ids == [1, system, *ENCODE("s"), end, user, *ENCODE("ab"), end, assistant]


def test_mistral_writes_the_system_text_into_the_next_user_turn():
  ids = chat.render(MISTRAL, ENCODE, DIALOGUE)
  assert ids == [1, 3, *ENCODE("s\n\nab"), 4, *ENCODE("cd"), 2, 3, *ENCODE("e"), 4, *ENCODE("f"), 2]
  for messages in ([turn("system", "s")], [turn("system", "s"), turn("assistant", "a")]):
    with pytest.raises(InputError, match="no user message"):
      chat.render(MISTRAL, ENCODE, messages)


def test_a_tokenizer_without_known_markers_has_no_template():
  assert chat.find_template({"<s>": 1, "</s>": 2}) is None


def test_our_templates_refuse_tools_and_what_they_return(tokenizer):
  call, result = {"role": "assistant", "content": "", "tool_calls": [{}]}, {"role": "tool", "content": "4"}
  for messages in ([call], [turn("user", "a"), result]):
    with pytest.raises(InputError, match="no place for tool calls"):
      tokenizer.render(messages)
  for write in (tokenizer.render, lambda m, tools: tokenizer.complete(m, [turn("assistant", "b")], tools)):
    with pytest.raises(InputError, match="'alignjax' has no place for tools"):
      write([turn("user", "a")], tools=[{"name": "f"}])
