"""Small tokenizers as Hugging Face stores them, with chat templates written after those of known models."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = 'system user assistant tool hello world what is 2 + 2? it is 4.\n\nthe quick brown fox 12345 "name": {x}\n'
SPECIAL = (
  "<|endoftext|>",
  "<s>",
  "</s>",
  "<|im_start|>",
  "<|im_end|>",
  "<|start_header_id|>",
  "<|end_header_id|>",
  "<|eot_id|>",
  "<start_of_turn>",
  "<end_of_turn>",
  "[INST]",
  "[/INST]",
  "<|user|>",
  "<|assistant|>",
  "<|end|>",
)

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Says itself what the assistant writes, the end of the turn included.
GENERATION = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}
{{- message['content'] + '<|im_end|>\\n' }}
{%- endif %}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

LLAMA3 = """{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- else %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content + "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

# Takes the thoughts out of the turns before the last question.
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.found and message.role == "user" %}
        {%- set ns.found = true %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning_content) %}
            {{- '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' ' + message['content'] + eos_token }}{% else %}\
{{ raise_exception('Only user and assistant roles!') }}{% endif %}{% endfor %}"""

PHI3 = """{% for message in messages %}\
{{'<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# name: (template, kind of tokenizer, special tokens by name)
TEMPLATES = {
  "chatml": (CHATML, "bytes", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
  "generation": (GENERATION, "bytes", {"eos_token": "<|im_end|>"}),
  "llama3": (LLAMA3, "bytes", {"bos_token": "<s>", "eos_token": "<|eot_id|>"}),
  "gemma": (GEMMA, "first", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>"}),
  "qwen3": (QWEN3, "bytes", {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
  "mistral": (MISTRAL, "always", {"bos_token": "<s>", "eos_token": "</s>"}),
  "phi3": (PHI3, "prepend", {"bos_token": "<s>", "eos_token": "<|endoftext|>"}),
}


def train(kind):
  """A tokenizer of about 400 tokens: "bytes" as GPT-2's; the others have SentencePiece's space in front."""
  tokenizer = Tokenizer(models.BPE(byte_fallback=kind != "bytes", unk_token=None if kind == "bytes" else "<unk>"))
  alphabet, more = [], []
  if kind == "bytes":
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
  else:
    more = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    if kind == "prepend":
      tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
      tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    tokenizer.decoder = decoders.Sequence(
      [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
  trainer = trainers.BpeTrainer(vocab_size=360 + len(more), initial_alphabet=alphabet, show_progress=False)
  tokenizer.train_from_iterator(TEXT.splitlines(keepends=True) * 20, trainer)
  if more:
    plain = json.loads(tokenizer.to_str())  # bytes are pieces of the model, not added tokens
    pieces = dict.fromkeys([*more, *plain["model"]["vocab"]])
    plain["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer.from_str(json.dumps(plain))
  swallows = {"<|user|>", "<|assistant|>", "<|end|>"} if kind == "prepend" else set()
  tokenizer.add_special_tokens([AddedToken(t, normalized=False, rstrip=t in swallows) for t in SPECIAL])
  tokenizer.add_tokens(
    [AddedToken(t, normalized=False) for t in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
  )
  return tokenizer


def write(folder, name):
  """A folder with one of `TEMPLATES`, alternately as transformers 4 and as transformers 5 write it."""
  template, kind, named = TEMPLATES[name]
  folder.mkdir(parents=True, exist_ok=True)
  train(kind).save(str(folder / "tokenizer.json"))
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | named
  if list(TEMPLATES).index(name) % 2:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    as_object = lambda text: text and flags | {"__type": "AddedToken", "content": text}
    config |= {key: as_object(text) for key, text in named.items()} | {"chat_template": template, "add_bos_token": True}
  else:
    (folder / "chat_template.jinja").write_text(template)
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder
