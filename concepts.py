"""CONCEPTS: named booleans with a known truth at every token, the ground truth that units are held against.

Four kinds. word: what the token itself is. structure: what the tokens so far determine. state: what only the generator
knows for certain (topic, mood, plot, who spoke last). next: what the next token is. The first, second and last exist for
any text whose tokens are words; state needs TinyTales. HIERARCHY lists parents and children for splitting and absorption.
"""
import re

import numpy as np

import tinytales as tt
from story import ANIMALS, EOT, STATE, VERB_FORMS, add_s

N = lambda *lists: {w for name in lists for w in (tt.LISTS[name] if name in tt.LISTS else
                                                 [w for t in tt.TOPICS.values() for w in t[name].split()])}
_kind = lambda kind: {form for a in ANIMALS if a[1] == kind for form in (a[0], add_s(a[0]))}
_singular = N("place", "obj", "thing", "people", "snack", "cloth", "body", "job", "wish", "kin", "room", "vow", "cons") | {
    a[0] for a in ANIMALS} | set("girl boy story day hand head door house window road friend name box bag sky wind sun rain song water".split())
_plural = {add_s(w) for w in _singular} - _singular | set("hands eyes ears days minutes nights parts miles points children tears windows".split())
_forms = {w for w in VERB_FORMS}
_third = {w for w in _forms if w.endswith("s") and w not in ("is", "was")}
_past = {w for w in _forms if re.search("ed$", w)} | {v[2] for v in tt.IRREGULAR.values() if v[2] not in (v[0],)} & _forms
_w = str.split

WORDS = {   # a concept holds where the token, in lower case, is in the set
    "noun": _singular | _plural, "singular noun": _singular - _plural, "plural noun": _plural, "verb": _forms, "past-tense verb": _past,
    "third-person verb": _third, "speech verb": {f for v in tt.SPEECH for f in (v, v + "s", "said", "says", v + "ed", "cries", "cried", "replies",
                                                                               "replied", "sang")} & _forms,
    "be": set(_w("is are was were be")), "have": set(_w("has have had")), "motion verb": set(_w(
        "go goes went run runs ran come comes came walk walks walked climb climbs climbed jump jumps jumped follow follows followed "
        "hop hops hopped creep creeps crept skip skips skipped swim swims swam fly flies flew leave leaves left travel travelled")),
    "perception verb": set(_w("see sees saw hear hears heard look looks looked watch watches watched listen listens listened smell smells "
                              "smelled touch touches touched notice notices noticed feel feels felt find finds found")),
    "adjective": N("adj", "size", "feel", "wx") | set(tt.MOODS) | set(_w(tt.OPPOSITES.replace("|", " "))), "size": N("size"), "feeling": N("feel") | set(tt.MOODS),
    "colour": N("color"), "number": N("num") | {"one"}, "adverb": N("adv"), "opposite pair": set(_w(tt.OPPOSITES.replace("|", " "))),
    "preposition": set(_w("in on at to from with of under behind near beside between across over for about after before into out above around through")),
    "place preposition": set(_w("in on at under behind near beside between across over above around through")),
    "determiner": set(_w("the a an this that each every no some")), "article": set(_w("the a an")), "indefinite article": set(_w("a an")),
    "pronoun": set(_w("he she it they him her them i you we me us")), "feminine pronoun": set(_w("she her")), "masculine pronoun": set(_w("he him his")),
    "plural pronoun": set(_w("they them their")), "first or second person": set(_w("i you we me us my your our")), "possessive": set(_w("his her its their my your our 's '")),
    "conjunction": set(_w("that and but because when if while so until than as")), "subordinator": set(_w("because when if while so until that")),
    "negation": set(_w("not no never nobody nothing cannot")), "question word": set(_w("what where why how who")), "auxiliary": set(_w("is are was were be has have had do does did can could will would must may")),
    "animal": {f for a in ANIMALS for f in (a[0], add_s(a[0]))}, "farm animal": _kind("farm"), "wild animal": _kind("wild"),     "bird": _kind("bird"), "pet": _kind("pet"), "animal sound": {a[2] for a in ANIMALS}, "animal home": {a[4] for a in ANIMALS},
    "food": N("food", "snack") | {a[5] for a in ANIMALS} | {"bread", "milk", "flour", "sugar"}, "fruit": set(_w(
        "apple apples orange oranges pear plum plums peach apricot banana bananas grapes figs melons berries strawberries olives mangoes")),
    "clothing": N("cloth") | set(_w("scarf mitten hat bonnet boot boots shoe shoes slipper nightcap cloak")), "body part": N("body") | set(_w("hands eyes ears hair face lips fingers knees chin")),
    "place": N("place", "room"), "person": N("people", "job") | set(_w("girl boy")), "relative": N("kin"), "child": set(_w("girl boy")),
    "time of day": N("tod"), "weekday": {d.lower() for d in N("weekday")}, "month": {m.lower() for m in N("month")},
    "weather": N("wx") | set(_w("rain snow wind fog thunder rainbow sky cloud sun")), "nonsense word": set(tt.NONSENSE),     "plant": set(_w("tree bush rose tulip daisy sunflower oak fern bramble willow pine hedge leaf leaves branch flower flowers seeds roses reed reeds grass moss log acorn mushroom")),
        "tool": set(_w("hammer saw nail wrench screw brush ladder spade rake shovel trowel pitchfork rope axe toolbox scissors paddle oar")),
        "furniture": set(_w("table chair bench bed desk shelf shelves stool cupboard counter oven stove window door curtain throne workbench bookcase")),
    "girl's name": {g.lower() for g in tt.GIRLS}, "boy's name": {b.lower() for b in tt.BOYS}, "creature's name": {c.lower() for c in tt.CREATURES} - {"button", "acorn", "pepper", "biscuit", "moss", "pebble"},
    "comma": {","}, "full stop": {"."}, "exclamation or question mark": {"!", "?"}, "opening quote": {"“"}, "closing quote": {"”"}, "punctuation": set(".,!?:“”;"),
    "sentence end mark": set(".!?"), "the": {"the"}, "and": {"and"}, "said": {"said", "says"}, "to": {"to"}, "of": {"of"}, "with": {"with"},
    "in": {"in"}, "she": {"she"}, "he": {"he"}, "it": {"it"}, "they": {"they"}, "thing": {"thing"} | N("thing"), "cow": {"cow", "cows"},     "red": {"red"}, "happy": {"happy"}, "not": {"not"}, "is": {"is"}, "was": {"was"}, "were": {"were"}, "girl": {"girl"}, "boy": {"boy"},
}
PATTERNS = {**{f"starts with {c}": f"(?i)^{c}" for c in "abcdefghijklmnoprstuvwy"}, **{f"ends with -{s}": f"(?i).{s}$" for s in ("s", "ed", "ing", "ly", "y", "er", "e")},
            "capitalised": "^[A-Z]", "long word (8 letters)": "^[A-Za-z-]{8}", "double letter": "([a-z])\\1"}
STRUCTURE = ["sentence: first word", "sentence: second word", "sentence: tenth word or later", "inside quotes", "subordinate clause", "after a comma",
             "after an article", "after a name", "list: second item or later", "story: first 16 tokens", "story: after 100 tokens", "repeated bigram"]
NEXT = ["noun", "plural noun", "verb", "past-tense verb", "adjective", "pronoun", "preposition", "number", "animal", "food", "comma", "sentence end mark",
        "opening quote", "closing quote", "speech verb", "colour", "girl's name", "boy's name", "possessive", "article"]
HIERARCHY = [("animal", c) for c in ("farm animal", "wild animal", "bird", "pet")] + [
    ("noun", "singular noun"), ("noun", "plural noun"), ("noun", "animal"), ("farm animal", "cow"), ("verb", "past-tense verb"),
    ("verb", "third-person verb"), ("verb", "speech verb"), ("verb", "motion verb"), ("verb", "perception verb"), ("speech verb", "said"),
    ("auxiliary", "be"), ("auxiliary", "have"), ("be", "is"), ("be", "was"), ("be", "were"), ("determiner", "article"), ("article", "the"), ("article", "indefinite article"),
    ("preposition", "place preposition"), ("preposition", "to"), ("preposition", "with"), ("place preposition", "in"), ("pronoun", "she"), ("pronoun", "it"),
    ("feminine pronoun", "she"), ("masculine pronoun", "he"), ("plural pronoun", "they"), ("conjunction", "subordinator"), ("conjunction", "and"), 
    ("negation", "not"), ("colour", "red"), ("feeling", "happy"), ("adjective", "size"), ("adjective", "feeling"), ("punctuation", "comma"),
    ("punctuation", "full stop"), ("punctuation", "opening quote"), ("punctuation", "closing quote"), ("child", "girl"), ("child", "boy"), ("person", "child"), ("food", "fruit"),
    ("starts with s", "said"), ("starts with t", "the"), ("starts with w", "with"), ("starts with i", "in"), ("ends with -s", "plural pronoun")]
HIERARCHY = [h for h in HIERARCHY if h != ("ends with -s", "plural pronoun")]


def lexical(vocab):
    """Names and a table (V, n) of the word concepts for any list of token strings."""
    plain = [w.replace("Ġ", "").strip() for w in vocab]
    columns = [[w.lower() in words and w != EOT for w in plain] for words in WORDS.values()]
    columns += [[bool(re.search(p, w)) and w != EOT for w in plain] for p in PATTERNS.values()]
    return [*WORDS, *PATTERNS], np.array(columns).T


def structural(ids, vocab, table, names):
    """Truth (n, len(STRUCTURE)) along a stream of tokens that begins with a document."""
    n, word = len(ids), {w: i for i, w in enumerate(vocab)}
    col = lambda name: table[ids, names.index(name)]
    is_ = lambda *ws: np.isin(ids, [word.get(w, -1) for w in ws])
    position = np.arange(n)
    since = lambda mark: position - np.maximum.accumulate(np.where(mark, position, -1))        # tokens since the last mark; 0 on it
    before = lambda x: np.concatenate([[False], x[:-1]])
    doc, end, close = is_(EOT), col("sentence end mark"), is_("”")
    first = (before(doc) | before(end) | (before(close) & before(before(end)))) & ~close & ~doc
    quote = (np.cumsum(is_('"')) % 2 == 1) | (since(is_("“")) < np.minimum(since(close), since(doc)))
    marks = col("punctuation") | doc
    since_colon, since_end = since(is_(":")), since(end | doc)
    key = (np.cumsum(doc) * len(vocab) + np.concatenate([[0], ids[:-1]])) * len(vocab) + ids     # document, bigram
    pair = np.ones(n, bool)
    pair[np.unique(key, return_index=True)[1]] = False
    name = col("girl's name") | col("boy's name") | col("creature's name")
    columns = [first, before(first) & ~close, since(first) >= 9, quote & ~is_("“"), since(col("subordinator")) < since(marks), before(is_(",")),
               before(col("article")), before(name), (since(is_(",")) < since_colon) & (since_colon < since_end) & ~marks,
               since(doc) <= 16, since(doc) > 100, pair & ~marks]
    return np.stack(columns, 1) & ~doc[:, None]


def labels(ids, vocab, table, names, state=None):
    """Truth (n, all concepts) along a stream of tokens; state (n,) holds the generator's bits, where there are any."""
    columns = [table[ids], structural(ids, vocab, table, names)]
    if state is not None:
        columns.append((state[:, None] >> np.arange(len(STATE), dtype=np.uint64) & np.uint64(1)).astype(bool))
    after = table[np.concatenate([ids[1:], ids[:1]])]
    columns.append(after[:, [names.index(c) for c in NEXT]])
    return np.concatenate(columns, 1)


def concept_names(names, with_state):
    return [*names, *STRUCTURE, *(STATE if with_state else []), *("next: " + c for c in NEXT)]
