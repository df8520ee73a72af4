"""The requests of the OpenAI wire as records, read strictly: a field that would be ignored is an error instead."""

import dataclasses
from typing import Annotated, Any

from alignjax.data import field as record_field
from alignjax.data.field import Dialogue, Tool
from alignjax.data.strict_json import described
from alignjax.errors import InputError
from alignjax.serving import grammar
from alignjax.serving.fields import Fields, RefusedError
from alignjax.system.ranges import LARGEST_WHOLE, Count, NonNegative, Range, Seed, ShareAboveZero, Whole

MOST_SAMPLES = 128  # of one prompt
MOST_STOPS = 16
MOST_TOP = 20
LARGEST_SCHEMA = 65536  # characters; the compiled ones are kept
_Samples = Annotated[int, Range(1, MOST_SAMPLES)]
_Top = Annotated[int, Range(0, MOST_TOP)]
_ID = Annotated[int, Range(0, LARGEST_WHOLE)]

# Fields of OpenAI's that ask for nothing with these values, or with null, and for something unknown here with others.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "frequency_penalty": (0, 0.0),
  "presence_penalty": (0, 0.0),
  "logit_bias": ({},),
}
_NEUTRAL_CHAT = _NEUTRAL | {
  "store": (False,),
  "service_tier": ("auto", "default"),
  "parallel_tool_calls": (True,),
  "modalities": (["text"],),
  "functions": ([],),
  "function_call": ("auto", "none"),
}
_LABELS = ("user", "safety_identifier", "prompt_cache_key")  # who asks: they are not about the completion


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a request's completions are sampled.

  Attributes:
    n: completions of each prompt.
    seed: of the noise; None: another one for each request.
    temperature, top_k, top_p: of the sampler.
    max_tokens: None: what is left of the context.
    stops: texts that end a completion.
    stream: whether pieces are sent as they come.
    usage: whether a stream ends with the number of tokens.
  """

  n: int
  seed: int | None
  temperature: float
  top_k: int
  top_p: float
  max_tokens: int | None
  stops: tuple[str, ...]
  stream: bool
  usage: bool


@dataclasses.dataclass(frozen=True)
class Chat:
  """A request to /v1/chat/completions.

  Attributes:
    model: its name.
    messages: the dialogue.
    tools: functions that the model may call.
    sampling: how the answers are sampled.
    logprobs: whether those of the answers' tokens are wanted.
    top_logprobs: the number of likeliest tokens beside each.
    schema: JSON schema as text, which the answers must fit; "": none.
  """

  model: str
  messages: Dialogue
  tools: tuple[Tool, ...]
  sampling: Sampling
  logprobs: bool
  top_logprobs: int
  schema: str


@dataclasses.dataclass(frozen=True)
class Completion:
  """A request to /v1/completions.

  Attributes:
    model: its name.
    prompts: each a text, or token ids.
    sampling: how the completions are sampled.
    logprobs: the number of likeliest tokens beside each token; None: no log-probs.
    echo: whether the prompt is a part of the answer, with its log-probs.
  """

  model: str
  prompts: tuple[str | tuple[int, ...], ...]
  sampling: Sampling
  logprobs: int | None
  echo: bool


@dataclasses.dataclass(frozen=True)
class Tokenize:
  """A request to /tokenize: a text, or messages.

  Attributes:
    model: its name; "": the first one.
    prompt: None if there are messages.
    messages: the dialogue.
    tools: of the dialogue.
    special: whether a text begins with the id of the beginning of a sequence.
    generation: whether messages end with the opening of the assistant's turn.
    texts: whether the tokens' texts are wanted.
  """

  model: str
  prompt: str | None
  messages: Dialogue
  tools: tuple[Tool, ...]
  special: bool
  generation: bool
  texts: bool


@dataclasses.dataclass(frozen=True)
class Detokenize:
  """A request to /detokenize: a model's name ("": the first one) and token ids."""

  model: str
  tokens: tuple[int, ...]


def chat(fields: Fields) -> Chat:
  """Reads a request to /v1/chat/completions; raises RefusedError that names the field at fault."""
  model = fields.required_text("model")
  messages = fields.read("messages", read_messages, [])
  if not messages:
    raise RefusedError("field 'messages' is missing; give at least one message", "messages")
  tools = fields.read("tools", _tools, ())
  choice = fields.raw("tool_choice")
  if choice == "none":
    tools = ()
  elif choice not in (None, "auto"):
    raise RefusedError("field 'tool_choice' must be 'auto' or 'none': no call can be forced here", "tool_choice")
  schema = fields.read("response_format", _format, "")
  most = fields.number("max_tokens", Count, None)
  newer = fields.number("max_completion_tokens", Count, None)
  if most is not None and newer is not None and most != newer:
    raise RefusedError("fields 'max_tokens' and 'max_completion_tokens' differ; give one", "max_completion_tokens")
  sampling = _sampling(fields, newer or most)
  logprobs = fields.flag("logprobs")
  top = fields.number("top_logprobs", _Top, 0)
  if top and not logprobs:
    raise RefusedError("field 'top_logprobs' needs 'logprobs': true", "top_logprobs")
  fields.neutral(_NEUTRAL_CHAT)
  _labels(fields)
  fields.done()
  return Chat(model, messages, tools, sampling, logprobs, top, schema)


def completion(fields: Fields) -> Completion:
  """Reads a request to /v1/completions; raises RefusedError that names the field at fault."""
  model = fields.required_text("model")
  prompts = fields.read("prompt", _prompts, ())
  if not prompts:
    raise RefusedError("field 'prompt' is missing; give a text, token ids, or a list of either", "prompt")
  echo = fields.flag("echo")
  sampling = _sampling(fields, fields.number("max_tokens", Whole, 16))
  if sampling.max_tokens == 0 and not echo:
    raise RefusedError("field 'max_tokens' is 0; without 'echo' there is nothing to answer", "max_tokens")
  logprobs = fields.number("logprobs", _Top, None)
  best_of = fields.number("best_of", _Samples, None)
  if best_of is not None and best_of != sampling.n:
    raise RefusedError("field 'best_of' is not supported unless it is 'n'; leave it out", "best_of")
  if echo and sampling.stream:
    raise RefusedError("field 'echo' is not supported in a stream; leave one of them out", "echo")
  fields.neutral(_NEUTRAL | {"suffix": ("",)})
  _labels(fields)
  fields.done()
  return Completion(model, prompts, sampling, logprobs, echo)


def tokenize(fields: Fields) -> Tokenize:
  """Reads a request to /tokenize; raises RefusedError that names the field at fault."""
  model = fields.text("model")
  prompt = fields.read("prompt", record_field.text, None)
  messages = fields.read("messages", read_messages, [])
  if (prompt is None) == (not messages):
    raise RefusedError("give one of the fields 'prompt' and 'messages'", "prompt")
  request = Tokenize(
    model,
    prompt,
    messages,
    tools=fields.read("tools", _tools, ()),
    special=fields.flag("add_special_tokens", True),
    generation=fields.flag("add_generation_prompt", True),
    texts=fields.flag("return_token_strs"),
  )
  fields.done()
  return request


def detokenize(fields: Fields) -> Detokenize:
  """Reads a request to /detokenize; raises RefusedError that names the field at fault."""
  request = Detokenize(fields.text("model"), fields.read("tokens", _ids, ()))
  fields.done()
  return request


def _sampling(fields: Fields, max_tokens: int | None) -> Sampling:
  """Reads the fields that both kinds of completions have."""
  stream = fields.flag("stream")
  usage = fields.read("stream_options", _usage, None)
  if usage is not None and not stream:
    raise RefusedError("field 'stream_options' needs 'stream': true", "stream_options")
  return Sampling(
    n=fields.number("n", _Samples, 1),
    seed=fields.number("seed", Seed, None),
    temperature=fields.number("temperature", NonNegative, 1.0),
    top_k=fields.number("top_k", Whole, 0),
    top_p=fields.number("top_p", ShareAboveZero, 1.0),
    max_tokens=max_tokens,
    stops=fields.read("stop", _stops, ()),
    stream=stream,
    usage=bool(usage),
  )


def _labels(fields: Fields) -> None:
  """Takes the fields that say who asks."""
  for name in _LABELS:
    fields.text(name)
  fields.read("metadata", lambda value, path: Fields(value, path), None)


def _usage(value: Any, path: str) -> bool:
  fields = Fields(value, path)
  usage = fields.flag("include_usage")
  fields.neutral({"include_obfuscation": (False,)})
  fields.done()
  return usage


def _format(value: Any, path: str) -> str:
  """Reads the form of an answer as a JSON schema; "" for a text."""
  fields = Fields(value, path)
  kind = fields.required_text("type")
  schema = ""
  if kind == "json_object":
    schema = grammar.text_of({"type": "object"})
  elif kind == "json_schema":
    named = Fields(fields.raw("json_schema"), fields.path("json_schema"))
    named.text("name")
    named.text("description")
    named.flag("strict")
    given = named.raw("schema")
    if not isinstance(given, dict):
      raise RefusedError(f"field '{named.path('schema')}' must be an object", named.path("schema"))
    named.done()
    schema = grammar.text_of(given)
  elif kind != "text":
    raise RefusedError(f"field '{path}.type' is {kind!r}; use text, json_object or json_schema", f"{path}.type")
  if len(schema) > LARGEST_SCHEMA:
    raise RefusedError(f"field '{path}' has a schema of more than {LARGEST_SCHEMA} characters; make it smaller", path)
  fields.done()
  return schema


def _stops(value: Any, path: str) -> tuple[str, ...]:
  if isinstance(value, str):
    value = [value]
  if not isinstance(value, list) or len(value) > MOST_STOPS:
    raise InputError(f"field '{path}' must be a text, or a list of at most {MOST_STOPS}")
  stops = tuple(record_field.text(stop, f"{path}[{place}]") for place, stop in enumerate(value))
  if "" in stops:
    raise InputError(f"field '{path}' has an empty text, which every completion begins with; leave it out")
  return stops


def _ids(value: Any, path: str) -> tuple[int, ...]:
  if not isinstance(value, list):
    raise InputError(f"field '{path}' is {described(value)}; it must be a list of token ids")
  for place, number in enumerate(value):
    if type(number) is not int or not 0 <= number <= LARGEST_WHOLE:
      raise InputError(f"field '{path}[{place}]' is no token id; give a whole number from 0")
  return tuple(value)


def _prompts(value: Any, path: str) -> tuple[str | tuple[int, ...], ...]:
  if isinstance(value, str):
    return (record_field.text(value, path),)
  if not isinstance(value, list) or not value:
    raise InputError(f"field '{path}' must be a text, token ids, or a list of either that is not empty")
  if isinstance(value[0], int):
    return (_ids(value, path),)
  prompts: list[str | tuple[int, ...]] = []
  for place, prompt in enumerate(value):
    name = f"{path}[{place}]"
    if isinstance(prompt, str):
      prompts.append(record_field.text(prompt, name))
    else:
      prompts.append(_ids(prompt, name))
  return tuple(prompts)


def _tools(value: Any, path: str) -> tuple[Tool, ...]:
  return record_field.tools({path: value})


_READ = tuple(dict.fromkeys(("role", "content", *(name for names in record_field.EXTRAS.values() for name in names))))
_EMPTY_OF_ANSWERS = ("refusal", "audio", "annotations", "function_call")  # clients send an answer back as it came


def read_messages(value: Any, path: str) -> Dialogue:
  """Reads messages; contents may be lists of texts, and "developer" is the system's newer name."""
  if not isinstance(value, list):
    raise InputError(f"field '{path}' is {described(value)}; it must be a list of messages")
  messages = []
  for place, message in enumerate(value):
    fields = Fields(message, f"{path}[{place}]")
    read = {name: given for name in _READ if (given := fields.raw(name)) is not None}
    fields.neutral(dict.fromkeys(_EMPTY_OF_ANSWERS, ([],)))
    fields.done()
    role = read.get("role")
    if role == "developer":
      read["role"] = "system"
    allowed: tuple[str, ...] = ("role", "content")
    if isinstance(role, str):
      allowed += record_field.EXTRAS.get(role, ())
    if extras := read.keys() - {*allowed}:
      name = fields.path(min(extras))
      raise RefusedError(f"field '{name}' is not supported in a message of the role {role!r}; leave it out", name)
    if "content" in read:
      read["content"] = _content(read["content"], fields.path("content"))
    messages.append(read)
  dialogue = record_field.as_dialogue(messages, path)
  if dialogue and not any(message["content"].strip() or message.get("tool_calls") for message in dialogue):
    raise InputError(f"field '{path}' is empty; write something")
  return dialogue


def _content(value: Any, path: str) -> Any:
  """Joins a content in parts, all of which must be texts."""
  if not isinstance(value, list):
    return value
  texts = []
  for place, part in enumerate(value):
    fields = Fields(part, f"{path}[{place}]")
    kind = fields.required_text("type")
    if kind != "text":
      raise RefusedError(f"field '{fields.path('type')}' is {kind!r}; contents are texts here", fields.path("type"))
    texts.append(fields.text("text"))
    fields.done()
  return "".join(texts)
