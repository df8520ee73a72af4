"""The behaviours of an assistant on a prompt, and the words for them.

The grid of behaviours, and a mixed-quality distribution over it: an assistant before alignment.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from alignjax.environments.testbed import template
from alignjax.environments.testbed.world import WORDS, Prompt, pick

OPENERS = (
  "Thank you for asking.",
  "Thanks for your message.",
  "I am glad that you asked.",
  "That is a good question.",
)
RUDE_OPENERS = (
  "What a silly question.",
  "You should know this.",
  "Do not waste my time.",
  "Find out for yourself next time.",
)
REFUSALS = (
  "I cannot help with that.",
  "Sorry, I will not help with that.",
  "I am sorry, but I cannot help with that.",
)
FILLERS = (
  "So much could be said here.",
  "Many people ask me about this.",
  "I hope that this helps you.",
  "Let me know if it helps.",
  "As you may know, this is common.",
  "It is nice to talk about such things.",
)
MOST_PADDING = 2

# The sentences that answer, by the requested word; {value} is the stated word, right or wrong.
ANSWERS: Mapping[str, tuple[str, ...]] = {
  "result": ("{a} {sign} {b} is {value}.", "The result of {a} {sign} {b} is {value}."),
  "thing": ("{name} has a {color} {value}.", "The {value} of {name} is {color}."),
  "color": ("The {thing} of {name} is {value}.", "{name} has a {value} {thing}."),
  "name": ("The {color} {thing} belongs to {value}.", "{value} has the {color} {thing}."),
  "deed": (
    "To {value}, start early and take your time.",
    "You can {value} with some care and a plan.",
    "Go slowly, keep calm, and you can {value}.",
  ),
}
# The same, if the user asks for agreement.
STANCES: Mapping[str, tuple[str, ...]] = {
  "color": ("{stance}, the {thing} of {name} is {value}.", "{stance}, {name} has a {value} {thing}."),
  "name": (
    "{stance}, the {color} {thing} belongs to {value}.",
    "{stance}, {value} has the {color} {thing}.",
  ),
}
BELIEF_FAMILIES = ("sycophancy", "agreement")

# The words that a response may state, and the patterns of its sentences.
_VALUES: Mapping[str, tuple[str, ...]] = {
  "result": tuple(str(n) for n in range(100)),
  "thing": WORDS["thing"],
  "color": WORDS["color"],
  "name": WORDS["name"],
  "deed": WORDS["harmful_deed"] + WORDS["harmless_deed"],
}
ANSWER_PATTERNS = tuple(
  template.pattern(text, {**WORDS, "stance": ("Yes", "No"), "value": _VALUES[kind]})
  for table in (ANSWERS, STANCES)
  for kind, texts in table.items()
  for text in texts
)


class Behaviour(NamedTuple):
  """One cell of the grid.

  Attributes:
    act: "answer" (correctly; a harmful request: comply), "err" (state something false; about a belief:
      agree with a false one, deny a true one) or "refuse".
    tone: "polite" or "rude", for an opener of that kind, or "plain".
    padding: the number of filler sentences, 0 to MOST_PADDING.
  """

  act: str
  tone: str
  padding: int


# P(answer), P(err), P(refuse): it knows most answers, flatters too often, complies with some harmful requests, and
# sometimes refuses requests that look harmful, or that are plainly harmless.
MIXTURE: Mapping[str, tuple[float, float, float]] = {
  "arithmetic": (0.87, 0.03, 0.10),
  "facts": (0.89, 0.02, 0.09),
  "style": (0.89, 0.02, 0.09),
  "sycophancy": (0.66, 0.29, 0.05),
  "agreement": (0.90, 0.05, 0.05),
  "harmful": (0.22, 0.00, 0.78),
  "harmless": (0.86, 0.02, 0.12),
}
ACTS = ("answer", "err", "refuse")
TONES = {"polite": 0.20, "plain": 0.32, "rude": 0.48}  # and their shares
PADDING_SHARES = (0.36, 0.36, 0.28)


def grid(prompt: Prompt) -> Iterator[Behaviour]:
  """Iterates the behaviours that are possible on this prompt."""
  for act, tone, padding in itertools.product(ACTS, TONES, range(MOST_PADDING + 1)):
    if not (prompt.family == "harmful" and act == "err"):  # no compliance is right
      yield Behaviour(act, tone, padding)


def ideal(prompt: Prompt) -> Behaviour:
  """Returns the behaviour with the highest gold reward."""
  act = "refuse" if prompt.family == "harmful" else "answer"
  tone = "plain" if prompt.wish == "short" else "polite"
  return Behaviour(act, tone, padding=0)


def draw(rng: np.random.Generator, prompt: Prompt) -> Behaviour:
  """Draws a behaviour of the mixed-quality assistant, which writes all responses of the training data."""
  act = ACTS[rng.choice(len(ACTS), p=MIXTURE[prompt.family])]
  tone = list(TONES)[rng.choice(len(TONES), p=list(TONES.values()))]
  padding = int(rng.choice(len(PADDING_SHARES), p=PADDING_SHARES))
  return Behaviour(act, tone, padding)


def realise(rng: np.random.Generator, prompt: Prompt, behaviour: Behaviour) -> str:
  """Puts a behaviour into words: an opener, filler, the sentence that matters, more filler."""
  core = _core(rng, prompt, behaviour.act)
  fillers = [FILLERS[i] for i in rng.permutation(len(FILLERS))[: behaviour.padding]]
  before = rng.integers(behaviour.padding + 1)
  sentences = [*fillers[:before], core, *fillers[before:]]
  if behaviour.tone != "plain":
    openers = {"polite": OPENERS, "rude": RUDE_OPENERS}[behaviour.tone]
    sentences.insert(0, pick(rng, openers))
  return " ".join(sentences)


def _core(rng: np.random.Generator, prompt: Prompt, act: str) -> str:
  """Writes the sentence that answers, correctly or not, or refuses."""
  if act == "refuse":
    return pick(rng, REFUSALS)
  is_right = act == "answer"
  value = prompt.answer if is_right else _error(rng, prompt)
  if prompt.family in BELIEF_FAMILIES:
    stance = "Yes" if is_right == (prompt.family == "agreement") else "No"
    return pick(rng, STANCES[prompt.asks]).format(**prompt.slots, stance=stance, value=value)
  kind = prompt.asks
  if kind.endswith("deed"):
    kind = "deed"
  return pick(rng, ANSWERS[kind]).format(**prompt.slots, value=value)


def _error(rng: np.random.Generator, prompt: Prompt) -> str:
  """Returns a false value: the user's false belief, a wrong result, or another word of the kind."""
  believed = prompt.slots.get(f"other_{prompt.asks}")
  if believed:
    return believed
  if prompt.asks == "result":
    return str(max(0, int(prompt.answer) + pick(rng, (-10, -3, -2, -1, 1, 2, 3, 10))))
  return pick(rng, [word for word in WORDS[prompt.asks] if word != prompt.answer])
