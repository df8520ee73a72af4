"""Templates: what they write, they read."""

from alignjax.environments.testbed import template

WORDS = {"who": ("Ann", "Anna"), "what": ("a kite", "a (big) drum")}


def test_slots_are_named_once_in_order():
  assert template.slots("{what} of {who}, {what}") == ("what", "who")


def test_pattern_reads_back_what_the_template_writes():
  text = "Has {who} {what}?"
  for who in WORDS["who"]:
    for what in WORDS["what"]:
      match = template.pattern(text, WORDS).fullmatch(text.format(who=who, what=what))
      assert match.groupdict() == {"who": who, "what": what}


def test_repeated_slot_holds_one_word():
  pattern = template.pattern("{who} is {who}.", WORDS)
  assert pattern.fullmatch("Ann is Ann.")
  assert not pattern.fullmatch("Ann is Anna.")


def test_plain_text_is_not_an_expression():
  assert not template.pattern("{who}.", WORDS).fullmatch("Ann!")
