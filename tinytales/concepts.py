"""CONCEPTS: named booleans with a known truth at every token, which units are held against.

    WORDS, PATTERNS     what the token itself is
    STRUCTURE           what the tokens so far determine
    STATE               what only the generator knows for certain: topic, mood, plot, who spoke last
    NEXT                what the next token is

All but STATE exist for any text whose tokens are words. HIERARCHY lists parents and children, for
splitting and absorption. V vocabulary, n tokens of a stream.
"""
import re

import numpy as np

from tinytales import words as tt
from tinytales.story import ANIMALS, EOT, FAMILY_SHIFT, SENTENCES, STATE, VERB_FORMS, add_s

# lists of words.py that hold nouns
NOUN_LISTS = "place obj thing people snack cloth body job wish kin room vow cons".split()


def word_list(name):
    """Look up the words of $name in words.py."""
    if name == "opposites":
        return tt.OPPOSITES.replace("|", " ").split()
    if name in tt.LISTS:
        return tt.LISTS[name]
    words = []
    for topic in tt.TOPICS.values():
        words += topic[name].split()
    return words


def with_plurals(words):
    """Add each word's plural."""
    return set(words) | {add_s(word) for word in words}


def nouns():
    """Which words are nouns? (singular forms, plural forms), two sets without a common word."""
    singular = {animal.name for animal in ANIMALS}
    for name in NOUN_LISTS:
        singular |= set(word_list(name))
    plural = {add_s(word) for word in singular} - singular

    # The other nouns of the templates come in both numbers.
    more = set(tt.MORE_NOUNS.split())
    plural |= {word for word in more if word in tt.PLURALS.values() or word.endswith("s")}
    singular |= more - plural
    return singular - plural, plural


def past_forms():
    """Which verb forms are past tense?"""
    irregular = {past for base, _, past in tt.IRREGULAR.values() if past != base}
    return (irregular | {form for form in VERB_FORMS if form.endswith("ed")}) & set(VERB_FORMS)


def speech_forms():
    """Which verb forms say who speaks?"""
    forms = set()
    for verb in tt.SPEECH:
        forms.update(tt.IRREGULAR.get(verb, (verb, add_s(verb), verb + "ed")))
    return forms & set(VERB_FORMS)


def listed_words(entries):
    """Which words does a line of CONCEPT_WORDS list? $name stands for a list, $ for itself."""
    words = set()
    for entry in entries.split():
        is_list = entry[0] == "$" and len(entry) > 1
        words.update(word_list(entry[1:]) if is_list else [entry])
    return words


def is_cased(concept):
    """Does a concept tell capital letters from small ones? Names do."""
    return concept.endswith("name")


def word_concepts():
    """Which words does each concept of the token itself hold? {concept: set of words}.

    In lower case, but for names. The order of the concepts is that of the columns of `labels`.
    """
    # What follows from the lists that stories are made of.
    singular, plural = nouns()
    third = {form for form in VERB_FORMS if form.endswith("s") and form not in ("is", "was")}
    out = {"noun": singular | plural, "singular noun": singular, "plural noun": plural,
           "verb": set(VERB_FORMS), "past-tense verb": past_forms(),
           "speech verb": speech_forms(), "third-person verb": third}
    out["animal"] = with_plurals([animal.name for animal in ANIMALS])
    for name in ("farm animal", "wild animal", "bird", "pet"):
        kind = name.split()[0]
        out[name] = with_plurals([animal.name for animal in ANIMALS if animal.kind == kind])
    out["animal sound"] = {animal.sound for animal in ANIMALS}
    out["animal home"] = {animal.home for animal in ANIMALS}
    out["food"] = {*word_list("food"), *word_list("snack"), "bread", "milk", "flour", "sugar"}
    out["food"] |= {animal.food for animal in ANIMALS}
    out["nonsense word"] = set(tt.NONSENSE)
    out["girl's name"] = set(tt.GIRLS)
    out["boy's name"] = set(tt.BOYS)
    out["creature's name"] = set(tt.CREATURES)

    # What is written out as "concept: words"; it may add to a concept.
    for line in tt.CONCEPT_WORDS.strip().split("\n"):
        name, entries = line.split(": ", 1)
        out[name] = out.get(name, set()) | listed_words(entries)

    for name, words in out.items():
        if not is_cased(name):
            out[name] = {word.lower() for word in words}
    return out


def pattern_concepts():
    """Which regular expression does each concept of a word's letters match? {concept: pattern}"""
    out = {f"starts with {letter}": f"(?i)^{letter}" for letter in "abcdefghijklmnoprstuvwy"}
    for ending in ("s", "ed", "ing", "ly", "y", "er", "e"):
        out[f"ends with -{ending}"] = f"(?i).{ending}$"
    # letters of any script; Python's re has no class for the capital ones
    capitals = "".join(filter(str.isupper, map(chr, range(1 << 16))))
    out["capitalised"] = f"^[{capitals}]"
    out["long word (8 letters)"] = r"^(?:[^\W\d_]|-){8}"
    out["double letter"] = r"([^\W\d_])\1"
    return out


def hierarchy():
    """Read words.py's HIERARCHY: [(parent, child)]."""
    pairs = tt.HIERARCHY.strip().replace("\n", " | ").split(" | ")
    return [tuple(pair.strip().split(" > ")) for pair in pairs]


WORDS = word_concepts()
PATTERNS = pattern_concepts()
STRUCTURE = ["sentence: first word", "sentence: second word", "sentence: tenth word or later",
             "inside quotes", "subordinate clause", "after a comma", "after an article",
             "after a name", "list: second item or later", "story: first 16 tokens",
             "story: after 100 tokens", "repeated bigram"]
NEXT = ["noun", "plural noun", "verb", "past-tense verb", "adjective", "pronoun", "preposition",
        "number", "animal", "food", "comma", "sentence end mark", "opening quote", "closing quote",
        "speech verb", "colour", "girl's name", "boy's name", "possessive", "article", "the", "a",
        "and", "was", "is", "to", "in", "with", "of", "said", "there", "called", "on", "from",
        "day", "its", "full stop"]
HIERARCHY = hierarchy()


def concept_names(with_state):
    """Which concepts are there? All names, in the order of the columns of `labels`."""
    state = [*STATE, *(f"sentence: {family}" for family in SENTENCES)] if with_state else []
    return [*WORDS, *PATTERNS, *STRUCTURE, *state, *(f"next: {name}" for name in NEXT)]


def lexical(vocab):
    """Which tokens of a vocabulary have each concept of the token itself? (V, words and patterns)

    vocab: tokens as they are read (data.spell); spaces at their ends do not count.
    """
    plain = [word.strip() for word in vocab]
    cased = [readings(word) for word in plain]
    lower = [readings(word.lower()) for word in plain]
    columns = []
    for name, words in WORDS.items():
        tokens = cased if is_cased(name) else lower
        columns.append([not words.isdisjoint(token) for token in tokens])
    for pattern in PATTERNS.values():
        columns.append([bool(re.search(pattern, word)) for word in plain])
    is_word_V = np.array([word != EOT for word in plain])
    return np.array(columns).T & is_word_V[:, None]


def readings(word):
    """Which words is a token? Itself; one of several marks, such as GPT-2's ." or ," is each of
    them too."""
    has_letters = any(character.isalnum() for character in word)
    return {word} if has_letters else {word, *word}


def follows(mark):
    """Is the token before marked? (n)"""
    return np.concatenate([[False], mark[:-1]])


def since(mark):
    """How many tokens ago was the last that is marked? (n): 0 on a marked one itself."""
    position = np.arange(len(mark))
    return position - np.maximum.accumulate(np.where(mark, position, -1))


def is_repeated(ids, document, V):
    """Have a token and the one before it stood together earlier in the story? (n)"""
    previous = np.concatenate([[0], ids[:-1]])
    bigram = (document * V + previous) * V + ids            # one number for each, and each story
    _, first_places = np.unique(bigram, return_index=True)
    repeated = np.ones(len(ids), bool)
    repeated[first_places] = False
    return repeated


class Stream:
    """Tokens in a row, of which one can ask where they are a certain word or have a concept."""
    def __init__(self, ids, vocab, table):
        self.ids = ids
        self.index = {}                                     # {word: ids}, with a space or without
        for i, word in enumerate(vocab):
            for reading in readings(word.strip()):
                self.index.setdefault(reading, []).append(i)
        self.table = table                                  # lexical(vocab)
        self.names = [*WORDS, *PATTERNS]

    def is_token(self, word):
        return np.isin(self.ids, self.index.get(word, []))

    def has(self, concept):
        return self.table[self.ids, self.names.index(concept)]


def structural(ids, vocab, table):
    """Which concepts do the tokens so far determine? (n, len(STRUCTURE))

    ids: a stream that begins with a document; table: lexical(vocab).
    """
    stream = Stream(ids, vocab, table)
    document = stream.is_token(EOT)
    end = stream.has("sentence end mark")
    opening = stream.is_token("“")
    closing = stream.is_token("”")
    comma = stream.is_token(",")
    mark = stream.has("punctuation") | document
    facts = {}

    # A sentence begins after a document's mark, an end mark, or an end mark and a closing quote.
    begins = follows(document) | follows(end) | follows(closing) & follows(follows(end))
    first = begins & ~closing & ~document
    facts["sentence: first word"] = first
    facts["sentence: second word"] = follows(first) & ~closing
    facts["sentence: tenth word or later"] = since(first) >= 9

    # Straight quotes open and close in turn; curly ones are open until they close or the text ends.
    in_straight = np.cumsum(stream.is_token('"')) % 2 == 1
    in_curly = since(opening) < np.minimum(since(closing), since(document))
    facts["inside quotes"] = (in_straight | in_curly) & ~opening

    facts["subordinate clause"] = since(stream.has("subordinator")) < since(mark)
    facts["after a comma"] = follows(comma)
    facts["after an article"] = follows(stream.has("article"))
    girl_or_boy = stream.has("girl's name") | stream.has("boy's name")
    facts["after a name"] = follows(girl_or_boy | stream.has("creature's name"))

    # A list stands after a colon, up to the sentence's end; its second item follows a comma.
    colon = since(stream.is_token(":"))
    is_later_item = (since(comma) < colon) & (colon < since(end | document))
    facts["list: second item or later"] = is_later_item & ~mark

    # In a text without documents nobody knows where a story begins.
    has_stories = document.any()
    facts["story: first 16 tokens"] = has_stories & (since(document) <= 16)
    facts["story: after 100 tokens"] = has_stories & (since(document) > 100)
    facts["repeated bigram"] = is_repeated(ids, np.cumsum(document), len(vocab)) & ~mark
    return np.stack([facts[name] for name in STRUCTURE], 1) & ~document[:, None]


def labels(ids, vocab, table, state=None):
    """Which concepts are true at each token of a stream? (n, all concepts)

    table: lexical(vocab); state (n): the generator's bits, if there are any. What follows the last
    token is unknown and counts as false.
    """
    columns = [table[ids], structural(ids, vocab, table)]

    # The state: a bit for each fact, and above them the number of the sentence's family.
    if state is not None:
        bit = np.arange(len(STATE), dtype=np.uint64)
        columns.append((state[:, None] >> bit & np.uint64(1)).astype(bool))
        family = 1 + np.arange(len(SENTENCES), dtype=np.uint64)
        columns.append((state >> np.uint64(FAMILY_SHIFT))[:, None] == family)

    names = [*WORDS, *PATTERNS]
    places = [names.index(name) for name in NEXT]
    after = np.zeros((len(ids), len(NEXT)), bool)
    after[:-1] = table[ids[1:]][:, places]
    return np.concatenate([*columns, after], 1)
