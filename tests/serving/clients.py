"""A client of `alignjax serve` with the openai package, for another environment: python clients.py URL; prints JSON."""

import json
import sys

import openai

HI = [{"role": "user", "content": "Hi"}]


def main(url: str) -> None:
  client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
  options = {"model": "tiny", "messages": HI, "seed": 3, "max_tokens": 8}
  whole = client.chat.completions.create(**options, n=2, logprobs=True, top_logprobs=1)
  streamed = ""
  usage = None
  for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
    usage = chunk.usage or usage
    streamed += "".join(choice.delta.content or "" for choice in chunk.choices)
  completed = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, seed=1, echo=True, logprobs=2)
  errors = {}
  for name, fields in {"field": {"frequency_penalty": 1.0}, "model": {"model": "none"}}.items():
    try:
      client.chat.completions.create(**options | fields)
    except openai.APIStatusError as error:
      errors[name] = [type(error).__name__, error.param]
  print(
    json.dumps(
      {
        "models": [model.id for model in client.models.list()],
        "texts": [choice.message.content for choice in whole.choices],
        "scored": [len(choice.logprobs.content) for choice in whole.choices],
        "streamed": streamed,
        "usage": usage.completion_tokens,
        "completed": [choice.text for choice in completed.choices],
        "errors": errors,
      }
    )
  )


if __name__ == "__main__":
  main(sys.argv[1])
