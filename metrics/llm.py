"""How well does an LLM explain units? It takes the place of the rules of words.py: it explains and
it judges, at any OpenAI-compatible endpoint.

It sees windows of tokens with the unit's activity marked, and writes one sentence. Then, from that
sentence alone, it says of other windows whether the unit is active there (detection) and whether
marked tokens are the right ones (fuzzing), as Paulo et al. 2024 (arXiv:2410.13928) have it. It
explains from fit and is asked about test. Every result carries the model's name as "judge": these
scores and the rules' are never mixed. How its replies get here is chat.py's.

N tokens (position 0 of each row left out), U units, W windows, S tokens of a window
"""
import functools
import math
import random
import re

import torch

import common
import data
from metrics import columns
from metrics.columns import Column
from metrics.words import active_windows, cut, dense, random_order, recorded, scorable, windows

EXPLAIN = (
    "Below are passages on which one unit of a language model is active. The tokens where it is "
    "active stand in\n<< >>, followed by its activity from 0 to 10. Work out what these tokens, or "
    "what comes before them, have in common. End\nwith a line that starts with [EXPLANATION]: and "
    "says it in at most 30 words.")
JUDGE = {
    "det": "Does the passage hold at least one token that fits the explanation?",
    "fuzz": "Do the tokens in << >> fit the explanation?",
}
# in passages < and > are marks alone, and no <|special|> token is one of the judge's own
ESCAPES = str.maketrans({"<": "‹", ">": "›"})
ANSWERS = {"1": 1, "1.0": 1, "true": 1, "yes": 1, "y": 1,
           "0": 0, "0.0": 0, "false": 0, "no": 0, "n": 0}
# the number of a passage, and its answer: 2. yes; "2": true; passage 2 - 0; "passage": 2, "fits": 1
NUMBERED = re.compile(
    r"""(?<!\d)(\d{1,4})(?!\.?\d)(?:\s*["'*)\].:=>|→–—-]+|,\s*"\w+"\s*:)[\s"':*]*"""
    r"""(true|yes|false|no|[01])\b(?!\.\d)(?! *[a-z])""")


def passage(ids_S, value_S, vocab, numbers=False, marks=True):
    """Text of a window: where value > 0, in << >>, with the activity as a number from 0 to 10.
    Tokens of BPE and SentencePiece have spaces of their own."""
    share_S = value_S / value_S.max().clamp(min=1e-9)
    words = []
    tokens = data.spell(ids_S.tolist(), vocab)
    for token, value, share in zip(tokens, value_S, share_S.tolist()):
        word = token.translate(ESCAPES)
        if value > 0 and marks:
            word = f"<<{word}>>"
            if numbers:
                word += f" ({max(1, round(share * 10))})"
        words.append(word)
    return ("" if data.has_spaces(vocab) else " ").join(words)


def judge(client, explanation, passages, task, seed=0, batch=5):
    """0, 1 or None (no usable answer) for each passage: in random order, `batch` in a prompt."""
    order = random.Random(seed).sample(range(len(passages)), len(passages))
    answers = [None] * len(passages)
    for start in range(0, len(order), batch):
        asked = order[start:start + batch]
        listed = "\n".join(f"{n}. {passages[i]}" for n, i in enumerate(asked, 1))
        question = (f"Explanation of a unit: {explanation}\n"
                    f"For each of the {len(asked)} passages: {JUDGE[task]} "
                    f"Reply with a JSON list of 0 or 1, nothing else.\n{listed}")
        read = functools.partial(read_answers, n=len(asked))
        said = client.chat([dict(role="user", content=question)], read)
        for i, answer in zip(asked, said or []):
            answers[i] = answer
    return answers


def read_answers(reply, n):
    """Which answer, 0 or 1, does a reply give for each of n passages? None if it can't be read.

    It has a list in brackets, the last of that length counts; or each answer behind the number of
    its passage; or a line of answers, or lines of one each, and nothing else."""
    text = re.sub(r"```\w*", "", reply.lower())
    lists = re.findall(r"\[([^\[\]]*)\]", text)
    readings = [found for found in map(only_answers, lists) if len(found) == n]
    numbered = NUMBERED.findall(text)[-n:]
    if [int(number) for number, _ in numbered] == [*range(1, n + 1)]:
        readings.insert(0, [ANSWERS[answer] for _, answer in numbered])
    if n == 1 and [0] in readings and [1] in readings:
        return None                 # one is the number of the passage, and nobody knows which
    if not readings:
        pieces = [text, *text.splitlines()]
        found = [only_answers(piece.rpartition(":")[2]) for piece in pieces]
        readings = [answers for answers in found if len(answers) == n]
    return readings[-1] if readings else None


def only_answers(text):
    """The answers that a text lists; none if it says anything else."""
    words = re.findall(r"[-+]?\w+(?:\.\d+)?", text)
    is_other = re.search(r"[^\w\s,;.*'\"|()+-]", text) or any(word not in ANSWERS for word in words)
    return [] if is_other else [ANSWERS[word] for word in words]


def read_explanation(reply):
    """What does a reply say behind its last [EXPLANATION]:, on one line? A reply of one line needs
    no such mark. None if there are no words."""
    parts = re.split(r"\[explanation\]|\bexplanation\W*?:", reply, flags=re.I)
    lines = [line.strip(" *:\t") for line in parts[-1].splitlines()]
    lines = [line for line in lines if line]
    is_marked = len(parts) > 1
    if not lines or not is_marked and len(lines) > 1:
        return None
    return lines[0] if re.search(r"\w", lines[0]) else None


def windows_to_show(value_WS, shown):
    """Of one unit's active windows, `shown`: half are the strongest, half spread over the rest."""
    largest_W = value_WS.amax(1)
    n_active = (largest_W > 0).sum()
    order = largest_W.argsort(descending=True)[:n_active]
    half = min(shown, len(order)) // 2
    spread = torch.linspace(0, len(order) - half - 1, half).long()
    return torch.cat([order[:half], order[half:][spread]])


def balanced_accuracy(on_active, on_idle):
    """Of answers 0, 1 or None about active and about idle windows; NaN if one has no answer."""
    yes = [answer for answer in on_active if answer is not None]
    no = [answer for answer in on_idle if answer is not None]
    if not yes or not no:
        return math.nan
    return (sum(yes) / len(yes) + 1 - sum(no) / len(no)) / 2


def llm_explain(client, fit, test, rows_RT, rows2_RT, vocab, units, gen, shown=20, scored=20):
    """Have an LLM explain units: a text for each from `shown` windows of fit, and det and fuzz
    from `scored` active and as many inactive windows of test.

    det, fuzz: balanced accuracy of the answers given; failures: share of passages without one. A
    unit without a text, None, has no score, and its passages no answers.
    1 + 4 scored / 5 calls per unit."""
    T = rows_RT.shape[1]
    ids_WS = cut(rows_RT)
    ids2_WS = cut(rows2_RT)
    value_WSU = windows(dense(fit, units), T)
    value2_WSU = windows(dense(test, units), T)
    out = dict(judge=client.model, units=units, texts=[], det=[], fuzz=[])
    n_missing = 0
    n_asked = 0
    for u in range(len(units)):
        # its sentence, from fit
        passages = []
        for w in windows_to_show(value_WSU[..., u], shown):
            passages.append(passage(ids_WS[w], value_WSU[w, :, u], vocab, numbers=True))
        request = EXPLAIN + "\n" + "\n".join(passages)
        text = client.chat([dict(role="user", content=request)], read_explanation)
        out["texts"].append(text)

        # windows of test, active and idle; idle ones get as many marks, at random
        value_WS = value2_WSU[..., u]
        active_W = value_WS.amax(1) > 0
        places = [is_it.nonzero().squeeze(1) for is_it in (active_W, ~active_W)]
        active, idle = [w[torch.randperm(len(w), generator=gen)[:scored]] for w in places]
        n_on = (value_WS[active_W] > 0).sum(1).float().mean()
        n_marks = math.ceil(n_on.nan_to_num().item())
        rank_WS = random_order(len(value_WS), T, gen).to(value_WS.device)
        marked_WS = torch.where(active_W.unsqueeze(1), value_WS, (rank_WS < n_marks).float())

        # what it says of them, from its sentence alone
        for task in ("det", "fuzz"):
            passages = []
            for w in torch.cat([active, idle]):
                passages.append(passage(ids2_WS[w], marked_WS[w], vocab, marks=task == "fuzz"))
            answers = judge(client, text, passages, task) if text else [None] * len(passages)
            n_missing += answers.count(None)
            n_asked += len(answers)
            on_active = answers[:len(active)]
            out[task].append(balanced_accuracy(on_active, answers[len(active):]))
    return out | dict(failures=n_missing / max(1, n_asked))


# -------------------------------------------------------------------------------- for the table
COLUMNS = {
    "judge_det": Column(
        "LLM det", "up", beat="random", digits=3, table="by LLM",
        text="balanced accuracy of an LLM that tells windows where the unit is on from others by "
             "its own explanation; never mixed with the rules'"),
    "judge_fuzz": Column(
        "LLM fuzz", "up", beat="random", digits=3, table="by LLM",
        text="balanced accuracy of an LLM that tells right from wrong marks in a window"),
    "judge_failures": Column(
        "no answer", "down", beat=None, digits=3, table="by LLM",
        text="share of its answers that could not be used, those about units that it found no "
             "words for included"),
}


def measure(m, arena, gen):
    """How well does an LLM explain m's units? (numbers, details), as metrics/columns.py says."""
    fit, test, least = recorded(m, arena)
    windows = active_windows(fit, arena.fit[0].shape[1])
    units = scorable(windows, arena.explained, least, gen)
    found = llm_explain(arena.judge, fit, test, arena.fit[0], arena.test[0], arena.gpt.vocab,
                        units, gen)
    if found["failures"] == 1:
        common.fail(f"--judge_model {found['judge']}: none of its replies could be used")
    answers = {f"judge_{key}": torch.tensor(found[key]).nanmean().item() for key in ("det", "fuzz")}
    answers |= dict(judge=found["judge"], judge_failures=found["failures"],
                    judge_texts=found["texts"])
    return columns.split(COLUMNS, answers)
