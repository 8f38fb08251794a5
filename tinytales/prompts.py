"""Prompts that ask a language model for one phenomenon each, with a right and a wrong continuation.

A prompt is cut from a story of TinyTales just where a template carries a mark (^name in words.py), and the words
that make it a test are a held-out pair: subject and attractor, the two names, frame and animal, neighbours in a list.
"""
import random
from typing import NamedTuple

from tinytales.story import CAP, DIST, ID, NUMBERS, PRONOUNS, PROP, TOPIC_WORDS, TOPICS, VERB_FORMS, VOCAB
from tinytales.story import Story, article, cap, held, tok, usable


class Prompt(NamedTuple):
    """Answered right iff, after `ids`, the likeliest token of `right` is likelier than the likeliest of `wrong`."""
    ids: list[int]
    right: list[int]
    wrong: list[int]


PHENOMENA = {       # name: mark in the templates, families that carry it
    "agreement": ("agr", ["agreement"]), "pronoun": ("pro", ["because", "feeling"]), "article": ("art", ["article"]),
    "tense": ("tense", ["motion"]), "quotes": ("quote", ["talk", "saying"]), "indirect object": ("ioi", ["giving"]),
    "induction": ("ind", ["list_again", "rhyme_again"]), "facts": ("fact", ["creature_fact"]),
    "counting": ("cnt", ["counting"]), "negation": ("neg", ["negation"]),
    "topic": ("topic", ["describe", "perception"]),
}
FIRST_SAID = {"list_again": ("list", "L1"), "rhyme_again": ("rhyme", "S1")}    # what is said again must be said before
SUBJECT = [tok(subject) for subject, *_ in PRONOUNS]


def prompts(n=200, seed=0) -> dict[str, list[Prompt]]:
    """n distinct prompts per phenomenon."""
    return {name: make(name, n, random.Random(f"{seed} {name}")) for name in PHENOMENA}


def make(name, n, rng):
    mark, families = PHENOMENA[name]
    found = {}
    while len(found) < n:
        story = Story(rng, marks=True)
        family = families[int(rng.random() * len(families))]
        first, register = FIRST_SAID.get(family, (None, "P"))
        fact = family == "creature_fact"
        if register not in story.reg or fact and not usable(family, story.kind, story.past, story.reg["A"][0], True):
            continue
        for step in ["opening", "setting", "meeting", *([first, "weather"] if first else []), family]:
            story.cuts.clear()
            story.tell(step)
        prompt = next((cut(story, *c) for c in story.cuts if c[1] == mark), None)
        if prompt and prompt.right and prompt.wrong and not set(prompt.right) & set(prompt.wrong):
            found[tuple(prompt.ids)] = prompt
    return list(found.values())


def cut(story, at, mark, reg, op):
    """The prompt that ends before position `at`, or False if the words in question are not held out. reg: the
    registers of the story there; op: the operation that says the next tokens."""
    ids, said = story.ids, story.ids[at]
    word = {name: value[-1] for name, value in reg.items()}
    ask = lambda pair, wrong: held(*pair) and Prompt(ids[:at], [said], [i for i in wrong if i != said])
    names = word["P"], word["C"]
    if mark == "agr":
        return ask((word["s"], word["t"]), [ID[w] for w in VERB_FORMS[VOCAB[said]]["agr"]])
    if mark == "tense":
        return ask(names, [tok(w) for w in VERB_FORMS[VOCAB[said]]["tense"]])
    if mark == "pro":
        return ask(names, SUBJECT)
    if mark == "quote":
        return ask(names, [ID["“"]])
    if mark == "ioi":
        return ask(names, names)
    if mark == "neg":
        return ask((word["n"], word["x"]), [word["x"]])
    if mark == "ind":
        before = op.name[0] + str(int(op.name[1]) - 1)
        return ask((word[before], said), DIST[story.topic]["food" if op.name[0] == "L" else "nonsense"].ids)
    if mark == "fact":
        values = {value[0] for (prop, _), value in PROP.items() if prop == op.prop}
        forms = [cap(i) if said in CAP.values() else i for i in sorted(values)]
        return Prompt(ids[:at], [said], [i for i in forms if i != said])        # only held-out frames get here
    if mark == "cnt":                       # one , two , -> three
        end, first = at + 4, ID[VOCAB[said].lower()]
        wrong = [tok(w) for w in NUMBERS if tok(w) != ids[end]]
        return held(first, word[op.avoid[0]]) and Prompt(ids[:end], [ids[end]], wrong)
    if mark == "art":                       # a -> a word that goes with "a"
        fits = {i: article(i) == ID[VOCAB[said].lower()]
                for name in ("obj", "adj", "vow", "cons") for i in DIST[story.topic][name].ids}
        return held(*names) and Prompt(ids[:at + 1], [i for i in fits if fits[i]], [i for i in fits if not fits[i]])
    own = {tok(w) for w in TOPIC_WORDS[TOPICS[story.topic]]["obj"]}
    every = {tok(w) for t in TOPICS for w in TOPIC_WORDS[t]["obj"]}
    form = lambda i: PROP["s", i][0] if op.prop else i
    return held(*names) and Prompt(ids[:at], [form(i) for i in own], [form(i) for i in every - own])
