"""Prompts that ask a language model for one phenomenon each, with a right and a wrong continuation.

A prompt is cut from a story of TinyTales just where a template carries a mark (^name in words.py).
The words that make it a test are a held-out pair, which no story has: subject and attractor, the
two names, frame and animal, neighbours in a list.
"""
import random
from typing import NamedTuple

from tinytales.story import (CAP, DIST, ID, NUMBERS, PRONOUNS, PROP, TOPIC_WORDS, TOPICS,
                             VERB_FORMS, VOCAB, Story, article, cap, held, tok, usable)


class Prompt(NamedTuple):
    """A question with its answers: a model is right if, after `ids`, the likeliest token of `right`
    is likelier than the likeliest of `wrong`."""
    ids: list[int]
    right: list[int]
    wrong: list[int]


# name: (the mark in the templates, the families that carry it)
PHENOMENA = {
    "agreement": ("agr", ["agreement"]),
    "pronoun": ("pro", ["because", "feeling"]),
    "article": ("art", ["article"]),
    "tense": ("tense", ["motion"]),
    "quotes": ("quote", ["talk", "saying"]),
    "indirect object": ("ioi", ["giving"]),
    "induction": ("ind", ["list_again", "rhyme_again"]),
    "facts": ("fact", ["creature_fact"]),
    "counting": ("cnt", ["counting"]),
    "negation": ("neg", ["negation"]),
    "topic": ("topic", ["describe", "perception"]),
}
# What is said again has to be said before: (the family that says it, its first register).
FIRST_SAID = {"list_again": ("list", "L1"), "rhyme_again": ("rhyme", "S1")}
SUBJECT = [tok(subject) for subject, *_ in PRONOUNS]


def prompts(n=200, seed=0):
    """Make n distinct prompts for each phenomenon: {phenomenon: [Prompt]}."""
    return {name: make(name, n, random.Random(f"{seed} {name}")) for name in PHENOMENA}


def make(name, n, rng):
    """Make n distinct prompts for one phenomenon."""
    mark, families = PHENOMENA[name]
    made = {}
    while len(made) < n:
        # A new story each time, which must have what the family needs.
        story = Story(rng, marks=True)
        family = families[int(rng.random() * len(families))]
        first, register = FIRST_SAID.get(family, (None, "P"))
        if register not in story.reg or family == "creature_fact" and not held_out_facts(story):
            continue

        # A few sentences that lead there; only the last may be cut.
        lead = ["opening", "setting", "meeting"]
        if first:
            lead += [first, "weather"]
        for step in [*lead, family]:
            story.cuts.clear()
            story.tell(step)
        prompt = first_prompt(story, mark)
        if prompt and prompt.right and prompt.wrong and not set(prompt.right) & set(prompt.wrong):
            made[tuple(prompt.ids)] = prompt
    return list(made.values())


def held_out_facts(story):
    """Which templates tell a fact about the story's animal that is held out?"""
    return usable("creature_fact", story.kind, story.past, story.reg["A"][0], True)


def first_prompt(story, mark):
    """Cut the story at the first place that carries a mark. None if there is none, or if the words
    in question are not held out."""
    for at, name, registers, op in story.cuts:
        if name == mark:
            return Cut(story, at, registers, op).prompt(mark)
    return None


class Cut:
    """A place in a story where a prompt may end, and what would come next."""

    def __init__(self, story, at, registers, op):
        self.story = story
        self.at = at                            # position of the next token
        self.op = op                            # the operation that says it
        self.said = story.ids[at]
        self.word = {register: tokens[-1] for register, tokens in registers.items()}
        self.names = (self.word["P"], self.word["C"])

    def prompt(self, mark):
        """Make the prompt that a mark asks for, by the method of its name. None if the words in
        question are not held out."""
        return getattr(self, "ask_" + mark)()

    def ask(self, pair, wrong):
        """Is what is said likelier than the words `wrong`? Only if a pair of words is held out."""
        if not held(*pair):
            return None
        return Prompt(self.story.ids[:self.at], [self.said], [i for i in wrong if i != self.said])

    def said_in_lower_case(self):
        return ID[VOCAB[self.said].lower()]

    def wrong_forms(self, kind):
        """Which forms of the verb that is said are wrong in number ("agr") or in tense?"""
        return [tok(form) for form in VERB_FORMS[VOCAB[self.said]][kind]]

    def ask_agr(self):
        """The dog near the trees -> runs, not run"""
        return self.ask((self.word["s"], self.word["t"]), self.wrong_forms("agr"))

    def ask_tense(self):
        """In a story of the past -> hopped, not hops"""
        return self.ask(self.names, self.wrong_forms("tense"))

    def ask_pro(self):
        """Tom is happy because -> he, not she"""
        return self.ask(self.names, SUBJECT)

    def ask_quote(self):
        """Where a quote has to close, does another open?"""
        return self.ask(self.names, [ID["“"]])

    def ask_ioi(self):
        """Which of two names receives?"""
        return self.ask(self.names, self.names)

    def ask_neg(self):
        """What is denied is not what is said."""
        return self.ask((self.word["n"], self.word["x"]), [self.word["x"]])

    def ask_ind(self):
        """L1 , L2 , .. said again: what followed the last word?"""
        letter, number = self.op.name
        before = self.word[letter + str(int(number) - 1)]
        words = DIST[self.story.topic]["food" if letter == "L" else "nonsense"]
        return self.ask((before, self.said), words.ids)

    def ask_fact(self):
        """The cow says -> moo, not what any other animal says. Only held-out facts get here."""
        forms = sorted({value[0] for (prop, _), value in PROP.items() if prop == self.op.prop})
        if self.said in CAP.values():
            forms = [cap(i) for i in forms]
        wrong = [i for i in forms if i != self.said]
        return Prompt(self.story.ids[:self.at], [self.said], wrong)

    def ask_cnt(self):
        """one , two , -> three"""
        end = self.at + 4
        right = self.story.ids[end]
        wrong = [tok(number) for number in NUMBERS if tok(number) != right]
        if not held(self.said_in_lower_case(), self.word[self.op.avoid[0]]):
            return None
        return Prompt(self.story.ids[:end], [right], wrong)

    def ask_art(self):
        """a -> a word that goes with "a", not one that goes with "an" """
        if not held(*self.names):
            return None
        fits = {}
        for name in ("obj", "adj", "vow", "cons"):
            for i in DIST[self.story.topic][name].ids:
                fits[i] = article(i) == self.said_in_lower_case()
        right = [i for i in fits if fits[i]]
        wrong = [i for i in fits if not fits[i]]
        return Prompt(self.story.ids[:self.at + 1], right, wrong)

    def ask_topic(self):
        """An object of the story's topic, or one of another's?"""
        if not held(*self.names):
            return None
        own = {tok(word) for word in TOPIC_WORDS[TOPICS[self.story.topic]]["obj"]}
        every = set()
        for topic in TOPICS:
            every |= {tok(word) for word in TOPIC_WORDS[topic]["obj"]}
        right = [self.form(i) for i in own]
        wrong = [self.form(i) for i in every - own]
        return Prompt(self.story.ids[:self.at], right, wrong)

    def form(self, i):
        """Put a noun into the number that is asked for."""
        return PROP["s", i][0] if self.op.prop else i
