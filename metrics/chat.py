"""How does an LLM's reply get here? A client for any OpenAI-compatible endpoint, of the standard
library only.

    the connection fails, or 5xx    asked again 4 times, after 1, 2, 4, .. seconds
    429, or a Retry-After           waited for as told, at most PATIENCE seconds for one reply
    a parameter is refused          the budget goes by its other name, temperature is left out
    no text, or it is cut off       asked for with more tokens: those of BUDGETS
    anything else, redirects too    one line that says what the server said

Redirects are not followed: they would take the key to another address. The key comes from the
environment, is stored nowhere and never printed. Replies that could be used are cached.
"""
import email.utils
import hashlib
import http.client
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import common
from tinytales import cache

PATIENCE = 300          # most seconds of waiting for one reply
BUDGETS = (1, 4, 16)    # what the budget is multiplied by, as long as there is no whole reply
LONGEST = 1 << 24       # most bytes of a reply
SHOWN = 300             # most characters of a server's message that are printed
PASSING = (0, 408, 409, 425, 429)       # codes of failures that may pass; 0: no code; and 5xx
# what reading from a server raises
FAILURES = (OSError, http.client.HTTPException, ValueError, zlib.error)
# the ends and beginnings of what a reasoning model thinks before it answers
THOUGHT = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/think\]"
                     r"|<\|channel\|>final<\|message\|>", re.I)
THINKING = re.compile(r"<(?:think|thinking|thought|reasoning)>|\[think\]"
                      r"|<\|channel\|>analysis", re.I)


class Reply(NamedTuple):
    """What a model said."""
    text: str                       # without its reasoning
    is_whole: bool                  # is there a text, and not cut off by the budget?


class Trouble(Exception):
    """Why a request has no reply."""
    def __init__(self, text, code=0, wait=None, is_final=False):
        super().__init__(text)
        self.code = code            # of HTTP; 0: none
        self.wait = wait            # seconds that the server asks to wait, if it does
        self.is_busy = code == 429 or wait is not None
        self.may_pass = (code in PASSING or code >= 500) and not is_final


class KeepAddress(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None                 # the redirect is an HTTPError then


class ChatClient:
    """One model at one endpoint, as it is asked."""

    def __init__(self, base_url, model, timeout=120, temperature=0, tokens=200, retries=4, wait=1.,
                 folder=None):
        self.url = completions_url(base_url)
        self.model = model
        self.timeout = timeout          # seconds until a reply has to be there, whole
        self.options = dict(temperature=temperature)
        self.tokens = tokens
        self.budget_name = "max_tokens"
        self.too_few = set()            # budgets in which there was no whole reply
        self.retries = retries
        self.wait = wait                # seconds before the second try, doubled for each more
        # all that a reply depends on, but the messages
        self.settings = [self.url, model, temperature, tokens]
        self.folder = Path(folder or cache.CACHE / "judge")
        self.key = read_key("OPENAI_API_KEY")
        self.proxy = proxy_of(self.url)
        # never printed: the key, the user name and password of the proxy
        self.secrets = [self.key, self.proxy.rpartition("@")[0]]
        self.open = urllib.request.build_opener(KeepAddress).open

    def check(self):
        """Fail unless the endpoint gives a text now: one small request, past the cache."""
        retries = self.retries
        self.retries = 1            # an address that is wrong is not worth more
        request = [dict(role="user", content="Reply with the word yes.")]
        if self.fresh(request, any_text) is None:
            self.fail("its replies hold no text: a model that thinks may need more --judge_tokens")
        self.retries = retries

    def chat(self, messages, read):
        """What does `read` make of the reply to some messages? Kept replies come first.

        read(text) is None where a text is of no use; so is the answer, if no reply is of use.
        Fails if the endpoint gives no reply after all tries."""
        text = read_kept(self.path_of(messages))
        value = None if text is None else read(text)
        return self.fresh(messages, read) if value is None else value

    def fresh(self, messages, read):
        """`chat` without the replies that are kept."""
        for factor in BUDGETS:
            budget = factor * self.tokens
            try:
                reply = self.ask(messages, budget)
            except Trouble as e:
                if factor > 1 and e.code in (400, 422):
                    return None         # more tokens than the model takes
                self.fail(e)
            value = read(reply.text)
            if value is not None:
                keep(self.path_of(messages), reply.text)
                return value
            if reply.is_whole:
                return None
            if budget not in self.too_few:
                self.too_few.add(budget)        # said once, as all replies may be like this
                self.say(f"no whole reply in {budget} tokens: asked for more, see --judge_tokens")
        return None

    def path_of(self, messages):
        """Where is the reply to some messages kept?"""
        asked = json.dumps([*self.settings, messages])
        return self.folder / hashlib.sha256(asked.encode()).hexdigest()

    def ask(self, messages, budget):
        """Get one reply, trying again as long as that may help; raises Trouble otherwise."""
        tries = {True: 0, False: 0}     # that a busy server refused; that failed
        waited = 0
        while True:
            try:
                return self.post(messages, budget)
            except Trouble as e:
                trouble = e
            if self.adapt(trouble):
                continue
            pause = trouble.wait
            if pause is None:
                pause = min(60, self.wait * 2 ** sum(tries.values()))
            tries[trouble.is_busy] += 1
            waited += pause
            if not trouble.may_pass or tries[False] > self.retries:
                raise trouble
            if waited > PATIENCE:
                raise Trouble(f"{trouble}; waiting for it would take {waited:.0f} s, and "
                              f"{PATIENCE} is the most for one reply", trouble.code)
            if pause >= 5:
                self.say(f"waiting {pause:.0f} s: {trouble}")
            time.sleep(pause)

    def adapt(self, trouble):
        """Change the parameter that a server has refused, and say so where the replies change;
        False if there is none to change."""
        if trouble.code not in (400, 422):
            return False
        if "max_tokens" in str(trouble) or "max_completion_tokens" in str(trouble):
            if self.budget_name == "max_tokens":
                self.budget_name = "max_completion_tokens"
                return True
        if "temperature" in str(trouble) and self.options:
            self.options = {}
            self.say(f"asked without a temperature from now on: {trouble}")
            return True
        return False

    def post(self, messages, budget):
        """Make one request; raises Trouble if no reply comes of it."""
        asked = dict(model=self.model, messages=messages, **self.options)
        asked[self.budget_name] = budget
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
            headers["api-key"] = self.key           # as Azure calls it
        request = urllib.request.Request(self.url, json.dumps(asked).encode(), headers)
        try:
            return within(self.timeout, self.exchange, request)
        except TimeoutError:
            raise Trouble(f"no reply within --judge_timeout {self.timeout:g}") from None

    def exchange(self, request):
        """The Reply to a request; raises Trouble, or TimeoutError, if there is none."""
        ends = time.monotonic() + self.timeout
        try:
            with self.open(request, timeout=self.timeout) as response:
                body = read_body(response, ends)
            return read_reply(body)
        except urllib.error.HTTPError as e:
            raise self.refusal(e, ends) from None
        except FAILURES as e:
            reason = getattr(e, "reason", e)        # what a URLError wraps
            text = f"{reason}" or type(reason).__name__
            if isinstance(reason, TimeoutError):
                raise TimeoutError from None
            if type(reason) is http.client.BadStatusLine:
                text = f"its reply is not HTTP, is its address https://? ({text})"
            raise Trouble(text) from None

    def refusal(self, error, ends):
        """What an HTTPError says: its code, the server's own message, where it redirects to."""
        try:
            body = read_body(error.fp, ends)
        except FAILURES:
            body = ""
        text = f"HTTP {error.code} {error.reason}: {said_in(body)}"
        address = error.headers.get("Location")
        if address:
            text = f"HTTP {error.code}: moved to {address.partition('?')[0]}, give that address"
        if error.code in (401, 403):
            text += f" (OPENAI_API_KEY is {'set' if self.key else 'not set'})"
        # a quota that is used up does not come back in minutes
        is_final = "insufficient_quota" in body
        return Trouble(text, error.code, told_to_wait(error.headers), is_final)

    def say(self, text):
        print("judge:", self.printable(text), flush=True)

    def fail(self, text):
        address, _, _ = self.url.partition("?")
        if self.proxy:
            address += f", through {urllib.parse.urlsplit(address).scheme}_proxy {self.proxy}"
        common.fail(f"--judge_url {self.printable(address)}: {self.printable(text)}")

    def printable(self, text):
        """A text on one line, short, and without the key, that a server may have sent back."""
        text = str(text)
        for secret in self.secrets:
            if secret:
                text = text.replace(secret, "***")
        text = "".join(c if c.isprintable() else " " for c in text)
        text = " ".join(text.split())
        return text if len(text) <= SHOWN else f"{text[:SHOWN]} .."


# ------------------------------------------------------------------------- what it is given
def completions_url(base):
    """The address that a --judge_url stands for: its path goes on before its query."""
    shown = base.partition("?")[0].rpartition("@")[2]
    try:
        parts = urllib.parse.urlsplit(base.strip())
        is_right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:                  # a port that is no number, or brackets that don't close
        is_right = False
    if not is_right or not re.fullmatch("[!-~]*", base.strip()):
        common.fail(f"--judge_url {shown}: must be an address such as http://localhost:8000/v1")
    if parts.username is not None:
        common.fail(f"--judge_url {shown}: must have no user name or password in it; a key goes "
                    "into OPENAI_API_KEY")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    return parts._replace(path=path, fragment="").geturl()


def read_key(name):
    """The key in a variable of the environment, "" for none; fails on what no header can hold."""
    key = os.environ.get(name, "").strip()
    if not re.fullmatch("[!-~]*", key):
        common.fail(f"{name}: holds a space or a character that no key has")
    return key


def proxy_of(url):
    """The proxy between here and a URL, as http_proxy or https_proxy names it; "" for none."""
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme, "")
    return "" if urllib.request.proxy_bypass(parts.netloc) else proxy


def any_text(text):
    return text.strip() or None


# ------------------------------------------------------------------------ what a server sends
def within(seconds, function, argument):
    """function(argument), in a thread that is left behind if it takes longer: then TimeoutError.

    No other limit holds for a server that sends a byte of a header now and then, or for the look-up
    of its name."""
    outcome = []

    def run():
        try:
            outcome.append((function(argument), None))
        except Exception as e:
            outcome.append((None, e))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds + 1)        # the function's own limit comes first, it knows more
    if not outcome:
        raise TimeoutError
    value, error = outcome[0]
    if error:
        raise error
    return value


def read_body(response, ends):
    """Read the text of a response; raises one of FAILURES if it is not there, whole, by then."""
    expected = response.length          # None where the end of the connection tells it
    pieces = []
    size = 0
    while expected is None or size < expected:
        piece = response.read1(1 << 16)
        if not piece:
            break
        pieces.append(piece)
        size += len(piece)
        if size > LONGEST:
            raise ValueError(f"its reply is longer than {LONGEST} bytes")
        if time.monotonic() > ends:
            raise TimeoutError
    if expected and size < expected:
        raise http.client.IncompleteRead(b"", expected - size)
    body = b"".join(pieces)

    # as it is sent although nobody has asked for it
    if response.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip", "deflate"):
        unpacked = zlib.decompressobj(47)           # of either kind, which its header tells
        body = unpacked.decompress(body, LONGEST)
        if not unpacked.eof:
            raise ValueError("its compressed reply is cut off or too long")
    try:
        text = body.decode(response.headers.get_content_charset("utf-8"), "replace")
    except LookupError:                             # of a charset that nobody knows
        text = body.decode("utf-8", "replace")
    return text.removeprefix("\ufeff")


def read_reply(body):
    """Take the Reply out of a chat completion; raises Trouble where a body is none."""
    try:
        completion = json.loads(body)
    except (ValueError, RecursionError):
        raise Trouble(f"its reply is no JSON: {without_tags(body)}") from None
    completion = completion if isinstance(completion, dict) else {}
    error = completion.get("error")
    if error or "choices" not in completion:
        code = error.get("code") if isinstance(error, dict) else 0
        code = code if type(code) is int else 0
        raise Trouble(f"its reply is no chat completion: {said_in(body)}", code)

    # any part may be null or missing: that is a reply without text
    choices = completion["choices"] or [{}]
    choice = choices[0] if isinstance(choices, list) else {}
    choice = choice if isinstance(choice, dict) else {}
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    text = text_of(content)
    if str(choice.get("finish_reason")).lower() in ("length", "max_tokens"):
        # its last line is cut off; the mark tells that something went on
        return Reply(text.rpartition("\n")[0] + "\n…", False)
    return Reply(text, text.strip() != "")


def text_of(content):
    """The text of a message's content, a string or a list of parts, without the reasoning."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str):
        return ""
    answer = THINKING.split(THOUGHT.split(content)[-1])[0]
    # half of a surrogate pair, which JSON can spell, is no text
    return answer.encode("utf-8", "replace").decode()


def said_in(body):
    """What does the body of an error say? Its JSON's message, or its text."""
    try:
        found = json.loads(body)
        while isinstance(found, dict):
            named = [found[key] for key in ("error", "message", "detail", "msg") if found.get(key)]
            found = named[0] if named else json.dumps(found)
        return found if isinstance(found, str) else json.dumps(found)
    except (ValueError, RecursionError):
        return without_tags(body)


def without_tags(html):
    text = re.sub(r"<(style|script)\b.*?</\1>|<[^>]*>", " ", html[:20_000], flags=re.I | re.S)
    return text.strip() or "(empty)"


def told_to_wait(headers):
    """How many seconds does Retry-After, in seconds or as a date, ask to wait? None: it does
    not. Never less than one."""
    told = headers.get("Retry-After", "")
    try:
        seconds = float(told)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(told).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(1, seconds) if math.isfinite(seconds) else None


# --------------------------------------------------------------------------------- the cache
def keep(path, text):
    """Write a reply behind its own hash, by which `read_kept` knows that it is whole."""
    data = text.encode()
    common.write(path, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


def read_kept(path):
    """Read a reply that `keep` wrote; None where there is none or it is damaged."""
    try:
        if not path.is_file():
            return None
        digest, _, data = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    is_whole = digest == hashlib.sha256(data).hexdigest().encode()
    return data.decode() if is_whole else None
