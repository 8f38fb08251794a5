"""Rules against planted units, shuffled ones and plain loops; the LLM's side against a server on this machine."""
import http.server
import json
import re
import threading
from types import SimpleNamespace

import pytest
import torch

import baselines
import common
from conftest import noisy_gpt
from metrics import chat, llm, words
from test_common import fails
from test_units import active

R, T, V = 150, 64, 100
VOCAB = [f"w{i}" for i in range(V)]


def text(seed):
    share = 1 / (torch.arange(V) + 5.)
    return torch.multinomial(share.expand(R, V), T, replacement=True, generator=common.generator(seed, "text"))


def planted(rows):
    """Units: a set of tokens; a token after another; a token where another is among the last 16."""
    before = torch.cat([rows[:, :1] * 0 - 1, rows[:, :-1]], 1)
    near = torch.stack([(rows[:, max(0, t - 15):t + 1] == 30).any(1) for t in range(T)], 1)
    on = torch.stack([torch.isin(rows, torch.tensor([23, 34, 35, 29, 46])), (rows < 4) & (before == 2),
                      (rows == 5) & near], -1)
    return on[:, 1:].flatten(0, 1).float() * torch.tensor([1., 2., 3.])


@pytest.fixture(scope="module")
def world():
    rows = [text(0), text(1)]
    found = []
    for i, r in enumerate(rows):
        value = planted(r)
        off = value[torch.randperm(len(value), generator=common.generator(i, "shuffle"))]
        found.append(active(torch.cat([value, off], 1), torch.zeros(len(value), 1).bool()))
    return rows, found


@pytest.fixture(scope="module")
def explained(world):
    (rows, rows2), (fit, test) = world
    return words.explain(fit, test, rows, rows2, VOCAB, common.generator(0, "explain"), least=20)


def test_planted_units_are_explained_and_shuffled_ones_are_not(explained):
    out = explained
    assert out["units"].tolist() == list(range(6)) and out["judge"] == "rule" and out["scorable"] == 6
    for name in ("det", "det_hard", "fuzz", "f1"):
        assert out[name][:3].min() >= 0.95, name
    assert out["sim"][:3].min() > 0.95 and out["discr"][:3].min() > 0.9
    for name in ("det", "det_hard", "fuzz"):
        assert (out[name][3:] - 0.5).abs().max() <= 0.05, name
    assert out["f1"][3:].max() < 0.15 and out["sim"][3:].abs().max() < 0.1
    assert set(re.findall(r"w\d+", out["texts"][0])) == {"w23", "w34", "w35", "w29", "w46"}
    assert out["texts"][1] == "after 'w2', and 'w0' / 'w1' / 'w2' / 'w3'"
    assert out["texts"][2] == "'w5', and 'w30' among the last 16"
    assert all(len(text.split()) <= 30 for text in out["texts"][:3])


def test_a_table_of_tokens_finds_token_units_and_no_contexts(explained):
    assert explained["lookup_f1"][0] > 0.99 and explained["lookup_f1"][1:3].max() < 0.8


def test_literals_by_hand(world):
    rows = world[0][0]
    literals = words.Literals(rows, VOCAB)
    truth = literals(rows[:3]).view(3, T - 1, -1)
    column = lambda name: truth[..., literals.names.index(name)]
    r = rows[:3]
    assert torch.equal(column("'w1'"), r[:, 1:] == 1) and torch.equal(column("after 'w1'"), r[:, :-1] == 1)
    assert torch.equal(column("two after 'w0'")[:, 1:], r[:, :-2] == 0) and not column("two after 'w0'")[:, 0].any()
    recent = torch.stack([(r[:, max(0, t - 15):t + 1] == 7).any(1) for t in range(1, T)], 1)
    assert torch.equal(column("'w7' among the last 16"), recent)
    assert torch.equal(column("[starts with w]"), torch.ones(3, T - 1).bool()) and len(set(literals.names)) == len(
        literals.names) == truth.shape[-1]


def test_windows_and_balanced_accuracy_against_a_loop(world):
    rows, (fit, _) = world
    value = words.dense(fit, torch.arange(6))
    w = words.windows(value, T)
    assert w.shape == (R * 2, 32, 6) and (w[::2, 0] == 0).all()             # position 0 is empty
    assert torch.equal(w[1, :, 2], value.view(R, T - 1, 6)[0, 31:, 2])
    assert torch.equal(words.active_windows(fit, T), (w > 0).any(1))
    short = torch.arange(22.).view(22, 1)                   # two rows of 12: shorter than a window
    assert words.windows(short, 12)[..., 0].tolist() == [[0, *range(11)], [0, *range(11, 22)]]
    said, real = torch.rand(40, 2) < 0.5, torch.rand(40, 3) < 0.3
    for r in range(2):
        for u in range(3):
            want = (said[real[:, u], r].float().mean() + (~said[~real[:, u], r]).float().mean()) / 2
            assert words.balanced(said, real)[r, u].item() == pytest.approx(want.item())


def test_hard_negatives_and_scorable():
    on = torch.zeros(60, 4, dtype=torch.bool)
    on[:20, 0] = on[:18, 1] = on[30:50, 2] = on[5:8, 3] = True
    assert words.neighbours(on, torch.tensor([0, 2]), k=1).tolist()[0] == [1]
    gen = common.generator(0, "sample")
    assert words.scorable(on, 10, 18, gen).tolist() == [0, 1, 2]
    many = torch.rand(500, 300, generator=gen) < torch.linspace(0.01, 0.5, 300)
    chosen = words.scorable(many, 50, 1, gen)
    assert len(chosen) == 50 and torch.bincount(chosen // 30, minlength=10).min() >= 3     # from all densities


def test_a_rule_for_everything_is_seen_through_by_hard_negatives(world):
    """It says yes in every window where any of its kind fires: det is high, det_hard is at chance."""
    on = torch.zeros(64, T - 1, 3)
    on[:16, :, 0] = on[16:32, :, 1:] = on[32:, ::70, 1] = 1             # one of its kind is elsewhere too
    value, T2 = on.flatten(0, 1), T
    said = torch.zeros(64, T - 1, 1, dtype=torch.bool)
    said[:32] = True
    active_ = words.windows(value > 0, T2).any(1)
    out = words.rule_scores(said.flatten(0, 1), said.flatten(0, 1).float(), value[:, :1], active_, torch.tensor([0]),
                              torch.tensor([[1, 2]]), T2, common.generator(0, "marks"))
    assert out["det_hard"].item() == 0.5 and out["det"] > 0.8
    assert out["recall"].item() == 1 and out["precision"].item() == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------------- llm.py
class Stub(http.server.BaseHTTPRequestHandler):
    """Explains by the marked tokens; answers by looking for them. `plan` holds what comes first: replies, HTTP codes,
    all that is sent, as bytes, or a function that sends it."""
    plan, requests = [], []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, self.headers.get("Authorization"), body))
        step = self.plan.pop(0) if self.plan else None
        ask = body["messages"][0]["content"]
        if isinstance(step, bytes) or callable(step):
            step(self) if callable(step) else self.wfile.write(step)
            return
        if isinstance(step, int):
            self.send_response(step), self.end_headers()
            return
        if step is None and "[EXPLANATION]" in ask:
            step = "Let me see.\n[EXPLANATION]: " + " ".join(sorted(set(re.findall(r"<<(w\d+)>>", ask))))
        elif step is None:
            known = set(re.findall(r"w\d+", ask.split("\n")[0]))
            passages = re.findall(r"^\d+\. (.*)$", ask, re.M)
            marked = [re.findall(r"<<(w\d+)>>", p) or re.findall(r"w\d+", p) for p in passages]
            step = "Sure: " + json.dumps([int(bool(known & set(m))) for m in marked])
        self.send_response(200), self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": step}}]}).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.HTTPServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    Stub.plan, Stub.requests = [], []
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown(), server.server_close()


def client(server, tmp_path, **more):
    return chat.ChatClient(server, "stub", **dict(wait=0.01, timeout=5, folder=tmp_path / "judge") | more)


def test_an_llm_explains_and_judges(server, tmp_path, world, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    (rows, rows2), (fit, test) = world
    gen = lambda: common.generator(0, "judge")
    out = llm.llm_explain(client(server, tmp_path), fit, test, rows, rows2, VOCAB, torch.tensor([0, 3]), gen(),
                            shown=12, scored=10)
    assert out["judge"] == "stub" and out["failures"] == 0 and out["texts"][0] == "w23 w29 w34 w35 w46"
    assert out["det"][0] == out["fuzz"][0] == 1 and out["det"][1] < 0.8
    assert all(path == "/v1/chat/completions" and key == "Bearer sesame" for path, key, _ in Stub.requests)
    n = len(Stub.requests)
    again = llm.llm_explain(client(server, tmp_path), fit, test, rows, rows2, VOCAB, torch.tensor([0, 3]), gen(),
                              shown=12, scored=10)
    assert again["texts"] == out["texts"] and again["det"] == out["det"] and len(Stub.requests) == n       # cached
    assert n == 2 * (1 + 4 * 10 // 5)
    assert not any("sesame" in p.read_text() for p in (tmp_path / "judge").iterdir())


def test_no_key_no_header_and_busy_servers_are_asked_again(server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Stub.plan, waits = [429, 503, "hello"], []
    monkeypatch.setattr(chat.time, "sleep", waits.append)
    ask = [dict(role="user", content="hi")]
    assert client(server, tmp_path).chat(ask, chat.any_text) == "hello" and len(Stub.requests) == 3
    assert waits == [0.01, 0.02] and Stub.requests[0][1] is None
    assert Stub.requests[0][2] == dict(model="stub", messages=ask, temperature=0, max_tokens=200)


@pytest.mark.parametrize("plan, tries", [([401], 1), ([500] * 9, 3)])
def test_a_server_that_refuses_ends_in_one_line(server, tmp_path, capsys, plan, tries):
    Stub.plan = list(plan)
    ask = [dict(role="user", content="hi")]
    fails(capsys, lambda: client(server, tmp_path, retries=2).chat(ask, chat.any_text), "--judge_url")
    assert len(Stub.requests) == tries and not (tmp_path / "judge").exists()


def test_answers_of_the_wrong_length_are_failures_not_zeros(server, tmp_path):
    Stub.plan = ["[1, 0]", "I can't", "[0, 1, 1, 1, 1] no, [1, 1, 0, 0, 1]"]
    said = llm.judge(client(server, tmp_path), "w1", [f"w{i} x" for i in range(15)], "det")
    assert said.count(None) == 10 and sorted(s for s in said if s is not None) == [0, 0, 1, 1, 1]


def test_a_passage_shows_marks_and_numbers():
    ids, value = torch.tensor([1, 2, 3]), torch.tensor([0., 1., 4.])
    assert llm.passage(ids, value, VOCAB, numbers=True) == "w1 <<w2>> (2) <<w3>> (10)"
    assert llm.passage(ids, value, VOCAB) == "w1 <<w2>> <<w3>>"
    assert llm.passage(ids, value, VOCAB, marks=False) == "w1 w2 w3"


@pytest.mark.parametrize("module", [words, llm], ids=lambda module: module.__name__)
def test_what_is_measured_has_its_columns(world, server, tmp_path, module):
    gpt, (rows, rows2) = noisy_gpt(1, 16, 24, T, V), world[0]
    gpt.vocab = VOCAB
    no_labels = torch.zeros(*rows.shape, 0, dtype=torch.bool)
    arena = SimpleNamespace(gpt=gpt, fit=(rows, no_labels), test=(rows2, no_labels), explained=3,
                            judge=client(server, tmp_path))
    m = baselines.baselines(gpt, 0, rows, 8, 32, 0)["neurons"]
    numbers, details = module.measure(m, arena, common.generator(0, "measure"))
    assert list(numbers) == list(module.COLUMNS) and None not in numbers.values()
    assert {*details} == ({"rule_units", "rule_precision", "rule_recall", "texts"} if module is words
                          else {"judge", "judge_texts"})


def test_without_a_unit_that_is_on_often_there_are_no_scores(world):
    rows = world[0][0]
    never = active(torch.zeros(R * (T - 1), 2), torch.zeros(R * (T - 1), 0).bool())
    out = words.explain(never, never, rows, rows, VOCAB, common.generator(0, "explain"))
    assert out["scorable"] == 0 and out["texts"] == [] and "det" not in out
