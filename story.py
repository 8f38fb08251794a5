"""TinyTales' generator: short children's stories whose state is known at every token.

A story is drawn top down: a plan (topic, tense, protagonist, companion, mood, plot, treasure, ...), a sequence of sentence
families, a template for each, a word for each slot. Every choice's log-probability is charged to the token at which it is
first spent, so  - sum_t log p_t  is the surprisal of the derivation and its mean an upper bound on the text's entropy rate
(several derivations can give one text). One word pair in ten is held out: such pairs never stand together in a story, and
the prompts that test the target are made of exactly those. Words and templates are in tinytales.py.
"""
import functools
import math
import random
import re
from bisect import bisect
from itertools import accumulate
from typing import NamedTuple

import tinytales as tt

EOT, UNK, HELD_OUT = "<|endoftext|>", "<unk>", 10

# ------------------------------------------------------------------------------------------------------------ vocabulary
VOCAB: list[str] = []
ID: dict[str, int] = {}


def tok(word):
    if word not in ID:
        ID[word] = len(VOCAB)
        VOCAB.append(word)
    return ID[word]


tok(EOT), tok(UNK)
CAP: dict[int, int] = {}                        # token -> its capitalised form
PROP: dict[tuple[str, int], tuple[int, ...]] = {}    # ("s", cow) -> cows, ("sound", cow) -> moo, ("opp", hot) -> cold


def cap(i):
    if i not in CAP:
        CAP[i] = tok(VOCAB[i][0].upper() + VOCAB[i][1:])
    return CAP[i]


def article(i):
    return tok("an" if re.match("[aeiou]", VOCAB[i]) and not VOCAB[i].startswith("uni") else "a")


ANIMALS = [[part.strip() for part in a.split()] for a in tt.ANIMALS.replace("\n", "|").split("|") if a.strip()]
for name, _, sound, color, home, food in ANIMALS:
    for key, value in dict(sound=sound, color=color, home=home, food=food).items():
        PROP[key, tok(name)] = (tok(value),)
for pair in tt.OPPOSITES.split("|"):
    a, b = map(tok, pair.split())
    PROP["opp", a], PROP["opp", b] = (b,), (a,)


# --------------------------------------------------------------------------------------------------------- distributions
class Dist(NamedTuple):
    """A categorical distribution over words: ids, cumulative probabilities, log-probabilities."""
    ids: list[int]
    cum: list[float]
    logp: list[float]

    def pick(self, rng):
        i = min(bisect(self.cum, rng.random()), len(self.ids) - 1)
        return self.ids[i], self.logp[i]

    @classmethod
    def of(cls, weights: dict[int, float]):
        z = sum(weights.values())
        return cls(list(weights), list(accumulate(w / z for w in weights.values())), [math.log(w / z) for w in weights.values()])


def zipf(words, shift=2):
    return {tok(w): 1 / (rank + shift) for rank, w in enumerate(dict.fromkeys(words))}


def mix(p, q, weight):
    """weight p + (1 - weight) q, both normalised."""
    sp, sq = sum(p.values()), sum(q.values())
    return {i: weight * p.get(i, 0) / sp + (1 - weight) * q.get(i, 0) / sq for i in {**p, **q}}


TOPICS = list(tt.TOPICS)
SHARED = {name: zipf(words, dict(num=.5, color=1).get(name, 2)) for name, words in tt.LISTS.items()}
SHARED.update(opp=zipf([w for pair in tt.OPPOSITES.split("|") for w in pair.split()], 8), nonsense=zipf(tt.NONSENSE, 30),
              bird=zipf([a[0] for a in ANIMALS if a[1] == "bird"]), mood=zipf(tt.MOODS, 8), nick=zipf(tt.CREATURES, 20),
              girl=zipf(tt.GIRLS, 12), boy=zipf(tt.BOYS, 12), creature=zipf(tt.CREATURES, 12), group=zipf(tt.GROUPS, 8))
POOLED = {name: zipf(w for t in TOPICS for w in tt.TOPICS[t][name].split()) for name in ("obj", "thing", "food")}
DIST = [{**SHARED, **{n: mix(zipf(tt.TOPICS[t][n].split()), q, .8) for n, q in POOLED.items()},
         "animal": mix(zipf(tt.TOPICS[t]["animal"].split(), 1), zipf([a[0] for a in ANIMALS], .3), .6),
         "adj": mix(zipf(tt.TOPICS[t]["adj"].split()), SHARED["adj"], .35),
         **{n: zipf(tt.TOPICS[t][n].split()) for n in ("place", "people")}} for t in TOPICS]
DIST = [{name: Dist.of(w) for name, w in d.items()} for d in DIST]


def held(a, b):
    return (a * 7919 + b * 104729) % HELD_OUT == 0


@functools.lru_cache(maxsize=None)
def given(topic, name, others, want_held=False):
    """The distribution `name` of a topic without words held out against (or equal to) any of the words `others`;
    with want_held, only with words held out against the last of them (all words if there are none)."""
    d = DIST[topic][name]
    keep = {i: math.exp(lp) for i, lp in zip(d.ids, d.logp) if i not in others and not any(held(o, i) for o in others)}
    if want_held:
        keep = {i: math.exp(lp) for i, lp in zip(d.ids, d.logp) if i not in others and held(others[-1], i)} or keep
    return Dist.of(keep or {i: 1.0 for i in d.ids if i not in others})


# ------------------------------------------------------------------------------------------------------------- templates
def inflect(verb, past, plural):
    if verb == "be":
        return ("were" if plural else "was") if past else ("are" if plural else "is")
    base, third, simple_past = tt.IRREGULAR.get(verb) or (verb, add_s(verb), verb + ("d" if verb[-1] == "e" else "ed"))
    return simple_past if past else base if plural else third


def add_s(word):
    return tt.PLURALS.get(word) or (word + "es" if re.search("(s|x|sh|ch|o)$", word) else
                                    word[:-1] + "ies" if re.search("[^aeiou]y$", word) else word + "s")


LIT, REF, PICK, COUNT, MARK = range(5)
REGISTERS = set("P P0 he him his its C che chim chis K Kcol W A Sp mood tod place child kid P's C's L1 L2 L3 S1 S2 S3 S4".split())


NEVER_CAP = ("L1", "S1", "S2", "S3", "S4")       # a list or a rhyme is said again to the letter


@functools.lru_cache(maxsize=None)
def compile_template(text, past, plural, marks=False):
    """Template text -> operations, for one tense and one number of the protagonist; with marks, the ^name cut points too."""
    ops, start, bound, before, resumed = [], True, set(REGISTERS), "", False
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|\S+", text):
        if part[0] == "{":
            body, *avoid = part[1:-1].removeprefix("a ").split("~")
            store, _, name = body.rpartition(":")
            name, _, prop = name.partition(".")
            art = part.startswith("{a ")
            if name in ("up", "down"):
                ops.append((COUNT, name, avoid, start))
            elif not store and name in bound:
                ops.append((REF, name, prop, start and name not in NEVER_CAP, art))
            else:
                ops.append((PICK, name, prop, start, art, store, avoid))
            bound.add(store)
        elif part[0] == "^":
            ops += [(MARK, part[1:])] * marks
            continue
        else:
            if part[0] == "[":
                verb, _, who = part[1:-1].partition(" ")
                number = who == "p" if who else plural
                word = inflect(verb, past, number)
                VERB_FORMS[word] = {"agr": {inflect(verb, past, not number)}, "tense": {inflect(verb, not past, n) for n in (0, 1)}}
            else:
                word = part if "/" not in part else part.split("/")[not past]
            i = cap(tok(word)) if start and word[0].isalpha() else tok(word)
            if ops and ops[-1][0] == LIT:
                ops[-1] = (LIT, (*ops[-1][1], i))
            else:
                ops.append((LIT, (i,)))
        start = part in (".", "!", "?") or part == "”" and before == "." or part == "“" and not resumed
        resumed = not start and (resumed or part == "”")        # “ Oh no , ” said Tom , “ the boat is gone ! ”
        before = part
    return ops


VERB_FORMS: dict[str, dict[str, set[str]]] = {}     # inflected form -> its forms of wrong number, of wrong tense


def parse(line):
    """'h|<| text' -> (text, kinds of protagonist it suits, tenses it suits)."""
    *flags, text = line.strip().split("| ")
    flags = "".join(flags).replace("|", "")
    kinds = [k for k in range(4) if {"h": k < 2, "k": k == 2, "g": k == 3, "n": k < 3}.get(flags[:1], True)]
    return text, kinds, [t for t in (True, False) if not ("<" in flags and not t or ">" in flags and t)]


KINDS = ["girl", "boy", "creature", "group"]
FAMILIES = {name: [parse(line) for line in block.strip().split("\n")] for name, block in tt.FAMILIES.items()}
FAMILIES.update({"topic:" + t: [parse(x) for x in re.split(r" \| |\n", tt.TOPICS[t]["lines"])] for t in TOPICS})
N_TEMPLATES = sum(map(len, FAMILIES.values()))


# --------------------------------------------------------------------------------------------------------------- stories
KIND_P, PAST_P = [.27, .27, .26, .2], .72
PLOTS = {name: steps.split() for name, steps in tt.PLOTS.items()}
STATE = (["topic: " + t for t in TOPICS] + ["protagonist: " + k for k in KINDS] + ["present tense"] + ["mood: " + m for m in tt.MOODS]
         + ["plot: " + p for p in PLOTS] + ["last speaker: " + w for w in ("protagonist", "companion", "other")]
         + ["time: " + t for t in tt.LISTS["tod"][1:]] + ["treasure is lost", "list is known", "rhyme is known"]
         + ["sentence: " + f for f in ("agreement", "creature_fact", "talk", "topic", "counting", "giving", "because", "negation",
                                       "feeling", "food", "weather", "closing", "opening", "setting", "meeting")])
BIT = {name: 1 << i for i, name in enumerate(STATE)}
SPEAKER = re.compile(r"” \[(?:%s)[^]]*\] (?:\{(P|C)\}|the)|\{(P|C)\}[^“”]*\[(?:%s)[^]]*\][^“”]*“" % (("|".join(tt.SPEECH),) * 2))


class Story:
    """One story. ids; events: (position, log-probability of a choice); spans: (position, state bits from there on);
    cuts: (position, phenomenon, right ids, wrong ids), only if marks. With held, word pairs are held-out ones."""

    def __init__(self, rng, marks=False):
        self.rng, self.marks, self.held, self.ids, self.events, self.spans, self.cuts, self.used = rng, marks, marks, [0], [], [], [], set()
        reg = self.reg = {}
        self.debt = 0.0                                        # log p of the plan, charged to the story's first word
        self.topic = self.choose([1 / len(TOPICS)] * len(TOPICS))
        self.kind, self.past = self.choose(KIND_P), not self.choose([PAST_P, 1 - PAST_P])
        self.plural = self.kind == 3
        name = self.take(KINDS[self.kind])
        who = [("she", "her", "her"), ("he", "him", "his"), ("it", "it", "its"), ("they", "them", "their")]
        reg["P0"] = (name,)
        reg["P"] = (tok("the"), name) if self.plural else (name,)
        reg["P's"] = (*reg["P"], tok("'" if self.plural else "'s"))
        reg["he"], reg["him"], reg["his"] = ((tok(w),) for w in who[self.kind])
        reg["its"] = reg["his"]
        if self.kind < 2:
            reg["child"] = (tok(KINDS[self.kind]),)
        girl = self.choose([.5, .5])
        reg["C"] = (self.take(KINDS[girl], name),)
        reg["C's"] = (*reg["C"], tok("'s"))
        reg["che"], reg["chim"], reg["chis"] = ((tok(w),) for w in who[girl])
        reg["kid"] = (tok(KINDS[girl]),)
        for key, dist in dict(mood="mood", tod="tod", place="place", W="people").items():
            reg[key] = (self.take(dist),)
        reg["A"] = (self.take("animal"),)
        if self.kind == 2:
            reg["Sp"] = (self.take("animal", reg["A"][0]),)
        self.plot = list(PLOTS)[self.choose([1 / len(PLOTS)] * len(PLOTS))]
        if self.plot in ("lost", "gift", "making"):
            reg["K"], reg["Kcol"] = (self.take("obj"),), (self.take("color"),)
        for key, dist, n, plot in (("L", "food", 3, "shopping"), ("S", "nonsense", 4, "spell")):
            for i in range(1, n + 1 if self.plot == plot else 1):
                reg[f"{key}{i}"] = (self.take(dist, *(reg[f"{key}{j}"][0] for j in range(1, i))),)
        self.bits = sum(BIT[b] for b in ("topic: " + TOPICS[self.topic], "protagonist: " + KINDS[self.kind],
                                         "mood: " + VOCAB[reg["mood"][0]], "plot: " + self.plot))
        self.bits |= BIT.get("time: " + VOCAB[reg["tod"][0]], 0) | (0 if self.past else BIT["present tense"])
        self.sentence = 0

    def choose(self, p):
        """Index i with probability p[i]."""
        i = min(bisect(list(accumulate(p)), self.rng.random()), len(p) - 1)
        self.debt += math.log(p[i])
        return i

    def take(self, name, *others):
        """A word from the topic's distribution `name`, fit to stand with the words `others`."""
        i, logp = (given(self.topic, name, others, self.held) if others else DIST[self.topic][name]).pick(self.rng)
        self.debt += logp
        return i

    def spend(self):
        if self.debt:
            self.events.append((len(self.ids), self.debt))
            self.debt = 0.0

    def tell(self, family):
        """Adds one sentence group of a family; its template was not used before in this story."""
        key = "topic:" + TOPICS[self.topic] if family == "topic" else family
        options = usable(key, self.kind, self.past, self.reg["A"][0] if family == "creature_fact" else None, self.held)
        left = [t for t in options if t not in self.used] or options
        text = left[int(self.rng.random() * len(left))]
        self.debt -= math.log(len(left))
        self.used.add(text)
        bits = self.bits | BIT.get("sentence: " + family, 0) | self.sentence
        self.spans.append((len(self.ids), bits))
        self.say(compile_template(text, self.past, self.plural, self.marks))
        if m := SPEAKER.search(text):
            self.sentence &= ~sum(BIT["last speaker: " + w] for w in ("protagonist", "companion", "other"))
            self.sentence |= BIT["last speaker: " + {"P": "protagonist", "C": "companion"}.get(m[1] or m[2], "other")]
        self.sentence |= BIT.get({"list": "list is known", "rhyme": "rhyme is known", "lose": "treasure is lost"}.get(family), 0)
        if family == "find":
            self.sentence &= ~BIT["treasure is lost"]

    def say(self, ops):
        reg, ids = self.reg, self.ids
        for n, op in enumerate(ops):
            kind = op[0]
            if kind == LIT:
                self.spend()
                ids += op[1]
            elif kind == REF:
                _, name, prop, capital, art = op
                value = reg[name]
                if prop:
                    value = PROP[prop, value[-1]]
                self.put(value, capital, art)
            elif kind == PICK:
                _, name, prop, capital, art, store, avoid = op
                i = self.take(name, *(reg[a][-1] for a in avoid))
                if store:
                    reg[store] = (i,)
                self.put(PROP["s", i] if prop else (i,), capital, art)
            elif kind == COUNT:
                _, name, avoid, capital = op
                numbers = given_counts(name, reg[avoid[0]][-1], self.held)
                self.debt -= math.log(len(numbers))
                self.put(numbers[int(self.rng.random() * len(numbers))], capital, False)
            else:
                self.cuts.append((len(ids), op[1], dict(reg), ops[n + 1]))

    def put(self, value, capital, art):
        self.spend()
        if art:
            a = article(value[0])
            value, capital = (cap(a) if capital else a, *value), False
        self.ids += (cap(value[0]), *value[1:]) if capital else value

    def whole(self):
        """Opening, setting, meeting; the plot's steps with fillers between them; closing."""
        for family in ("opening", "setting", "meeting"):
            self.tell(family)
        for step in PLOTS[self.plot]:
            while len(self.ids) < 150 and self.choose(FILL_P):
                self.tell(FILLERS[self.choose(FILLERS_P)])
            self.tell(step)
        self.tell("closing")
        return self


def tell(index):
    """Story number `index`, whole. (A string seed is hashed: close or far integers as seeds gave equal streams.)"""
    return Story(random.Random(f"TinyTales {index}")).whole()


FILL_P, FILLERS = [.68, .32], tt.FILLERS
FILLERS_P = [1 / len(FILLERS)] * len(FILLERS)


@functools.lru_cache(maxsize=None)
def usable(family, kind, past, animal, want_held):
    """Templates that suit the protagonist and the tense. A fact template and an animal can be held out against each other."""
    texts = [(n, text) for n, (text, kinds, tenses) in enumerate(FAMILIES[family]) if kind in kinds and past in tenses]
    return [t for n, t in texts if animal is None or held(n, animal) == want_held]


@functools.lru_cache(maxsize=None)
def given_counts(direction, other, want_held):
    """Number sequences of 3 to 6 words up or down within one..twelve whose start is not (or is) held out against a word."""
    words = [tok(w) for w in "one two three four five six seven eight nine ten eleven twelve".split()]
    words = words if direction == "up" else words[::-1]
    runs = [words[s:s + n] for n in range(3, 7) for s in range(0, 13 - n)]
    runs = [r for r in runs if held(r[0], other) == want_held] or runs
    return [[w for i, r in enumerate(run) for w in ((tok(","), r) if i else (r,))] for run in runs]


def fill_vocabulary():
    """Every word that a template can say gets its token now, in a fixed order; nothing is added later."""
    for words in [tt.GIRLS, tt.BOYS, tt.CREATURES, tt.GROUPS]:
        [tok(w) for w in words]
    for word in "a an A An she her he him his it its they them their girl boy creature 's '".split():
        tok(word)
    registers = {"P": "girl boy creature", "C": "girl boy", "A": "animal", "Sp": "animal", "W": "people", "K": "obj", "Kcol": "color"}
    for texts in FAMILIES.values():
        for text, *_ in texts:
            for op in (op for past in (0, 1) for plural in (0, 1) for op in compile_template(text, bool(past), bool(plural))):
                if op[0] in (PICK, REF):
                    for d in DIST:
                        for name in registers.get(op[1], op[1]).split():
                            for i in d[name].ids if name in d else ():
                                if op[2] == "s" and ("s", i) not in PROP:
                                    PROP["s", i] = (tok(add_s(VOCAB[i])),)
                                if op[3] and not op[4]:
                                    cap(PROP[op[2], i][0] if op[2] else i)
    [cap(tok(w)) for w in "the she he it they her his its their one two three four five six seven eight nine ten eleven twelve".split()]
    given_counts("up", 0, False)


fill_vocabulary()


# --------------------------------------------------------------------------------------------------------------- prompts
class Prompt(NamedTuple):
    """Right iff, after `ids`, the likeliest token of `right` beats the likeliest of `wrong`."""
    ids: list[int]
    right: list[int]
    wrong: list[int]


PHENOMENA = {   # name: (mark in the templates, families that carry it, plots that prepare it)
    "agreement": ("agr", ["agreement"]), "pronoun": ("pro", ["because", "feeling"]), "article": ("art", ["article"]),
    "tense": ("tense", ["motion"]), "quotes": ("quote", ["talk", "saying"]), "indirect object": ("ioi", ["giving"]),
    "induction": ("ind", ["list_again", "rhyme_again"]), "facts": ("fact", ["creature_fact"]), "counting": ("cnt", ["counting"]),
    "negation": ("neg", ["negation"]), "topic": ("topic", ["describe", "perception"]),
}
PRONOUNS = [tok(w) for w in "she he it they".split()]


def prompts(n=200, seed=0) -> dict[str, list[Prompt]]:
    """n prompts per phenomenon, each cut from a story that contains a held-out pair just there."""
    return {name: _prompts(name, n, random.Random(f"{seed} {name}")) for name in PHENOMENA}


def _prompts(name, n, rng):
    mark, families = PHENOMENA[name]
    found = {}
    while len(found) < n:
        story = Story(rng, marks=True)
        family = families[int(rng.random() * len(families))]
        before = {"list_again": ["list"], "rhyme_again": ["rhyme"]}.get(family, [])
        if family == "creature_fact" and not usable(family, story.kind, story.past, story.reg["A"][0], True):
            continue
        if before and not {"list_again": "L1", "rhyme_again": "S1"}[family] in story.reg:
            continue
        for step in ["opening", "setting", "meeting", *before, *(["weather"] if before else []), family]:
            story.cuts.clear()
            story.tell(step)
        prompt = next((cut(story, *c[1:], c[0]) for c in story.cuts if c[1] == mark), None)
        if prompt and prompt.right and prompt.wrong and not set(prompt.right) & set(prompt.wrong):
            found[tuple(prompt.ids)] = prompt
    return list(found.values())


def cut(story, mark, reg, op, at):
    """The prompt that ends before position `at`, or None if what follows is not held out."""
    ids, right = story.ids, [story.ids[at]]
    same_case = lambda words: [i if right[0] not in CAP.values() else cap(i) for i in words]
    names = held(reg["P"][-1], reg["C"][-1])
    if mark == "agr":
        return held(reg["s"][-1], reg["t"][-1]) and Prompt(ids[:at], right, [ID[w] for w in VERB_FORMS[VOCAB[right[0]]]["agr"]])
    if mark == "tense":
        return names and Prompt(ids[:at], right, [tok(w) for w in VERB_FORMS[VOCAB[right[0]]]["tense"]])
    if mark == "pro":
        return names and Prompt(ids[:at], right, [i for i in PRONOUNS if i != right[0]])
    if mark == "quote":
        return names and Prompt(ids[:at], right, [ID["“"]])
    if mark == "ioi":
        return names and Prompt(ids[:at], right, list({reg["P"][-1], reg["C"][-1]} - {right[0]}))
    if mark == "ind":
        pool = DIST[story.topic]["food" if op[1][0] == "L" else "nonsense"].ids
        return held(reg[op[1][:1] + str(int(op[1][1]) - 1)][0], right[0]) and Prompt(ids[:at], right, [i for i in pool if i != right[0]])
    if mark == "cnt":
        numbers = given_counts("up", reg["P"][-1], False)
        every = {i for run in numbers for i in run} - {ID[","], ids[at + 4]}
        first = ID[VOCAB[right[0]].lower()]
        return held(first, reg[op[2][0]][-1]) and Prompt(ids[:at + 4], [ids[at + 4]], list(every))
    if mark == "fact":
        values = {v[0] for (prop, _), v in PROP.items() if prop == op[2]}
        return Prompt(ids[:at], right, [i for i in same_case(sorted(values)) if i != right[0]])
    if mark == "neg":
        return held(reg["n"][-1], reg["x"][-1]) and Prompt(ids[:at], right, list(reg["x"]))
    pool = {w for name in ("obj", "adj", "vow", "cons") for w in DIST[story.topic][name].ids}
    if mark == "art":
        says = lambda i: article(i) == ID[VOCAB[right[0]].lower()]
        return names and Prompt(ids[:at + 1], [i for i in pool if says(i)], [i for i in pool if not says(i)])
    own = {tok(w) for w in tt.TOPICS[TOPICS[story.topic]]["obj"].split()}
    every = {tok(w) for t in TOPICS for w in tt.TOPICS[t]["obj"].split()}
    form = (lambda i: PROP["s", i][0]) if op[2] == "s" else (lambda i: i)
    return names and Prompt(ids[:at], [form(i) for i in own], [form(i) for i in every - own])
