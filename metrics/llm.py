"""An LLM, at any OpenAI-compatible endpoint, in place of the rules of words.py: it explains and judges units.

It sees windows of tokens with the unit's activity marked, writes one sentence, and then, from that sentence alone, says
of other windows whether the unit is active there (detection) and whether marked tokens are the right ones (fuzzing), as
Paulo et al. 2024 (arXiv:2410.13928) have it; it explains from fit and is asked about test. Standard library only.
Every result carries the model's name as "judge": these scores and the rules' are never mixed.
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
    """Any OpenAI-compatible endpoint. The key comes from the environment and is stored nowhere; replies are cached."""
    def __init__(self, base_url, model, key_env="OPENAI_API_KEY", timeout=60, retries=4, wait=1., cache="cache/judge"):
        self.url, self.model, self.cache = base_url.rstrip("/") + "/chat/completions", model, Path(cache)
        self.key, self.timeout, self.retries, self.wait = os.environ.get(key_env), timeout, retries, wait

    def chat(self, messages, temperature=0, max_tokens=200):
        body = dict(model=self.model, messages=messages, temperature=temperature, max_tokens=max_tokens)
        body = json.dumps(body).encode()
        path = self.cache / hashlib.sha256(self.url.encode() + body).hexdigest()
        if path.exists():
            return path.read_text()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(urllib.request.Request(self.url, body, headers), timeout=self.timeout) as r:
                    reply = json.load(r)["choices"][0]["message"]["content"]
                common.write(path, reply.encode())
                return reply
            except (OSError, ValueError, LookupError, TypeError) as e:          # HTTPError and URLError are OSErrors
                code = getattr(e, "code", 500)
                if attempt == self.retries or code != 429 and code < 500:
                    common.fail(f"--judge_url {self.url}: {e}")
                time.sleep(self.wait * 2 ** attempt)

EXPLAIN = """Below are passages on which one unit of a language model is active. The tokens where it is active stand in
<< >>, followed by its activity from 0 to 10. Work out what these tokens, or what comes before them, have in common. End
with a line that starts with [EXPLANATION]: and says it in at most 30 words."""
JUDGE = {"det": "Does the passage hold at least one token that fits the explanation?",
         "fuzz": "Do the tokens in << >> fit the explanation?"}

def passage(ids, value, vocab, numbers=False, marks=True):
    """Text of a window: where value > 0, in << >>, with the activity as a number from 0 to 10."""
    ten = [f" ({max(1, round(v * 10))})" * numbers for v in (value / value.max().clamp(min=1e-9)).tolist()]
    return " ".join(f"<<{vocab[i]}>>{n}" if v > 0 and marks else vocab[i] for i, v, n in zip(ids.tolist(), value, ten))

def judge(client, explanation, passages, task, seed=0, batch=5):
    """0, 1 or None (no usable answer) for each passage: in random order, `batch` in a prompt."""
    order, answer = random.Random(seed).sample(range(len(passages)), len(passages)), [None] * len(passages)
    for some in (order[i:i + batch] for i in range(0, len(order), batch)):
        listed = "\n".join(f"{n}. {passages[i]}" for n, i in enumerate(some, 1))
        question = (f"Explanation of a unit: {explanation}\nFor each of the {len(some)} passages: {JUDGE[task]} "
                    f"Reply with a JSON list of 0 or 1, nothing else.\n{listed}")
        reply = client.chat([dict(role="user", content=question)])
        found = re.findall(r"\[[\s01,]*\]", reply)
        said = re.findall("[01]", found[-1]) if found else []
        for i, s in zip(some, said if len(said) == len(some) else []):
            answer[i] = int(s)
    return answer

def llm_explain(client, fit, test, rows_RT, rows2_RT, vocab, units, gen, shown=20, scored=20):
    """explain.explain by an LLM: each unit's text from `shown` of its windows of fit, half the strongest, half spread
    over the others, and det and fuzz from `scored` active and as many inactive windows of test: balanced accuracy of
    the answers given; failures = share of passages without one. 1 + 4 scored / 5 calls per unit."""
    T, out = rows_RT.shape[1], dict(judge=client.model, units=units, texts=[], det=[], fuzz=[])
    ids, ids2 = (windows(rows[:, 1:].reshape(-1, 1), T)[..., 0].long() for rows in (rows_RT, rows2_RT))
    value, value2 = (windows(dense(a, units), T) for a in (fit, test))
    missing, asked = 0, 0
    for u in range(len(units)):
        order = value[..., u].amax(1).argsort(descending=True)[:(value[..., u].amax(1) > 0).sum()]
        half = min(shown, len(order)) // 2
        pick = torch.cat([order[:half], order[half:][torch.linspace(0, len(order) - half - 1, half).long()]])
        text = client.chat([dict(role="user", content=EXPLAIN + "\n" + "\n".join(
            passage(ids[w], value[w, :, u], vocab, numbers=True) for w in pick))])
        out["texts"].append(text.split("[EXPLANATION]:")[-1].strip())
        v = value2[..., u]
        active, idle = ((v.amax(1) > 0) == on for on in (True, False))
        some = [where.nonzero().squeeze(1) for where in (active, idle)]
        some = [w[torch.randperm(len(w), generator=gen)[:scored]] for w in some]
        n_marks = math.ceil((v[active] > 0).sum(1).float().mean().nan_to_num().item())
        random_marks = (torch.rand(v.shape, generator=gen).argsort(1).argsort(1) < n_marks).float()
        for task in ("det", "fuzz"):
            shown_v = torch.where(active.unsqueeze(1), v, random_marks)
            parts = [[passage(ids2[w], shown_v[w], vocab, marks=task == "fuzz") for w in ws] for ws in some]
            said = judge(client, out["texts"][-1], sum(parts, []), task)
            yes, no = ([s for s in part if s is not None] for part in (said[:len(parts[0])], said[len(parts[0]):]))
            missing, asked = missing + said.count(None), asked + len(said)
            out[task].append((sum(yes) / len(yes) + 1 - sum(no) / len(no)) / 2 if yes and no else math.nan)
    return out | dict(failures=missing / max(1, asked))


# ------------------------------------------------------------------------------------ for the table
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
