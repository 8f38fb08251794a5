"""The judge's client against a server on this machine that misbehaves in every way we know; how its replies are read."""
import contextlib
import dataclasses
import email.utils
import gzip
import json
import os
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch

import common
import compare
from metrics import chat, llm, words
from model import GPT
from test_common import fails
from test_explain import VOCAB, Stub, client, server, text, world  # noqa: F401  (fixtures)

ASK = [dict(role="user", content="hi")]
KEY = "sk-SECRET-0123456789"
ROOT = Path(__file__).parent.parent


def http(body, code="200 OK", *headers, missing=0):
    """All bytes of a response; of the body, the last `missing` ones never come."""
    head = "\r\n".join([f"HTTP/1.1 {code}", f"Content-Length: {len(body)}", *headers, "", ""])
    return head.encode() + body[:len(body) - missing]


def reply(content, finish_reason="stop", **message):
    return json.dumps({"choices": [{"message": {"content": content} | message, "finish_reason": finish_reason}]}).encode()


def error(message, code, *headers):
    return http(json.dumps({"error": {"message": message}}).encode(), code, *headers)


GOOD = http(reply("fine"))


@pytest.fixture
def waits(monkeypatch):
    """Seconds that would have been waited."""
    waits = []
    monkeypatch.setattr(chat.time, "sleep", waits.append)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return waits


def chats(server, tmp_path, plan, **more):
    """(the client, what it makes of a plan's responses), and the key is nowhere in what it keeps."""
    Stub.plan = list(plan)
    asker = client(server, tmp_path, retries=2, **more)
    found = asker.chat(ASK, chat.any_text)
    assert not any(KEY.encode() in path.read_bytes() for path in asker.folder.glob("*"))
    return asker, found


# ------------------------------------------------------------------------------------------------ replies
@pytest.mark.parametrize("body", [
    reply([{"type": "text", "text": "fi"}, {"type": "text", "text": "ne"}]),
    reply([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "fine"}]),
    reply("fine", reasoning_content="hm"), reply("<think>hm\nso</think>\n\nfine"), reply("hm</think>fine"),
    reply("<THINK>a</THINK>fine"), reply("[THINK]a[/THINK]fine"), b"\xef\xbb\xbf" + reply("fine")])
def test_the_text_of_a_reply_is_found_without_its_reasoning(server, tmp_path, waits, body):
    assert chats(server, tmp_path, [http(body)])[1].strip() == "fine" and len(Stub.requests) == 1


@pytest.mark.parametrize("body", [
    reply(None), reply(None, "length"), reply(""), reply(" \n"), reply(None, reasoning_content="hm"), reply([]), reply(5),
    reply([None, 5, {"text": None}]), reply("<think>hm", "length"), reply("cut in the mid", "length"), b'{"choices": []}',
    b'{"choices": null}', b'{"choices": [null]}', b'{"choices": [{"message": null}]}', b'{"choices": [{"message": {}}]}'])
def test_a_reply_without_a_text_is_asked_for_with_more_tokens(server, tmp_path, waits, body):
    read = lambda said: None if "…" in said else chat.any_text(said)
    Stub.plan = [http(body), GOOD]
    asker = client(server, tmp_path)
    assert asker.chat(ASK, read) == "fine"
    assert [asked["max_tokens"] for _, _, asked in Stub.requests] == [200, 800]
    # what has a reply once is not asked again; what has none is, and counts as none
    assert asker.chat(ASK, read) == "fine" and len(Stub.requests) == 2
    Stub.plan = [http(body)] * 9
    other = [dict(role="user", content="ho")]
    assert asker.chat(other, read) is None and [asked["max_tokens"] for _, _, asked in Stub.requests[2:]] == [200, 800, 3200]
    Stub.plan = [GOOD]
    assert asker.chat(other, read) == "fine"


def test_more_tokens_than_the_model_takes_are_no_answer(server, tmp_path, waits):
    too_many = error("max_tokens is too large: 800", "400 Bad Request")
    assert chats(server, tmp_path, [http(reply(None)), too_many, too_many])[1] is None


def test_a_whole_text_that_cannot_be_read_is_not_asked_for_again_and_not_kept(server, tmp_path, waits):
    Stub.plan = [http(reply("I can't say")), http(reply("[1, 0]"))]
    asker = client(server, tmp_path)
    read = lambda said: llm.read_answers(said, 2)
    assert asker.chat(ASK, read) is None and len(Stub.requests) == 1
    assert asker.chat(ASK, read) == [1, 0] and len(Stub.requests) == 2


# ------------------------------------------------------------------------------------ connections, bodies
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BROKEN = {
    "cut off": http(reply("fine"), missing=9),
    "chunks cut off": CHUNKED + b"40\r\n{\"choi",
    "chunks of no size": CHUNKED + b"zz\r\n{\"choi",
    "closed": b"",
    "no HTTP": b"garbage\r\n\r\n",
    "other version": b"HTTP/9.9 200 OK\r\n\r\n",
    "long header": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 200 + b"\r\n",
    "gzip cut off": http(gzip.compress(reply("fine"), mtime=0)[:-9], "200 OK", "Content-Encoding: gzip"),
    "no gzip": http(b"xxxx", "200 OK", "Content-Encoding: gzip"),
    "much gzip": http(gzip.compress(b" " * 50_000_000, mtime=0), "200 OK", "Content-Encoding: gzip"),
    "empty": http(b""),
    "HTML": http(b"<html><style>a{}</style><body>Welcome</body></html>"),
    "a list": http(b"[1]"),
    "null": http(b"null"),
    "deep": http(b"[" * 100_000),
    "no choices": http(b"{}"),
    "an error": http(b'{"error": "busy"}'),
    "a busy error": http(b'{"error": {"message": "busy", "code": 429}}'),
    "500": error("later", "500 Internal"), "502": http(b"<h1>Bad Gateway</h1>", "502 Bad Gateway"),
    "503": error("later", "503 Unavailable"), "408": error("later", "408 Timeout"), "429": error("later", "429 Too Many"),
}


@pytest.mark.parametrize("response", BROKEN.values(), ids=BROKEN)
def test_what_may_pass_is_asked_again_and_ends_in_one_line(server, tmp_path, waits, capsys, response):
    assert chats(server, tmp_path, [response, GOOD])[1] == "fine" and len(Stub.requests) == 2
    assert waits == [0.01]
    is_busy = b"429" in response
    many = [response] * 99
    waits.clear()
    fails(capsys, lambda: chats(server, tmp_path / "2", many), "--judge_url http://127.0.0.1")
    assert sum(waits) <= chat.PATIENCE and (len(Stub.requests) > 9 if is_busy else len(Stub.requests) == 5)


@pytest.mark.parametrize("headers, body", [
    (["Content-Encoding: gzip"], gzip.compress(reply("naïve"), mtime=0)), (["Content-Encoding: X-GZIP"], gzip.compress(reply("naïve"), mtime=0)),
    (["Content-Encoding: deflate"], zlib.compress(reply("naïve"))), (["Content-Encoding: identity"], reply("naïve")),
    (["Content-Type: application/json; charset=latin-1"], b'{"choices": [{"message": {"content": "na\xefve"}}]}'),
    (["Content-Type: application/json; charset=klingon"], reply("naïve"))])
def test_bodies_are_unpacked_and_decoded(server, tmp_path, waits, headers, body):
    assert chats(server, tmp_path, [http(body, "200 OK", *headers)])[1] == "naïve"


def test_letters_that_are_no_text_do_no_harm(server, tmp_path, waits):
    assert chats(server, tmp_path, [http(b'{"choices": [{"message": {"content": "na\xefve \\ud83d"}}]}')])[1] == "na\ufffdve ?"


def test_a_slow_reply_has_the_seconds_of_judge_timeout_in_all(server, tmp_path, waits, capsys, monkeypatch):
    def drip(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(40):
                self.wfile.write(b" ")
                threading.Event().wait(0.05)    # sleep itself is not to be waited for here
    began = time.monotonic()
    fails(capsys, lambda: chats(server, tmp_path, [drip] * 3, timeout=0.2), "within --judge_timeout 0.2")
    assert time.monotonic() - began < 6


# ------------------------------------------------------------------------------------------- what is refused
def test_parameters_that_a_model_refuses_are_changed(server, tmp_path, waits, capsys):
    plan = [error("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "400 Bad Request"),
            error("'temperature' does not support 0 with this model", "400 Bad Request"), GOOD]
    asker, found = chats(server, tmp_path, plan)
    settings = [{key: value for key, value in asked.items() if key not in ("model", "messages")}
                for _, _, asked in Stub.requests]
    assert found == "fine" and settings == [dict(max_tokens=200, temperature=0),
                                            dict(max_completion_tokens=200, temperature=0), dict(max_completion_tokens=200)]
    assert "without a temperature" in capsys.readouterr().out
    Stub.plan = [GOOD]                              # from now on at once
    assert asker.chat([dict(role="user", content="ho")], chat.any_text) == "fine" and len(Stub.requests) == 4


@pytest.mark.parametrize("body", [b'{"detail": [{"loc": ["body", "max_tokens"], "msg": "extra fields not permitted"}]}',
                                  b'{"message": "unknown field max_tokens"}', b"max_tokens: unknown"])
def test_the_budget_goes_by_its_other_name(server, tmp_path, waits, body):
    assert chats(server, tmp_path, [http(body, "422 Unprocessable"), GOOD])[1] == "fine"
    assert Stub.requests[1][2]["max_completion_tokens"] == 200 and "max_tokens" not in Stub.requests[1][2]


@pytest.mark.parametrize("response, words", [
    (error("no such model", "404 Not Found"), ["404", "no such model"]),
    (error("context is 2048 tokens", "413 Too Large"), ["413", "2048"]), (http(b"", "400 Bad Request"), ["400"]),
    (error(f"wrong key {KEY}", "401 Unauthorized"), ["401", "wrong key ***", "OPENAI_API_KEY is set"]),
    (http(b"x" * 290 + KEY.encode(), "403 Forbidden"), ["403"]), (http(b"", f"401 {KEY}"), ["401 ***"]),
    (http(b"<html><script>x()</script><h1>Denied</h1></html>", "403 Forbidden"), ["403 Forbidden: Denied"]),
    (http(b"x" * 99, "401 Unauthorized", missing=9), ["401"]), (http(b"\xff\x1b[31mred", "403 Forbidden"), ["403", "[31mred"]),
    (http(gzip.compress(b'{"error": "closed"}', mtime=0), "403 Forbidden", "Content-Encoding: gzip"), ["closed"]),
    (http(b'[{"error": {"message": "in a list"}}]', "400 Bad Request"), ["in a list"]),
    (http(b'{"error": {"message": "used up", "code": "insufficient_quota"}}', "429 Too Many"), ["used up"]),
    (http(b'{"error": {"message": "no", "code": 403}}'), ["no"])])
def test_a_refusal_is_one_line_with_the_server_s_message(server, tmp_path, waits, capsys, response, words):
    err = fails(capsys, lambda: chats(server, tmp_path, [response] * 9), "--judge_url", *words)
    assert len(Stub.requests) == 1 and not waits and "SECRET" not in (err or "") and not (tmp_path / "judge").exists()


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(server, tmp_path, waits, capsys, code):
    away = http(b"", f"{code} Moved", f"Location: https://other.invalid/v1?key={KEY}")
    fails(capsys, lambda: chats(server, tmp_path, [away] * 3), "moved to https://other.invalid/v1, give that address")
    assert len(Stub.requests) == 1


@pytest.mark.parametrize("told, seconds", [
    ("30", 30), ("1.5", 1.5), ("0", 1), ("-5", 1), ("Wed, 21 Oct 2015 07:28:00 GMT", 1), ("soon", None), ("", None),
    ("nan", None), ("inf", None), ("9" * 400, None), ("Wed, 21 Oct 99999 07:28:00 GMT", None)])
def test_retry_after_is_a_number_or_a_date(told, seconds):
    assert chat.told_to_wait({"Retry-After": told}) == seconds
    in_20_s = email.utils.formatdate(time.time() + 20, usegmt=True)
    assert chat.told_to_wait({}) is None and 18 < chat.told_to_wait({"Retry-After": in_20_s}) <= 20


def test_a_server_that_asks_to_wait_is_waited_for_within_a_bound(server, tmp_path, waits, capsys):
    busy = error("slow down", "429 Too Many", "Retry-After: 30")
    assert chats(server, tmp_path, [busy] * 8 + [GOOD])[1] == "fine" and waits == [30] * 8
    assert "waiting 30 s" in capsys.readouterr().out
    fails(capsys, lambda: chats(server, tmp_path / "2", [busy] * 20), "slow down", f"{chat.PATIENCE} is the most")
    assert len(waits) == 8 + 10
    for response in (error("slow", "429 Too Many", "Retry-After: 3600"), error("slow", "503 No", "Retry-After: 301")):
        fails(capsys, lambda: chats(server, tmp_path / "3", [response]), "slow", f"{chat.PATIENCE} is the most")
    assert len(waits) == 18


# ------------------------------------------------------------------------------------------- keys, addresses
@pytest.mark.parametrize("key, sent", [(KEY + "\n", KEY), (f" \t{KEY}\r\n", KEY), ("  \n", None), ("", None)])
def test_a_key_is_stripped(server, tmp_path, waits, monkeypatch, key, sent):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    chats(server, tmp_path, [GOOD])
    assert Stub.requests[0][1] == (sent and f"Bearer {sent}")


@pytest.mark.parametrize("key", ["sk-SECRET\nmore", "sk-SECRET more", "sk-SECRET’", "sk-SECRETé", "sk-SECRET\u200b", "sk-SECRET\x1b",
                                 os.fsdecode(b"sk-SECRET\xff")])
def test_what_no_header_can_hold_is_refused_and_not_printed(monkeypatch, capsys, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SystemExit):
        chat.ChatClient("http://localhost/v1", "stub")
    err = capsys.readouterr().err
    assert err.startswith("error: OPENAI_API_KEY") and "SECRET" not in err and "more" not in err


@pytest.mark.parametrize("base, url", [
    ("http://h:80/v1", "http://h:80/v1/chat/completions"), ("http://h/v1/ ", "http://h/v1/chat/completions"),
    ("https://x/openai/deployments/y?api-version=2024", "https://x/openai/deployments/y/chat/completions?api-version=2024"),
    ("https://x/y/?a=1&b=2#c", "https://x/y/chat/completions?a=1&b=2"), ("http://[::1]:8", "http://[::1]:8/chat/completions"),
    ("http://h/v1/chat/completions", "http://h/v1/chat/completions"),
    ("http://h/v1/chat/completions/?a=1", "http://h/v1/chat/completions?a=1")])
def test_the_path_goes_on_before_the_query(base, url):
    assert chat.completions_url(base) == url


@pytest.mark.parametrize("base", ["localhost:8000/v1", "file:///etc/passwd", "ftp://x/v1", "http:///v1", "http://h:port/v1", "",
                                  "http://h:99999/v1", "http://h:0/v1", "http://[::1/v1", "http://a b/v1", "http://a\nb/v1",
                                  "http://h/é", "http://me:SECRET@h/v1", "http://h y/v1?key=SECRET"])
def test_what_is_no_address_is_refused(capsys, base):
    fails(capsys, lambda: chat.ChatClient(base, "stub"), "--judge_url")
    with contextlib.suppress(SystemExit):
        chat.ChatClient(base, "stub")
    assert "SECRET" not in capsys.readouterr().err


def test_an_error_names_the_proxy_without_its_password(tmp_path, waits, monkeypatch, capsys):
    monkeypatch.setenv("http_proxy", "http://me:SECRET@127.0.0.1:9")
    fails(capsys, lambda: chats("http://example.invalid/v1?key=SECRET", tmp_path, []), "http_proxy ***@127.0.0.1:9", "refused")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(SystemExit):
        chats("http://127.0.0.1:9/v1?key=SECRET", tmp_path, [])
    err = capsys.readouterr().err
    assert "proxy" not in err and "SECRET" not in err


# ------------------------------------------------------------------------------------------------- the cache
def test_the_cache_knows_all_that_changes_a_reply(server, tmp_path, waits):
    changes = [dict(), dict(temperature=1), dict(tokens=500)]
    for n, change in enumerate(changes, 1):
        assert chats(server, tmp_path, [GOOD], **change)[1] == "fine" and len(Stub.requests) == n
    for change in changes:
        assert chats(server, tmp_path, [], **change, timeout=9)[1] == "fine"
    assert len(Stub.requests) == 3


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(path.read_bytes().replace(b"fine", b"fire")), lambda path: path.write_bytes(b"\xff\xfe"),
    lambda path: (path.unlink(), os.mkfifo(path))], ids=["empty", "cut off", "flipped", "binary", "fifo"])
def test_a_damaged_reply_is_asked_for_anew(server, tmp_path, waits, damage):
    asker, _ = chats(server, tmp_path, [GOOD])
    path = asker.path_of(ASK)
    damage(path)
    assert chats(server, tmp_path, [GOOD])[1] == "fine" and len(Stub.requests) == 2 and chat.read_kept(path) == "fine"


def test_the_cache_lies_where_all_caches_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(chat.cache, "CACHE", tmp_path / "elsewhere")
    assert chat.ChatClient("http://h/v1", "stub").folder == tmp_path / "elsewhere" / "judge"


# ------------------------------------------------------------------------------------------ before training
@pytest.mark.parametrize("plan, words", [
    (["closed"], ["refused"]), ([error("no such model", "404 Not Found")], ["no such model"]),
    ([http(reply(None))] * 3, ["no text", "--judge_tokens"])], ids=["closed port", "wrong model", "no text"])
def test_an_endpoint_that_is_wrong_is_found_before_any_training(server, tmp_path, waits, capsys, monkeypatch, plan, words):
    monkeypatch.setattr(chat.cache, "CACHE", tmp_path / "cache")
    Stub.plan = list(plan)
    gpt = GPT.load(ROOT / "target")
    cfg = compare.Config(eval_tokens=256, judge_url="http://127.0.0.1:9/v1" if plan == ["closed"] else server, judge_model="m")
    monkeypatch.setattr(compare.data, "load_all", lambda *_: {"fit": Rows(), "test": Rows()})
    fails(capsys, lambda: compare.prepared(cfg, gpt, 1, torch.device("cpu")), "--judge_url", *words)
    assert sum(waits) <= 1


class Rows:
    names = []

    def labelled(self, T, n_rows, device):
        return torch.zeros(2, T, dtype=torch.long), torch.zeros(2, T, 0, dtype=torch.bool)


def test_what_one_asks_of_the_judge_goes_to_the_judge(server, tmp_path, waits, capsys, monkeypatch):
    monkeypatch.setattr(chat.cache, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(compare.data, "load_all", lambda *_: {"fit": Rows(), "test": Rows()})
    Stub.plan = [GOOD] * 2
    cfg = compare.Config(judge_url=server, judge_model="m", judge_timeout=7, judge_temperature=1, judge_tokens=50)
    judge = compare.prepared(cfg, GPT.load(ROOT / "target"), 1, torch.device("cpu")).judge
    asked = Stub.requests[0][2]
    assert (asked["model"], asked["temperature"], asked["max_tokens"], judge.timeout) == ("m", 1, 50, 7)
    judge.check()
    assert len(Stub.requests) == 2 and judge.retries == 4       # never from the cache
    key = lambda **change: compare.evaluation_key(
        "judged", compare.Job("svd", "k", 2, 0, True, None), 0, dataclasses.replace(cfg, **change),
        compare.Arena(GPT.load(ROOT / "target"), 1, (), (), [], 10, None, {}, {}))
    assert key() == key(judge_timeout=8) and len({key(), key(judge_temperature=0), key(judge_tokens=51)}) == 3


@pytest.mark.parametrize("change", [dict(judge_timeout=0.5), dict(judge_temperature=-1), dict(judge_tokens=0),
                                    dict(judge_tokens=10, judge_url="")])
def test_flags_of_the_judge_have_limits_and_need_a_judge(capsys, change):
    cfg = compare.Config(**dict(judge_url="http://h/v1", judge_model="m") | change)
    cfg.judge_model = "m" if cfg.judge_url else ""
    fails(capsys, lambda: compare.check(cfg, GPT.load(ROOT / "target")), f"--{[*change][0]}")


# ------------------------------------------------------------------------------------ answers, explanations
@pytest.mark.parametrize("said", [
    "[1, 0, 1]", "[1,0,1] because passages [1] and [3] fit", "Passages [1] and [3] fit, so:\n[1, 0, 1]", "[true, false, true]",
    "[True, False, True]", '["1", "0", "1"]', '["yes", "no", "yes"]', "[1 0 1]", "[1.0, 0.0, 1.0]", "[\n  1,\n  0,\n  1,\n]",
    "```json\n[1, 0, 1]\n```", '{"answers": [1, 0, 1]}', "**[1, 0, 1]**", "[0, 0, 0] no, wait: [1, 0, 1]", "[1, 0] or [1, 0, 1]",
    "1, 0, 1", "1 0 1", "Answer: 1, 0, 1.", "Here they are.\n1, 0, 1\nI hope that helps.", "1\n0\n1", "yes\nno\nyes\n",
    "Yes, no, yes.", "- 1\n- 0\n- 1", "1. yes\n2. no\n3. yes", "1. 1\n2. 0\n3. 1", "1: true, 2: false, 3: true", "(1) 1 (2) 0 (3) 1",
    '{"1": 1, "2": 0, "3": 1}', '{"1": true, "2": false, "3": true}', "Passage 1: Yes\nPassage 2: No\nPassage 3: Yes",
    "**Passage 1**: yes - a name\n**Passage 2**: no - none\n**Passage 3**: yes (a name)", "| 1 | yes |\n| 2 | no |\n| 3 | yes |",
    '[{"passage": 1, "answer": 1}, {"passage": 2, "answer": 0}, {"passage": 3, "answer": 1}]', "1 -> 1\n2 -> 0\n3 -> 1"])
def test_answers_are_read_in_whatever_clothes(said):
    assert llm.read_answers(said, 3) == [1, 0, 1]


@pytest.mark.parametrize("said", [
    "", "…", "I can't", "[1, 0]", "[1, 0, 1, 1]", "[1, -1, 0]", "[1, 2, 0]", "[1, 0.5, 0]", "[1, null, 0]", "[1, ?, 0, 1]", "1, 2, 3",
    "2. yes\n3. no\n1. yes", "0: yes\n1: no\n2: yes", "1. No token fits\n2. Yes, one does\n3. no", "1. yes\n2. no", "Passage 1, 0 and 1",
    "passages 1 and 3", "[]", "[[1, 0], [1]]", "1" * 5000, "[" * 5000, "1.0, 0.0", "Between 1 and 0 there is 1 difference"])
def test_what_is_no_answer_to_each_passage_is_none(said):
    assert llm.read_answers(said, 3) is None


def test_one_passage_s_number_is_not_taken_for_its_answer():
    assert llm.read_answers("[0]", 1) == [0] and llm.read_answers("1: no", 1) == [0] and llm.read_answers("yes", 1) == [1]
    assert llm.read_answers("[0] because passage [1] is about cats", 1) is None
    assert llm.read_answers("[1]: no", 1) is None and llm.read_answers("[1] as [1] fits", 1) == [1]


@pytest.mark.parametrize("said, explanation", [
    ("Let me see.\n[EXPLANATION]: names of animals", "names of animals"), ("[explanation]: names", "names"), ("names", "names"),
    ("**[EXPLANATION]:** names", "names"), ("[EXPLANATION]:\n\nnames\n\nI hope that helps!", "names"), ("[EXPLANATION] names", "names"),
    ("hm\n**Explanation:** names", "names"), ("[EXPLANATION]: a\nno, better:\n[EXPLANATION]: names", "names"),
    ("[EXPLANATION]: слова", "слова"), ("[EXPLANATION]: 's after \"names\"", "'s after \"names\""),
    ("", None), ("[EXPLANATION]:", None), ("[EXPLANATION]: \n ", None), ("[EXPLANATION]: ...", None), ("…", None),
    ("First I look\nthen I thi", None), ("[EXPLANATION]: na\n[EXPLANATION]:", None)])
def test_explanations_are_read_or_missing(said, explanation):
    assert llm.read_explanation(said) == explanation


def test_a_unit_without_an_explanation_is_counted_and_never_scored(server, tmp_path, world, waits):
    (rows, rows2), (fit, test) = world
    Stub.plan = [http(reply("[EXPLANATION]:"))]
    how = dict(shown=4, scored=5)
    found = llm.llm_explain(client(server, tmp_path), fit, test, rows, rows2, VOCAB, torch.tensor([3, 0]),
                            common.generator(0, "judge"), **how)
    assert found["texts"][0] is None and found["det"][0] != found["det"][0] and found["fuzz"][0] != found["fuzz"][0]
    assert found["failures"] == 0.5 and found["det"][1] == 1 and len(Stub.requests) == 2 + 4
    # its passages were drawn all the same: those of the next unit are what they would have been
    again = llm.llm_explain(client(server, tmp_path), fit, test, rows, rows2, VOCAB, torch.tensor([3, 0]),
                            common.generator(0, "judge"), **how)
    assert again["failures"] == 0 and again["det"][1] == found["det"][1] and len(Stub.requests) == 2 + 4 + 1 + 4


# -------------------------------------------------------------------------------------- what it is shown
def test_windows_show_the_row_s_own_tokens(server, tmp_path, world, waits):
    """Of w5, the first token of each row, in every first window; and never of w0 in its place."""
    rows, (fit, test) = [r.clone() for r in world[0]], world[1]
    for r in rows:
        r[r == 0] = 7
        r[:, 0] = 5
    llm.llm_explain(client(server, tmp_path), fit, test, *rows, VOCAB, torch.tensor([0]), common.generator(0, "judge"))
    shown = [asked["messages"][0]["content"] for _, _, asked in Stub.requests]
    passages = [line.replace("<<", "").replace(">>", "").split() for content in shown for line in content.splitlines()
                if line.count(" w") + line.count("<w") > 25]
    assert not any("w0" in passage for passage in passages)
    assert sum(next(word for word in passage if word[0] == "w") == "w5" for passage in passages) > len(passages) / 4
    assert torch.equal(words.cut(rows[0])[::2], rows[0][:, :32]) and torch.equal(words.cut(rows[0])[1::2], rows[0][:, 32:])


def test_marks_at_random_are_where_units_can_be():
    gen = lambda: common.generator(0, "marks")
    for T, per_row, size in ((64, 2, 32), (128, 4, 32), (70, 2, 32), (12, 1, 12)):
        rank = words.random_order(40 * per_row, T, gen())
        dice = torch.rand(40 * per_row, size, generator=gen())
        assert torch.equal(rank.sort(1).values, torch.arange(size).expand(40 * per_row, size))
        assert (rank[::per_row, 0] == size - 1).all() and (per_row == 1 or (rank[1::per_row, 0] < size - 1).any())
        assert torch.equal(rank[1::per_row] if per_row > 1 else rank[:0],
                           dice.argsort(1).argsort(1)[1::per_row] if per_row > 1 else rank[:0])


def test_tokens_cannot_be_taken_for_marks_lines_or_the_judge_s_own():
    vocab = ["<|endoftext|>", "<<", "a\nb", "</s>", "<think>"]
    value = torch.tensor([0., 1., 0., 1., 0.])
    assert llm.passage(torch.arange(5), value, vocab) == "‹|endoftext|› <<‹‹>> a\\nb <<‹/s›>> ‹think›"


def test_tokens_of_byte_level_bpe_are_shown_as_text():
    vocab = ["The", "Ġcaf", "Ã©", "ĊĊ", "âĢľ", "Ġ<|endoftext|>"]
    value = torch.tensor([0., 1., 1., 0., 0., 0.])
    assert llm.passage(torch.arange(6), value, vocab) == "The<< caf>><<é>>\\n\\n“ ‹|endoftext|›"


def drips(first, then):
    """A response that begins with some bytes and goes on with others, one at a time, for longer than anybody waits."""
    def respond(self):
        with contextlib.suppress(OSError):
            self.wfile.write(first)
            for _ in range(40):
                self.wfile.write(then)
                threading.Event().wait(0.05)
    return respond


@pytest.mark.parametrize("first, then", [
    (b"HTTP/1.1 200 OK\r\nX: ", b"a"), (b"", b"HTTP/1.1 100 Continue\r\n\r\n"), (CHUNKED, b"0"),
    (b"HTTP/1.1 500 Internal\r\nX: ", b"a")], ids=["header", "continue", "size of a chunk", "header of an error"])
def test_the_seconds_of_judge_timeout_hold_for_each_part_of_a_response(server, tmp_path, waits, capsys, first, then):
    began = time.monotonic()
    fails(capsys, lambda: chats(server, tmp_path, [drips(first, then)] * 3, timeout=0.2), "within --judge_timeout 0.2")
    assert time.monotonic() - began < 6


def test_a_server_that_speaks_no_http_is_told_from_one_that_is_slow(server, tmp_path, waits, capsys):
    fails(capsys, lambda: chats(server, tmp_path, [b"\x15\x03\x01\x00\x02\x02\x46"] * 3), "not HTTP", "https://?")
