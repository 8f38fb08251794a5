"""CONCEPTS: named booleans with a known truth at every token, the ground truth that units are held against.

Four kinds: what the token itself is (WORDS, PATTERNS); what the tokens so far determine (STRUCTURE); what only the
generator knows for certain (STATE: topic, mood, plot, who spoke last); what the next token is (NEXT). All but STATE
exist for any text whose tokens are words. HIERARCHY lists parents and children, for splitting and absorption.
"""
import re

import numpy as np

from tinytales import words as tt
from tinytales.story import ANIMALS, EOT, FAMILY_SHIFT, SENTENCES, STATE, VERB_FORMS, add_s


def word_list(name):
    """The words of $name in words.py."""
    if name == "opposites":
        return tt.OPPOSITES.replace("|", " ").split()
    return tt.LISTS[name] if name in tt.LISTS else [w for topic in tt.TOPICS.values() for w in topic[name].split()]


def word_concepts():
    """{concept: set of words in lower case}."""
    both = lambda words: {form for w in words for form in (w, add_s(w))}
    kinds = {"farm animal": "farm", "wild animal": "wild", "bird": "bird", "pet": "pet"}
    lists = "place obj thing people snack cloth body job wish kin room vow cons".split()
    singular = {w for name in lists for w in word_list(name)} | {a[0] for a in ANIMALS}
    more = tt.MORE_NOUNS.split()
    plural = {add_s(w) for w in singular} - singular | {w for w in more if w in tt.PLURALS.values() or w.endswith("s")}
    singular |= set(more) - plural
    past = {v[2] for v in tt.IRREGULAR.values() if v[2] != v[0]} | {f for f in VERB_FORMS if f.endswith("ed")}
    speech = {f for v in tt.SPEECH for f in tt.IRREGULAR.get(v, (v, add_s(v), v + "ed"))}
    out = {
        "noun": singular | plural, "singular noun": singular - plural, "plural noun": plural, "verb": set(VERB_FORMS),
        "past-tense verb": past & set(VERB_FORMS), "speech verb": speech & set(VERB_FORMS),
        "third-person verb": {f for f in VERB_FORMS if f.endswith("s") and f not in ("is", "was")},
        "animal": both(a[0] for a in ANIMALS),
        **{k: both(a[0] for a in ANIMALS if a[1] == v) for k, v in kinds.items()},
        "animal sound": {a[2] for a in ANIMALS}, "animal home": {a[4] for a in ANIMALS},
        "food": {*word_list("food"), *word_list("snack"), *(a[5] for a in ANIMALS), "bread", "milk", "flour", "sugar"},
        "nonsense word": set(tt.NONSENSE), "girl's name": set(tt.GIRLS), "boy's name": set(tt.BOYS),
        "creature's name": set(tt.CREATURES)}
    for line in tt.CONCEPT_WORDS.strip().split("\n"):
        name, words = line.split(": ", 1)
        found = {v for w in words.split() for v in (word_list(w[1:]) if w[0] == "$" and len(w) > 1 else [w])}
        out[name] = out.get(name, set()) | found
    return {name: words if name.endswith("name") else {w.lower() for w in words} for name, words in out.items()}


WORDS = word_concepts()
PATTERNS = {**{f"starts with {c}": f"(?i)^{c}" for c in "abcdefghijklmnoprstuvwy"},
            **{f"ends with -{s}": f"(?i).{s}$" for s in ("s", "ed", "ing", "ly", "y", "er", "e")},
            "capitalised": "^[A-Z]", "long word (8 letters)": "^[A-Za-z-]{8}", "double letter": "([a-z])\\1"}
STRUCTURE = ["sentence: first word", "sentence: second word", "sentence: tenth word or later", "inside quotes",
             "subordinate clause", "after a comma", "after an article", "after a name", "list: second item or later",
             "story: first 16 tokens", "story: after 100 tokens", "repeated bigram"]
NEXT = ["noun", "plural noun", "verb", "past-tense verb", "adjective", "pronoun", "preposition", "number", "animal",
        "food", "comma", "sentence end mark", "opening quote", "closing quote", "speech verb", "colour", "girl's name",
        "boy's name", "possessive", "article", "the", "a", "and", "was", "is", "to", "in", "with", "of", "said",
        "there", "called", "on", "from", "day", "its", "full stop"]
HIERARCHY = [tuple(pair.strip().split(" > ")) for pair in tt.HIERARCHY.strip().replace("\n", " | ").split(" | ")]


def concept_names(with_state):
    """All concepts, in the order of the columns of `labels`."""
    state = [*STATE, *("sentence: " + f for f in SENTENCES)] if with_state else []
    return [*WORDS, *PATTERNS, *STRUCTURE, *state, *("next: " + c for c in NEXT)]


def lexical(vocab):
    """Truth (V, words and patterns) for any list of token strings."""
    plain = [w.replace("Ġ", "").strip() for w in vocab]
    columns = [[w != EOT and (w if name.endswith("name") else w.lower()) in words for w in plain]
               for name, words in WORDS.items()]
    columns += [[w != EOT and bool(re.search(p, w)) for w in plain] for p in PATTERNS.values()]
    return np.array(columns).T


def structural(ids, vocab, table):
    """Truth (n, len(STRUCTURE)) along a stream of n tokens that begins with a document."""
    index, names = {w: i for i, w in enumerate(vocab)}, [*WORDS, *PATTERNS]
    is_ = lambda concept: table[ids, names.index(concept)]
    token = lambda w: ids == index.get(w, -1)
    before = lambda x: np.concatenate([[False], x[:-1]])
    position = np.arange(len(ids))
    since = lambda mark: position - np.maximum.accumulate(np.where(mark, position, -1))       # 0 on the mark itself
    doc, end, close, comma = token(EOT), is_("sentence end mark"), token("”"), token(",")
    marks = is_("punctuation") | doc
    first = (before(doc) | before(end) | before(close) & before(before(end))) & ~close & ~doc
    quote = (np.cumsum(token('"')) % 2 == 1) | (since(token("“")) < np.minimum(since(close), since(doc)))
    name = is_("girl's name") | is_("boy's name") | is_("creature's name")
    colon, stories = since(token(":")), doc.any()
    bigram = (np.cumsum(doc) * len(vocab) + np.concatenate([[0], ids[:-1]])) * len(vocab) + ids     # within its story
    seen = np.ones(len(ids), bool)
    seen[np.unique(bigram, return_index=True)[1]] = False
    columns = [first, before(first) & ~close, since(first) >= 9, quote & ~token("“"),
               since(is_("subordinator")) < since(marks), before(comma), before(is_("article")), before(name),
               (since(comma) < colon) & (colon < since(end | doc)) & ~marks,
               stories & (since(doc) <= 16), stories & (since(doc) > 100), seen & ~marks]
    return np.stack(columns, 1) & ~doc[:, None]


def labels(ids, vocab, table, state=None):
    """Truth (n, all concepts) along a stream of tokens. table = lexical(vocab); state (n,): the generator's bits, if
    any. What follows the last token is unknown and counts as false."""
    names = [*WORDS, *PATTERNS]
    columns = [table[ids], structural(ids, vocab, table)]
    if state is not None:
        columns.append((state[:, None] >> np.arange(len(STATE), dtype=np.uint64) & np.uint64(1)).astype(bool))
        columns.append((state >> np.uint64(FAMILY_SHIFT))[:, None] == 1 + np.arange(len(SENTENCES), dtype=np.uint64))
    after = np.zeros((len(ids), len(NEXT)), bool)
    after[:-1] = table[ids[1:]][:, [names.index(c) for c in NEXT]]
    return np.concatenate([*columns, after], 1)
