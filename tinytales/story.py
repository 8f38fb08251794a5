"""TinyTales' generator: short children's stories whose state is known at every token.

A story is drawn top down: a plan (topic, tense, protagonist, companion, mood, plot, treasure, ...), a sequence of
sentence families, a template for each, a word for each slot. Every choice's log-probability is charged to the token at
which it is first spent, so  - sum_t log p_t  is the surprisal of the derivation, and its mean an upper bound on the
text's entropy rate (several derivations can give one text). One word pair in ten is held out: such pairs never stand
together in a story, and the prompts that test a target (prompts.py) are made of exactly those.
Words, templates and their notation are in words.py.
"""
import functools
import math
import random
import re
from bisect import bisect
from itertools import accumulate
from typing import NamedTuple

from tinytales import words as tt

EOT, UNK, HELD_OUT = "<|endoftext|>", "<unk>", 10

# ------------------------------------------------------------------------------------------------ vocabulary
VOCAB: list[str] = []
ID: dict[str, int] = {}
CAP: dict[int, int] = {}                            # token -> its capitalised form
PROP: dict[tuple[str, int], tuple[int, ...]] = {}   # ("s", cow) -> cows, ("sound", cow) -> moo, ("opp", hot) -> cold


def tok(word):
    """A word's token; a new one if the vocabulary lacks it, which happens while this module is imported only."""
    if word not in ID:
        ID[word] = len(VOCAB)
        VOCAB.append(word)
    return ID[word]


def cap(i):
    if i not in CAP:
        CAP[i] = tok(VOCAB[i][0].upper() + VOCAB[i][1:])
    return CAP[i]


def article(i):
    return tok("an" if re.match("[aeiou]", VOCAB[i]) and not VOCAB[i].startswith("uni") else "a")


tok(EOT), tok(UNK)
ANIMALS = [a.split() for a in tt.ANIMALS.replace("\n", "|").split("|") if a.strip()]
OPPOSITES = [pair.split() for pair in tt.OPPOSITES.split("|")]
for name, _, sound, color, home, food in ANIMALS:
    for key, value in dict(sound=sound, color=color, home=home, food=food).items():
        PROP[key, tok(name)] = (tok(value),)
for pair in OPPOSITES:
    a, b = map(tok, pair)
    PROP["opp", a], PROP["opp", b] = (b,), (a,)


# --------------------------------------------------------------------------------------------- distributions
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
        p = [w / z for w in weights.values()]
        return cls(list(weights), list(accumulate(p)), [math.log(q) for q in p])


def zipf(words, shift=2):
    """Weights 1 / (rank + shift) in the order of the words."""
    return {tok(w): 1 / (rank + shift) for rank, w in enumerate(dict.fromkeys(words))}


def mix(p, q, weight):
    """weight p + (1 - weight) q, both normalised."""
    sp, sq = sum(p.values()), sum(q.values())
    return {i: weight * p.get(i, 0) / sp + (1 - weight) * q.get(i, 0) / sq for i in {**p, **q}}


TOPICS = list(tt.TOPICS)
TOPIC_WORDS = {t: {n: words.split() for n, words in tt.TOPICS[t].items() if n != "lines"} for t in TOPICS}
SHARED = {name: zipf(words, dict(num=.5, color=1).get(name, 2)) for name, words in tt.LISTS.items()}
SHARED.update(opp=zipf(sum(OPPOSITES, []), 8), nonsense=zipf(tt.NONSENSE, 30),
              bird=zipf([a[0] for a in ANIMALS if a[1] == "bird"]), mood=zipf(tt.MOODS, 8), nick=zipf(tt.CREATURES, 20),
              girl=zipf(tt.GIRLS, 12), boy=zipf(tt.BOYS, 12), creature=zipf(tt.CREATURES, 12), group=zipf(tt.GROUPS, 8))
POOLED = {name: zipf(w for t in TOPICS for w in TOPIC_WORDS[t][name]) for name in ("obj", "thing", "food")}
DIST = [{**SHARED, **{n: mix(zipf(words[n]), q, .8) for n, q in POOLED.items()},        # mostly the topic's own words
         "animal": mix(zipf(words["animal"], 1), zipf([a[0] for a in ANIMALS], .3), .6),
         "adj": mix(zipf(words["adj"]), SHARED["adj"], .35),
         "place": zipf(words["place"]), "people": zipf(words["people"])} for words in TOPIC_WORDS.values()]
DIST = [{name: Dist.of(w) for name, w in d.items()} for d in DIST]


def held(a, b):
    """Whether the words a and b are held out: never together in a story, always in a prompt."""
    return (a * 7919 + b * 104729) % HELD_OUT == 0


@functools.lru_cache(maxsize=None)
def given(topic, name, others, want_held=False):
    """The distribution `name` of a topic without the words `others` and what is held out against any of them; with
    want_held, only what is held out against the last of them (if there is such a word)."""
    d = DIST[topic][name]
    p = {i: math.exp(lp) for i, lp in zip(d.ids, d.logp) if i not in others}
    fit = {i: w for i, w in p.items() if not any(held(o, i) for o in others)}
    if want_held:
        fit = {i: w for i, w in p.items() if held(others[-1], i)} or fit
    return Dist.of(fit or dict.fromkeys(p, 1.0))


# ------------------------------------------------------------------------------------------------- templates
def add_s(word):
    return tt.PLURALS.get(word) or (word + "es" if re.search("(s|x|sh|ch|o)$", word) else
                                    word[:-1] + "ies" if re.search("[^aeiou]y$", word) else word + "s")


def inflect(verb, past, plural):
    if verb == "be":
        return ("were" if plural else "was") if past else ("are" if plural else "is")
    regular = verb, add_s(verb), verb + ("d" if verb[-1] == "e" else "ed")
    base, third, simple_past = tt.IRREGULAR.get(verb) or regular
    return simple_past if past else base if plural else third


class Lit(NamedTuple):      # literal tokens
    ids: tuple


class Ref(NamedTuple):      # what a register of the story holds, or a property of it
    name: str
    prop: str
    capital: bool
    article: bool


class Pick(NamedTuple):     # a choice from a distribution, kept under `store`, fit to stand with the words in `avoid`
    name: str
    prop: str
    capital: bool
    article: bool
    store: str
    avoid: list


class Count(NamedTuple):    # number words, up or down
    name: str
    avoid: list
    capital: bool


class Mark(NamedTuple):     # where a prompt about this phenomenon may end
    name: str


REGISTERS = set("P P0 P's he him his its child C C's che chim chis kid K Kcol W A Sp mood tod place "
                "L1 L2 L3 S1 S2 S3 S4".split())
SAID_AGAIN = dict(list=["L1", "L2", "L3"], rhyme=["S1", "S2", "S3", "S4"])     # by list_again and rhyme_again
NEVER_CAPITAL = SAID_AGAIN["list"][:1] + SAID_AGAIN["rhyme"]                    # to the letter
VERB_FORMS: dict[str, dict[str, set[str]]] = {}     # inflected form -> its forms of wrong number, of wrong tense


@functools.lru_cache(maxsize=None)
def compile_template(text, past, plural, marks=False):
    """Template -> operations, for one tense and one number of the protagonist; with marks, the places to cut too."""
    ops, bound, start, before, resumed = [], set(REGISTERS), True, "", False
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|\S+", text):
        if part[0] == "^":
            ops += [Mark(part[1:])] * marks
            continue
        if part[0] == "{":
            art = part.startswith("{a ")
            body, *avoid = part[1:-1].removeprefix("a ").split("~")
            store, _, name = body.rpartition(":")
            name, _, prop = name.partition(".")
            if name in ("up", "down"):
                ops.append(Count(name, avoid, start))
            elif name in bound and not store:
                ops.append(Ref(name, prop, start and name not in NEVER_CAPITAL, art))
            else:
                ops.append(Pick(name, prop, start, art, store, avoid))
            bound.add(store)
        else:
            if part[0] == "[":
                verb, _, who = part[1:-1].partition(" ")
                number = who == "p" if who else plural
                word = inflect(verb, past, number)
                VERB_FORMS[word] = {"agr": {inflect(verb, past, not number)},
                                    "tense": {inflect(verb, not past, n) for n in (0, 1)}}
            else:
                word = part if "/" not in part else part.split("/")[not past]
            i = cap(tok(word)) if start and word[0].isalpha() else tok(word)
            if ops and isinstance(ops[-1], Lit):
                ops[-1] = Lit((*ops[-1].ids, i))
            else:
                ops.append(Lit((i,)))
        start = part in (".", "!", "?") or part == "”" and before == "." or part == "“" and not resumed
        resumed = not start and (resumed or part == "”")    # “ Oh no , ” said Tom , “ the boat is gone ! ”
        before = part
    return ops


def parse(line):
    """'h|<| text' -> (text, kinds of protagonist it suits, tenses it suits)."""
    *flags, text = line.strip().split("| ")
    flags = "".join(flags).replace("|", "")
    kinds = [k for k in range(4) if {"h": k < 2, "k": k == 2, "g": k == 3, "n": k < 3}.get(flags[:1], True)]
    return text, kinds, [t for t in (True, False) if not ("<" in flags and not t or ">" in flags and t)]


FAMILIES = {name: [parse(line) for line in block.strip().split("\n")] for name, block in tt.FAMILIES.items()}
FAMILIES.update({"topic:" + t: [parse(x) for x in re.split(r" \| |\n", tt.TOPICS[t]["lines"])] for t in TOPICS})
N_TEMPLATES = sum(map(len, FAMILIES.values()))


@functools.lru_cache(maxsize=None)
def usable(family, kind, past, animal, want_held):
    """Templates that suit the protagonist and the tense; a fact's template and an animal can be held out too."""
    texts = [(n, text) for n, (text, kinds, tenses) in enumerate(FAMILIES[family]) if kind in kinds and past in tenses]
    return [t for n, t in texts if animal is None or held(n, animal) == want_held]


NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()


@functools.lru_cache(maxsize=None)
def number_runs(direction, other, want_held):
    """Runs of 3 to 6 numbers within one..twelve whose first word is not (or is) held out against the word `other`."""
    words = [tok(w) for w in (NUMBERS if direction == "up" else NUMBERS[::-1])]
    runs = [words[s:s + n] for n in range(3, 7) for s in range(13 - n)]
    runs = [r for r in runs if held(r[0], other) == want_held] or runs
    return [[w for i, r in enumerate(run) for w in ((tok(","), r) if i else (r,))] for run in runs]


# --------------------------------------------------------------------------------------------------- stories
KINDS, KIND_P, PAST_P = ["girl", "boy", "creature", "group"], [.27, .27, .26, .2], .72
PRONOUNS = [("she", "her", "her"), ("he", "him", "his"), ("it", "it", "its"), ("they", "them", "their")]
PLOTS = {name: steps.split() for name, steps in tt.PLOTS.items()}
FILL_P = .31                            # of one more filler sentence before a step of the plot
FAMILY_SHIFT = 56                       # state bits from here on hold 1 + the place in SENTENCES, or 0
LONG = 110                              # tokens after which no filler is added
SPEAKERS = {"P": "protagonist", "C": "companion", None: "other"}
STATE = (["topic: " + t for t in TOPICS] + ["protagonist: " + k for k in KINDS] + ["present tense"]
         + ["mood: " + m for m in tt.MOODS] + ["plot: " + p for p in PLOTS]
         + ["last speaker: " + w for w in SPEAKERS.values()] + ["time: " + t for t in tt.LISTS["tod"][1:]]
         + ["treasure is lost", "list is known", "rhyme is known"])
SENTENCES = [f for f in tt.FAMILIES if f not in ("time", "scene")] + ["topic"]      # families common enough to name
BIT = {name: 1 << i for i, name in enumerate(STATE)}
FAMILY_BIT = {f: i + 1 << FAMILY_SHIFT for i, f in enumerate(SENTENCES)}   # a number: there are more than bits left
SPEECH = "|".join(tt.SPEECH)            # ” said {P}   or   {P} said , “
SPEAKER = re.compile(rf"” \[(?:{SPEECH})[^]]*\] (?:\{{(P|C)\}}|the)|\{{(P|C)\}}[^“”]*\[(?:{SPEECH})[^]]*\][^“”]*“")


class Story:
    """One story. ids: its tokens; events: (position, log-probability of choices); spans: (position, state bits from
    there on); cuts, if marks: (position, phenomenon, registers, next operation); with them, pairs are held out."""

    def __init__(self, rng, marks=False):
        self.rng, self.marks = rng, marks
        self.ids, self.events, self.spans, self.cuts, self.used = [0], [], [], [], set()
        self.debt = 0.0                     # log p of choices not yet spent; the plan's is charged to the first word
        self.topic = self.choose([1 / len(TOPICS)] * len(TOPICS))
        self.kind, self.past = self.choose(KIND_P), not self.choose([PAST_P, 1 - PAST_P])
        self.plural = self.kind == 3
        one = lambda word: (tok(word),)
        name, reg = self.take(KINDS[self.kind]), {}
        reg["P0"], reg["P"] = (name,), (tok("the"), name) if self.plural else (name,)
        reg["P's"] = (*reg["P"], tok("'" if self.plural else "'s"))
        reg["he"], reg["him"], reg["his"] = map(one, PRONOUNS[self.kind])
        reg["its"] = reg["his"]
        if self.kind < 2:
            reg["child"] = one(KINDS[self.kind])
        sex = self.choose([.5, .5])
        reg["C"] = (self.take(KINDS[sex], name),)
        reg["C's"] = (*reg["C"], tok("'s"))
        reg["che"], reg["chim"], reg["chis"] = map(one, PRONOUNS[sex])
        reg["kid"] = one(KINDS[sex])
        for register, dist in dict(mood="mood", tod="tod", place="place", W="people", A="animal").items():
            reg[register] = (self.take(dist),)
        if self.kind == 2:
            reg["Sp"] = (self.take("animal", reg["A"][0]),)
        self.plot = list(PLOTS)[self.choose([1 / len(PLOTS)] * len(PLOTS))]
        if self.plot in ("lost", "gift", "making"):
            reg["K"], reg["Kcol"] = (self.take("obj"),), (self.take("color"),)
        again = [r for step in PLOTS[self.plot] for r in SAID_AGAIN.get(step, ())]
        for i, register in enumerate(again):
            reg[register] = (self.take("food" if register[0] == "L" else "nonsense", *(reg[r][0] for r in again[:i])),)
        self.reg = reg
        self.plan = BIT.get("time: " + VOCAB[reg["tod"][0]], 0) | (0 if self.past else BIT["present tense"])
        for fact in ("topic: " + TOPICS[self.topic], "protagonist: " + KINDS[self.kind], "plot: " + self.plot,
                     "mood: " + VOCAB[reg["mood"][0]]):
            self.plan |= BIT[fact]
        self.so_far = 0                     # state bits that change as the story goes

    def choose(self, p):
        """Index i with probability p[i]."""
        i = min(bisect(list(accumulate(p)), self.rng.random()), len(p) - 1)
        self.debt += math.log(p[i])
        return i

    def uniform(self, options):
        self.debt -= math.log(len(options))
        return options[int(self.rng.random() * len(options))]

    def take(self, name, *others):
        """A word from the topic's distribution `name`, fit to stand with the words `others`."""
        dist = given(self.topic, name, others, self.marks) if others else DIST[self.topic][name]
        i, logp = dist.pick(self.rng)
        self.debt += logp
        return i

    def tell(self, family):
        """Adds the sentences of one template of a family, none that this story has used if there is another."""
        key = "topic:" + TOPICS[self.topic] if family == "topic" else family
        animal = self.reg["A"][0] if family == "creature_fact" else None
        texts = usable(key, self.kind, self.past, animal, self.marks and animal is not None)
        text = self.uniform([t for t in texts if t not in self.used] or texts)
        self.used.add(text)
        self.spans.append((len(self.ids), self.plan | self.so_far | FAMILY_BIT.get(family, 0)))
        self.say(compile_template(text, self.past, self.plural, self.marks))
        if m := SPEAKER.search(text):
            for who in SPEAKERS.values():
                self.so_far &= ~BIT["last speaker: " + who]
            self.so_far |= BIT["last speaker: " + SPEAKERS[m[1] or m[2]]]
        known = {"list": "list is known", "rhyme": "rhyme is known", "lose": "treasure is lost"}
        self.so_far |= BIT.get(known.get(family), 0)
        if family == "find":
            self.so_far &= ~BIT["treasure is lost"]

    def say(self, ops):
        for n, op in enumerate(ops):
            kind = type(op)
            if kind is Lit:
                self.put(op.ids)
            elif kind is Ref:
                value = self.reg[op.name]
                self.put(PROP[op.prop, value[-1]] if op.prop else value, op.capital, op.article)
            elif kind is Pick:
                i = self.take(op.name, *(self.reg[a][-1] for a in op.avoid))
                if op.store:
                    self.reg[op.store] = (i,)
                self.put(PROP[op.prop, i] if op.prop else (i,), op.capital, op.article)
            elif kind is Count:
                self.put(self.uniform(number_runs(op.name, self.reg[op.avoid[0]][-1], self.marks)), op.capital)
            else:
                self.cuts.append((len(self.ids), op.name, dict(self.reg), ops[n + 1]))

    def put(self, value, capital=False, art=False):
        """Says some tokens, and charges to the first of them what has been chosen since the last."""
        if self.debt:
            self.events.append((len(self.ids), self.debt))
            self.debt = 0.0
        if art:
            value = (article(value[0]), *value)
        self.ids += (cap(value[0]), *value[1:]) if capital else value

    def whole(self):
        """Opening, setting, meeting; the plot's steps with fillers between them; closing."""
        for family in ("opening", "setting", "meeting"):
            self.tell(family)
        for step in PLOTS[self.plot]:
            while len(self.ids) < LONG and self.choose([1 - FILL_P, FILL_P]):
                self.tell(self.uniform(tt.FILLERS))
            self.tell(step)
        self.tell("closing")
        return self


def tell(index):
    """Story number `index`, whole. (The seed is a string, which Python hashes: some integers seed equal streams.)"""
    return Story(random.Random(f"TinyTales {index}")).whole()


def fill_vocabulary():
    """Gives every word that a template can say its token now, in a fixed order; nothing is added later."""
    names = [*tt.GIRLS, *tt.BOYS, *tt.CREATURES, *tt.GROUPS]
    for word in [*names, "a", "an", "A", "An", *sum(PRONOUNS, ()), *KINDS[:3], "'s", "'"]:
        tok(word)
    filled_from = dict(P="girl boy creature", C="girl boy", A="animal", Sp="animal", W="people", K="obj", Kcol="color")
    ops = (op for texts in FAMILIES.values() for text, *_ in texts for past in (False, True) for plural in (False, True)
           for op in compile_template(text, past, plural) if isinstance(op, (Ref, Pick)))
    for op in ops:
        for dist in DIST:
            for name in filled_from.get(op.name, op.name).split():
                for i in dist[name].ids if name in dist else ():
                    if op.prop == "s" and ("s", i) not in PROP:
                        PROP["s", i] = (tok(add_s(VOCAB[i])),)
                    if op.capital and not op.article:
                        cap(PROP[op.prop, i][0] if op.prop else i)
    for word in ["the", "she", "he", "it", "they", "her", "his", "its", "their", *NUMBERS]:
        cap(tok(word))


fill_vocabulary()
