"""How well does an LLM explain units? It takes the place of the rules of words.py: it explains and
it judges, at any OpenAI-compatible endpoint.

It sees windows of tokens with the unit's activity marked, and writes one sentence. Then, from that
sentence alone, it says of other windows whether the unit is active there (detection) and whether
marked tokens are the right ones (fuzzing), as Paulo et al. 2024 (arXiv:2410.13928) have it. It
explains from fit and is asked about test. Every result carries the model's name as "judge": these
scores and the rules' are never mixed. Standard library only.

N tokens (position 0 of each row left out), U units, W windows, S tokens of a window
"""
import hashlib
import json
import math
import os
import random
import re
import time
import urllib.request
from pathlib import Path

import torch

import common
from metrics import columns
from metrics.columns import Column
from metrics.words import active_windows, dense, recorded, scorable, windows


class ChatClient:
    """Any OpenAI-compatible endpoint. Its key comes from the environment and is stored nowhere;
    replies are cached."""

    def __init__(self, base_url, model, key_env="OPENAI_API_KEY", timeout=60, retries=4, wait=1.,
                 cache="cache/judge"):
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model = model
        self.key = os.environ.get(key_env)
        self.timeout = timeout
        self.retries = retries
        self.wait = wait                # seconds before the second try, doubled for each more
        self.cache = Path(cache)

    def chat(self, messages):
        """The reply to some messages; fails if the endpoint gives none after all tries."""
        body = json.dumps(dict(model=self.model, messages=messages, temperature=0,
                               max_tokens=200)).encode()
        path = self.cache / hashlib.sha256(self.url.encode() + body).hexdigest()
        if path.exists():
            return path.read_text(encoding="utf-8")
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        for attempt in range(self.retries + 1):
            try:
                reply = self.post(body, headers)
                common.write(path, reply.encode())
                return reply
            except (OSError, ValueError, LookupError, TypeError) as e:
                # HTTPError and URLError are OSErrors; only the first has a code. To try again
                # helps where there were too many requests, or the server is at fault
                code = getattr(e, "code", 500)
                is_final = code != 429 and code < 500
                if attempt == self.retries or is_final:
                    common.fail(f"--judge_url {self.url}: {e}")
                time.sleep(self.wait * 2 ** attempt)

    def post(self, body, headers):
        """One request: the text of the reply's message."""
        request = urllib.request.Request(self.url, body, headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            return json.load(response)["choices"][0]["message"]["content"]


EXPLAIN = (
    "Below are passages on which one unit of a language model is active. The tokens where it is "
    "active stand in\n<< >>, followed by its activity from 0 to 10. Work out what these tokens, or "
    "what comes before them, have in common. End\nwith a line that starts with [EXPLANATION]: and "
    "says it in at most 30 words.")
JUDGE = {
    "det": "Does the passage hold at least one token that fits the explanation?",
    "fuzz": "Do the tokens in << >> fit the explanation?",
}


def passage(ids_S, value_S, vocab, numbers=False, marks=True):
    """Text of a window: where value > 0, in << >>, with the activity as a number from 0 to 10."""
    share_S = value_S / value_S.max().clamp(min=1e-9)
    words = []
    for i, value, share in zip(ids_S.tolist(), value_S, share_S.tolist()):
        word = vocab[i]
        if value > 0 and marks:
            word = f"<<{word}>>"
            if numbers:
                word += f" ({max(1, round(share * 10))})"
        words.append(word)
    return " ".join(words)


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
        reply = client.chat([dict(role="user", content=question)])
        for i, answer in zip(asked, read_list(reply, len(asked))):
            answers[i] = answer
    return answers


def read_list(reply, n):
    """The last JSON list of 0 and 1 in a reply; nothing if it has another length than n."""
    lists = re.findall(r"\[[\s01,]*\]", reply)
    answers = re.findall("[01]", lists[-1]) if lists else []
    return [int(answer) for answer in answers] if len(answers) == n else []


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

    det, fuzz: balanced accuracy of the answers given; failures: share of passages without one.
    1 + 4 scored / 5 calls per unit."""
    T = rows_RT.shape[1]
    ids_WS = windows(rows_RT[:, 1:].reshape(-1, 1), T)[..., 0].long()
    ids2_WS = windows(rows2_RT[:, 1:].reshape(-1, 1), T)[..., 0].long()
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
        reply = client.chat([dict(role="user", content=request)])
        text = reply.split("[EXPLANATION]:")[-1].strip()
        out["texts"].append(text)

        # windows of test, active and idle; idle ones get as many marks, at random
        value_WS = value2_WSU[..., u]
        active_W = value_WS.amax(1) > 0
        places = [is_it.nonzero().squeeze(1) for is_it in (active_W, ~active_W)]
        active, idle = [w[torch.randperm(len(w), generator=gen)[:scored]] for w in places]
        n_on = (value_WS[active_W] > 0).sum(1).float().mean()
        n_marks = math.ceil(n_on.nan_to_num().item())
        dice_WS = torch.rand(value_WS.shape, generator=gen).argsort(1).argsort(1)
        marked_WS = torch.where(active_W.unsqueeze(1), value_WS, (dice_WS < n_marks).float())

        # what it says of them, from its sentence alone
        for task in ("det", "fuzz"):
            passages = []
            for w in torch.cat([active, idle]):
                passages.append(passage(ids2_WS[w], marked_WS[w], vocab, marks=task == "fuzz"))
            answers = judge(client, text, passages, task)
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
        text="share of its answers that could not be used"),
}


def measure(m, arena, gen):
    """How well does an LLM explain m's units? (numbers, details), as metrics/columns.py says."""
    fit, test, least = recorded(m, arena)
    windows = active_windows(fit, arena.fit[0].shape[1])
    units = scorable(windows, arena.explained, least, gen)
    found = llm_explain(arena.judge, fit, test, arena.fit[0], arena.test[0], arena.gpt.vocab,
                        units, gen)
    answers = {f"judge_{key}": torch.tensor(found[key]).nanmean().item() for key in ("det", "fuzz")}
    answers |= dict(judge=found["judge"], judge_failures=found["failures"],
                    judge_texts=found["texts"])
    return columns.split(COLUMNS, answers)
