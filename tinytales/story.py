"""TinyTales' generator: it tells short children's stories whose state is known at every token.

A story is drawn top down: a plan (topic, tense, protagonist, companion, mood, plot, treasure, ..),
a sequence of sentence families, a template for each, a word for each slot. Every choice's
log-probability is charged to the token at which it is first spent, so - sum_t log p_t is the
surprisal of the derivation, and its mean an upper bound on the text's entropy rate (several
derivations can give one text).

One word pair in ten is held out: these pairs never stand together in a story, and the prompts that
test a target (prompts.py) are made of exactly them. Words, templates and their notation are in
words.py.

The vocabulary is filled while this module is imported, and a word's token is its place in it: the
order in which words are first met here is the order of the tokens.
"""
import functools
import math
import random
import re
from bisect import bisect
from itertools import accumulate
from typing import NamedTuple

from tinytales import words as tt

EOT = "<|endoftext|>"
UNK = "<unk>"
HELD_OUT = 10                       # one pair of words in so many is held out

# -------------------------------------------------------------------------------------- vocabulary
VOCAB: list[str] = []
ID: dict[str, int] = {}
CAP: dict[int, int] = {}            # token -> its capitalised form
# ("s", cow) -> cows, ("sound", cow) -> moo, ("opp", hot) -> cold
PROP: dict[tuple[str, int], tuple[int, ...]] = {}


def tok(word):
    """Look up a word's token. A word that the vocabulary lacks gets a new one, which happens only
    while this module is imported."""
    if word not in ID:
        ID[word] = len(VOCAB)
        VOCAB.append(word)
    return ID[word]


def cap(i):
    """Look up the token of a token's capitalised form."""
    if i not in CAP:
        CAP[i] = tok(VOCAB[i][0].upper() + VOCAB[i][1:])
    return CAP[i]


def article(i):
    """Does "a" or "an" stand before a token? The article's token."""
    has_vowel = re.match("[aeiou]", VOCAB[i]) and not VOCAB[i].startswith("uni")
    return tok("an" if has_vowel else "a")


class Animal(NamedTuple):
    """An animal and what the stories say about it."""
    name: str
    kind: str                       # farm, wild, bird, pet
    sound: str
    color: str
    home: str
    food: str


def learn_facts():
    """Fill PROP with what is known of each animal and of each pair of opposites."""
    for animal in ANIMALS:
        for fact in ("sound", "color", "home", "food"):
            value = tok(getattr(animal, fact))
            PROP[fact, tok(animal.name)] = (value,)
    for first, second in OPPOSITES:
        a = tok(first)
        b = tok(second)
        PROP["opp", a] = (b,)
        PROP["opp", b] = (a,)


ANIMAL_LINES = tt.ANIMALS.replace("\n", "|").split("|")
ANIMALS = [Animal(*line.split()) for line in ANIMAL_LINES if line.strip()]
OPPOSITES = [pair.split() for pair in tt.OPPOSITES.split("|")]
tok(EOT)
tok(UNK)
learn_facts()


# ----------------------------------------------------------------------------------- distributions
class Dist(NamedTuple):
    """A categorical distribution over words."""
    ids: list[int]
    cum: list[float]                # cumulative probabilities
    logp: list[float]               # log-probabilities

    def pick(self, rng):
        """Draw a word: (its token, its log-probability)."""
        i = min(bisect(self.cum, rng.random()), len(self.ids) - 1)
        return self.ids[i], self.logp[i]

    @classmethod
    def of(cls, weights: dict[int, float]):
        """Normalise {token: weight} to a distribution."""
        total = sum(weights.values())
        p = [weight / total for weight in weights.values()]
        return cls(list(weights), list(accumulate(p)), [math.log(q) for q in p])


def zipf(words, shift=2):
    """Weigh words by 1 / (rank + shift), in their order: {token: weight}."""
    return {tok(word): 1 / (rank + shift) for rank, word in enumerate(dict.fromkeys(words))}


def mix(p, q, weight):
    """Mix two sets of weights, weight p + (1 - weight) q, after both are normalised."""
    sum_p = sum(p.values())
    sum_q = sum(q.values())
    mixed = {}
    for i in {**p, **q}:
        mixed[i] = weight * p.get(i, 0) / sum_p + (1 - weight) * q.get(i, 0) / sum_q
    return mixed


def topic_words(topic):
    """Split a topic's lists into words; its "lines" are templates."""
    return {name: text.split() for name, text in tt.TOPICS[topic].items() if name != "lines"}


def shared_weights():
    """Weigh the words of each list that does not depend on the topic: {list: {token: weight}}."""
    shift = dict(num=.5, color=1)
    weights = {name: zipf(words, shift.get(name, 2)) for name, words in tt.LISTS.items()}
    weights["opp"] = zipf(sum(OPPOSITES, []), 8)
    weights["nonsense"] = zipf(tt.NONSENSE, 30)
    weights["bird"] = zipf([animal.name for animal in ANIMALS if animal.kind == "bird"])
    weights["mood"] = zipf(tt.MOODS, 8)
    weights["nick"] = zipf(tt.CREATURES, 20)
    weights["girl"] = zipf(tt.GIRLS, 12)
    weights["boy"] = zipf(tt.BOYS, 12)
    weights["creature"] = zipf(tt.CREATURES, 12)
    weights["group"] = zipf(tt.GROUPS, 8)
    return weights


def pooled_weights(name):
    """Weigh the words that any topic has in its list `name`: {token: weight}."""
    pooled = []
    for topic in TOPICS:
        pooled += TOPIC_WORDS[topic][name]
    return zipf(pooled)


def topic_distributions(words):
    """Which distribution does each list of words have in one topic? {list: Dist}"""
    weights = dict(SHARED)
    for name, pooled in POOLED.items():         # mostly the topic's own words
        weights[name] = mix(zipf(words[name]), pooled, .8)
    every_animal = [animal.name for animal in ANIMALS]
    weights["animal"] = mix(zipf(words["animal"], 1), zipf(every_animal, .3), .6)
    weights["adj"] = mix(zipf(words["adj"]), SHARED["adj"], .35)
    weights["place"] = zipf(words["place"])
    weights["people"] = zipf(words["people"])
    return {name: Dist.of(of_word) for name, of_word in weights.items()}


TOPICS = list(tt.TOPICS)
TOPIC_WORDS = {topic: topic_words(topic) for topic in TOPICS}
SHARED = shared_weights()
POOLED = {name: pooled_weights(name) for name in ("obj", "thing", "food")}
DIST = [topic_distributions(words) for words in TOPIC_WORDS.values()]


def held(a, b):
    """Are the words a and b held out: never together in a story, always in a prompt?"""
    return (a * 7919 + b * 104729) % HELD_OUT == 0


@functools.lru_cache(maxsize=None)
def given(topic, name, others, want_held=False):
    """Which words of a topic's list `name` may stand with the words `others`?

    The list's distribution without `others` and without what is held out against any of them. With
    want_held: only what is held out against the last of them, if there is such a word.
    """
    dist = DIST[topic][name]
    weights = {i: math.exp(logp) for i, logp in zip(dist.ids, dist.logp) if i not in others}
    fit = {}
    for i, weight in weights.items():
        if not any(held(other, i) for other in others):
            fit[i] = weight
    if want_held:
        fit = {i: weight for i, weight in weights.items() if held(others[-1], i)} or fit
    return Dist.of(fit or dict.fromkeys(weights, 1.0))


# -------------------------------------------------------------------------------------- inflection
def add_s(word):
    """Form a noun's plural, or a verb's third person."""
    if word in tt.PLURALS:
        return tt.PLURALS[word]
    if re.search("(s|x|sh|ch|o)$", word):
        return word + "es"
    if re.search("[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + "s"


def inflect(verb, past, plural):
    """Put a verb into a tense and a number, third person."""
    if verb == "be" and past:
        return "were" if plural else "was"
    if verb == "be":
        return "are" if plural else "is"
    regular = verb, add_s(verb), verb + ("d" if verb[-1] == "e" else "ed")
    base, third, simple_past = tt.IRREGULAR.get(verb) or regular
    if past:
        return simple_past
    return base if plural else third


# --------------------------------------------------------------------------------------- templates
class Lit(NamedTuple):
    """Say these tokens."""
    ids: tuple


class Ref(NamedTuple):
    """Say what a register of the story holds, or a property of what it holds."""
    name: str
    prop: str
    capital: bool
    article: bool


class Pick(NamedTuple):
    """Choose from a distribution a word that may stand with the words in `avoid`, say it or a
    property of it, and keep it under `store`."""
    name: str
    prop: str
    capital: bool
    article: bool
    store: str
    avoid: list


class Count(NamedTuple):
    """Say number words, up or down."""
    name: str
    avoid: list
    capital: bool


class Mark(NamedTuple):
    """Say nothing: a prompt about this phenomenon may end here."""
    name: str


REGISTERS = set("P P0 P's he him his its child C C's che chim chis kid K Kcol W A Sp mood tod "
                "place L1 L2 L3 S1 S2 S3 S4".split())
# registers whose words the families list_again and rhyme_again say again
SAID_AGAIN = dict(list=["L1", "L2", "L3"], rhyme=["S1", "S2", "S3", "S4"])
NEVER_CAPITAL = ["L1", "S1", "S2", "S3", "S4"]              # said again to the letter
# inflected form -> {"agr": its forms of wrong number, "tense": those of wrong tense}
VERB_FORMS: dict[str, dict[str, set[str]]] = {}


@functools.lru_cache(maxsize=None)
def compile_template(text, past, plural, marks=False):
    """Turn a template into operations, for one tense and one number of the protagonist.

    With marks, the places where a prompt may be cut are operations too. The inflected verbs go into
    VERB_FORMS.
    """
    ops = []
    bound = set(REGISTERS)          # what has been kept by here, and can be said again
    is_start = True                 # does the next word begin a sentence?
    is_resumed = False              # is a quote's sentence interrupted by who says it?
    before = ""
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|\S+", text):
        if part[0] == "^":
            if marks:
                ops.append(Mark(part[1:]))
            continue

        if part[0] == "{":
            op = compile_slot(part, bound, is_start)
            ops.append(op)
            if isinstance(op, Pick):
                bound.add(op.store)
        else:
            word = inflect_part(part, past, plural)
            i = cap(tok(word)) if is_start and word[0].isalpha() else tok(word)
            append_literal(ops, i)

        # “ Oh no , ” said Tom , “ the boat is gone ! ”: the second quote begins no sentence.
        ends = part in (".", "!", "?") or part == "”" and before == "."
        is_start = ends or part == "“" and not is_resumed
        is_resumed = not is_start and (is_resumed or part == "”")
        before = part
    return ops


def compile_slot(part, bound, is_start):
    """Turn {store:name.prop~avoid~avoid}, or {a ..} with an article, into an operation."""
    has_article = part.startswith("{a ")
    body, *avoid = part[1:-1].removeprefix("a ").split("~")
    store, _, name = body.rpartition(":")
    name, _, prop = name.partition(".")
    if name in ("up", "down"):
        return Count(name, avoid, is_start)
    if name in bound and not store:
        return Ref(name, prop, is_start and name not in NEVER_CAPITAL, has_article)
    return Pick(name, prop, is_start, has_article, store, avoid)


def inflect_part(part, past, plural):
    """Which word is a part of a template? [go], [go s], past/present or a plain word."""
    if part[0] != "[":
        return part.split("/")[0 if past else 1] if "/" in part else part
    verb, _, who = part[1:-1].partition(" ")
    number = who == "p" if who else plural
    word = inflect(verb, past, number)
    wrong_tense = {inflect(verb, not past, any_number) for any_number in (False, True)}
    VERB_FORMS[word] = {"agr": {inflect(verb, past, not number)}, "tense": wrong_tense}
    return word


def append_literal(ops, i):
    """Add a token to the operations: to the last one, if that says plain tokens too."""
    if ops and isinstance(ops[-1], Lit):
        ops[-1] = Lit((*ops[-1].ids, i))
    else:
        ops.append(Lit((i,)))


class Template(NamedTuple):
    """A line of words.py."""
    text: str
    kinds: list                     # of protagonist that it suits, places in KINDS
    tenses: list                    # past? that it suits


SUITS = dict(h=[0, 1], k=[2], g=[3], n=[0, 1, 2])           # kinds of protagonist by a line's flag


def parse(line):
    """Read a line of words.py, 'h|<| text'."""
    *flags, text = line.strip().split("| ")
    flags = "".join(flags).replace("|", "")
    tenses = []
    if ">" not in flags:
        tenses.append(True)
    if "<" not in flags:
        tenses.append(False)
    return Template(text, SUITS.get(flags[:1], [0, 1, 2, 3]), tenses)


def read_families():
    """Read all templates: {family: its templates}, the topics' own under "topic:" and the topic."""
    templates = {}
    for name, block in tt.FAMILIES.items():
        templates[name] = [parse(line) for line in block.strip().split("\n")]
    for topic in TOPICS:
        lines = re.split(r" \| |\n", tt.TOPICS[topic]["lines"])
        templates["topic:" + topic] = [parse(line) for line in lines]
    return templates


FAMILIES = read_families()
N_TEMPLATES = sum(map(len, FAMILIES.values()))


@functools.lru_cache(maxsize=None)
def usable(family, kind, past, animal, want_held):
    """Which templates of a family suit the protagonist and the tense? Their texts.

    With an animal, for a fact about it: those whose number and the animal are held out, if
    want_held, and else those whose are not.
    """
    texts = []
    for number, template in enumerate(FAMILIES[family]):
        if kind in template.kinds and past in template.tenses:
            if animal is None or held(number, animal) == want_held:
                texts.append(template.text)
    return texts


NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()


@functools.lru_cache(maxsize=None)
def number_runs(direction, other, want_held):
    """Which runs of 3 to 6 numbers within one .. twelve may be counted, up or down?

    Those whose first word is not (or, with want_held, is) held out against the word `other`; all,
    if there is none. Each with a comma between its numbers.
    """
    words = [tok(word) for word in (NUMBERS if direction == "up" else NUMBERS[::-1])]
    runs = []
    for length in range(3, 7):
        for start in range(len(words) + 1 - length):
            runs.append(words[start:start + length])
    runs = [run for run in runs if held(run[0], other) == want_held] or runs
    return [with_commas(run) for run in runs]


def with_commas(run):
    """Put a comma between words."""
    said = [run[0]]
    for i in run[1:]:
        said += [tok(","), i]
    return said


# ------------------------------------------------------------------------------------------ stories
KINDS = ["girl", "boy", "creature", "group"]
KIND_P = [.27, .27, .26, .2]            # how likely each kind of protagonist is
PAST_P = .72                            # how likely the past tense is
PRONOUNS = [("she", "her", "her"), ("he", "him", "his"), ("it", "it", "its"),
            ("they", "them", "their")]
PLOTS = {name: steps.split() for name, steps in tt.PLOTS.items()}
FILL_P = .31                            # of one more filler sentence before a step of the plot
FAMILY_SHIFT = 56                       # state bits from here on: 1 + the place in SENTENCES, or 0
LONG = 110                              # tokens after which no filler is added
SPEAKERS = {"P": "protagonist", "C": "companion", None: "other"}


def state_names():
    """What does the generator know at each token? The names of the state's bits, in order."""
    names = ["topic: " + topic for topic in TOPICS]
    names += ["protagonist: " + kind for kind in KINDS]
    names += ["present tense"]
    names += ["mood: " + mood for mood in tt.MOODS]
    names += ["plot: " + plot for plot in PLOTS]
    names += ["last speaker: " + speaker for speaker in SPEAKERS.values()]
    names += ["time: " + time for time in tt.LISTS["tod"][1:]]
    return names + ["treasure is lost", "list is known", "rhyme is known"]


STATE = state_names()
BIT = {name: 1 << place for place, name in enumerate(STATE)}
# Families common enough to name. They are numbered: there are more of them than bits left.
SENTENCES = [family for family in tt.FAMILIES if family not in ("time", "scene")] + ["topic"]
FAMILY_BIT = {family: (place + 1) << FAMILY_SHIFT for place, family in enumerate(SENTENCES)}
BECOMES_KNOWN = {"list": "list is known", "rhyme": "rhyme is known", "lose": "treasure is lost"}

# Who speaks in a template:   ” [say] {P}   or   {P} [say] , “
SPEECH_VERB = r"\[(?:" + "|".join(tt.SPEECH) + r")[^]]*\]"
AFTER_QUOTE = rf"” {SPEECH_VERB} (?:\{{(P|C)\}}|the)"
BEFORE_QUOTE = rf"\{{(P|C)\}}[^“”]*{SPEECH_VERB}[^“”]*“"
SPEAKER = re.compile(f"{AFTER_QUOTE}|{BEFORE_QUOTE}")


class Story:
    """One story, as it is told.

    ids: its tokens. events: [(position, log-probability of the choices charged there)]. spans:
    [(position, state bits from there on)]. With marks it is told for prompts: pairs are held out,
    and cuts has [(position, phenomenon, registers, next operation)].
    """

    def __init__(self, rng, marks=False):
        self.rng = rng
        self.marks = marks
        self.ids = [ID[EOT]]
        self.events = []
        self.spans = []
        self.cuts = []
        self.used = set()               # templates
        self.debt = 0.0                 # log p of choices not yet spent
        self.so_far = 0                 # state bits that change as the story goes

        # Draw the plan. It is charged to the first word.
        self.topic = self.choose([1 / len(TOPICS)] * len(TOPICS))
        self.kind = self.choose(KIND_P)
        self.past = self.choose([PAST_P, 1 - PAST_P]) == 0
        self.plural = KINDS[self.kind] == "group"
        self.reg = {}                   # register -> tokens
        self.draw_characters()
        self.draw_plot()
        self.plan = self.plan_bits()

    def draw_characters(self):
        """Choose protagonist and companion, and the time, place, mood and others of the story."""
        reg = self.reg
        name = self.take(KINDS[self.kind])
        reg["P0"] = (name,)
        reg["P"] = (tok("the"), name) if self.plural else (name,)
        reg["P's"] = (*reg["P"], tok("'" if self.plural else "'s"))
        for register, pronoun in zip(("he", "him", "his"), PRONOUNS[self.kind]):
            reg[register] = (tok(pronoun),)
        reg["its"] = reg["his"]
        if KINDS[self.kind] in ("girl", "boy"):
            reg["child"] = (tok(KINDS[self.kind]),)

        sex = self.choose([.5, .5])
        reg["C"] = (self.take(KINDS[sex], name),)
        reg["C's"] = (*reg["C"], tok("'s"))
        for register, pronoun in zip(("che", "chim", "chis"), PRONOUNS[sex]):
            reg[register] = (tok(pronoun),)
        reg["kid"] = (tok(KINDS[sex]),)

        drawn_from = dict(mood="mood", tod="tod", place="place", W="people", A="animal")
        for register, name in drawn_from.items():
            reg[register] = (self.take(name),)
        if KINDS[self.kind] == "creature":
            reg["Sp"] = (self.take("animal", reg["A"][0]),)

    def draw_plot(self):
        """Choose the plot, its treasure, and what its list or its rhyme will say again."""
        self.plot = list(PLOTS)[self.choose([1 / len(PLOTS)] * len(PLOTS))]
        if self.plot in ("lost", "gift", "making"):
            self.reg["K"] = (self.take("obj"),)
            self.reg["Kcol"] = (self.take("color"),)
        said = []                       # each differs from those before it
        for step in PLOTS[self.plot]:
            for register in SAID_AGAIN.get(step, ()):
                word = self.take("food" if register[0] == "L" else "nonsense", *said)
                self.reg[register] = (word,)
                said.append(word)

    def plan_bits(self):
        """Which state bits hold for the whole story?"""
        time = "time: " + VOCAB[self.reg["tod"][0]]
        facts = ["topic: " + TOPICS[self.topic], "protagonist: " + KINDS[self.kind],
                 "plot: " + self.plot, "mood: " + VOCAB[self.reg["mood"][0]]]
        if time in BIT:                 # the first of the times has none
            facts.append(time)
        if not self.past:
            facts.append("present tense")
        return sum(BIT[fact] for fact in facts)

    def choose(self, p):
        """Draw a place i with probability p[i]."""
        i = min(bisect(list(accumulate(p)), self.rng.random()), len(p) - 1)
        self.debt += math.log(p[i])
        return i

    def uniform(self, options):
        """Draw one of some options, all equally likely."""
        self.debt -= math.log(len(options))
        return options[int(self.rng.random() * len(options))]

    def take(self, name, *others):
        """Draw a word of the topic's list `name` that may stand with the words `others`."""
        dist = given(self.topic, name, others, self.marks) if others else DIST[self.topic][name]
        i, logp = dist.pick(self.rng)
        self.debt += logp
        return i

    def tell(self, family):
        """Add the sentences of one template of a family: one that this story has not used, if there
        is one."""
        # Choose the template. The state holds from its first token on.
        key = "topic:" + TOPICS[self.topic] if family == "topic" else family
        animal = self.reg["A"][0] if family == "creature_fact" else None
        texts = usable(key, self.kind, self.past, animal, self.marks and animal is not None)
        text = self.uniform([text for text in texts if text not in self.used] or texts)
        self.used.add(text)
        self.spans.append((len(self.ids), self.plan | self.so_far | FAMILY_BIT.get(family, 0)))
        self.say(compile_template(text, self.past, self.plural, self.marks))

        # What is different after it?
        match = SPEAKER.search(text)
        if match:
            for speaker in SPEAKERS.values():
                self.so_far &= ~BIT["last speaker: " + speaker]
            self.so_far |= BIT["last speaker: " + SPEAKERS[match[1] or match[2]]]
        if family in BECOMES_KNOWN:
            self.so_far |= BIT[BECOMES_KNOWN[family]]
        if family == "find":
            self.so_far &= ~BIT["treasure is lost"]

    def say(self, ops):
        """Carry out a template's operations."""
        for n, op in enumerate(ops):
            if isinstance(op, Lit):
                self.put(op.ids)
            elif isinstance(op, Ref):
                value = self.reg[op.name]
                if op.prop:
                    value = PROP[op.prop, value[-1]]
                self.put(value, op.capital, op.article)
            elif isinstance(op, Pick):
                i = self.take(op.name, *(self.reg[register][-1] for register in op.avoid))
                if op.store:
                    self.reg[op.store] = (i,)
                self.put(PROP[op.prop, i] if op.prop else (i,), op.capital, op.article)
            elif isinstance(op, Count):
                other = self.reg[op.avoid[0]][-1]
                self.put(self.uniform(number_runs(op.name, other, self.marks)), op.capital)
            else:
                self.cuts.append((len(self.ids), op.name, dict(self.reg), ops[n + 1]))

    def put(self, value, capital=False, has_article=False):
        """Say some tokens, and charge to the first of them what was chosen since the last."""
        if self.debt:
            self.events.append((len(self.ids), self.debt))
            self.debt = 0.0
        if has_article:
            value = (article(value[0]), *value)
        if capital:
            value = (cap(value[0]), *value[1:])
        self.ids += value

    def tell_whole(self):
        """Tell opening, setting, meeting; the plot's steps with fillers between them; closing."""
        for family in ("opening", "setting", "meeting"):
            self.tell(family)
        for step in PLOTS[self.plot]:
            while len(self.ids) < LONG and self.choose([1 - FILL_P, FILL_P]):
                self.tell(self.uniform(tt.FILLERS))
            self.tell(step)
        self.tell("closing")
        return self


def tell(index):
    """Tell story number `index`, whole.

    The seed is a string, which Python hashes: some integers would seed equal streams.
    """
    return Story(random.Random(f"TinyTales {index}")).tell_whole()


# ---------------------------------------------------------------------- the rest of the vocabulary
def slots():
    """Which operations say a word that is not fixed? Those of all templates, in order.

    One of all that say the same words in the same form: they come hundreds of times."""
    known = set()
    for templates in FAMILIES.values():
        for template in templates:
            for past in (False, True):
                for plural in (False, True):
                    for op in compile_template(template.text, past, plural):
                        if not isinstance(op, (Ref, Pick)):
                            continue
                        form = (op.name, op.prop, op.capital and not op.article)
                        if form not in known:
                            known.add(form)
                            yield op


# registers of a story, and the lists of words that they can hold
FILLED_FROM = dict(P="girl boy creature", C="girl boy", A="animal", Sp="animal", W="people",
                   K="obj", Kcol="color")


def fillers(op):
    """Which words can fill a slot? In any topic; some more than once."""
    for dist in DIST:
        for name in FILLED_FROM.get(op.name, op.name).split():
            if name in dist:
                yield from dist[name].ids


def fill_vocabulary():
    """Give every word that a template can say its token now, in a fixed order: none comes later."""
    names = [*tt.GIRLS, *tt.BOYS, *tt.CREATURES, *tt.GROUPS]
    pronouns = sum(PRONOUNS, ())
    for word in [*names, "a", "an", "A", "An", *pronouns, *KINDS[:3], "'s", "'"]:
        tok(word)
    for op in slots():
        for i in fillers(op):
            if op.prop == "s" and ("s", i) not in PROP:
                PROP["s", i] = (tok(add_s(VOCAB[i])),)
            if op.capital and not op.article:
                cap(PROP[op.prop, i][0] if op.prop else i)
    for word in ["the", "she", "he", "it", "they", "her", "his", "its", "their", *NUMBERS]:
        cap(tok(word))


fill_vocabulary()
