"""No number changes while files move: trainings, generated text and rows of the table, bit for bit as recorded.

    python tests/test_golden.py         # records golden.json anew

One thread, tiny settings. Bits hold on one kind of machine and one torch alone: on another the tests are skipped. This
is a tool for the restructure, and goes when that is done.
"""
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

ROOT, FILE = Path(__file__).resolve().parent.parent, Path(__file__).resolve().with_name("golden.json")
D, M, V, T = 8, 16, 30, 12


# ------------------------------------------------------------------------------------------ what is recorded
def random_target(folder, vocab, n_layer, T):
    import torch
    from model import GPT, GPTConfig
    gen = torch.Generator().manual_seed(0)
    gpt = GPT(GPTConfig(len(vocab), n_layer=n_layer, n_embd=D, n_head=2, n_inner=M, n_positions=T), gen)
    for p in gpt.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=gen)
    gpt.save(folder, vocab, {"layer": 1})
    return str(folder)


def taught(folder, idx_NBT):
    """Some steps of training for a target, mostly of the MLP that is taken apart, so that this is worth something."""
    import torch
    from model import GPT
    gpt = GPT.load(folder).requires_grad_(True)
    for other in (0, 2):
        gpt.h[other].mlp.c_proj.weight.data.mul_(0.1)
        gpt.h[other].mlp.requires_grad_(False)
    gpt.h[1].mlp.c_proj.weight.data.mul_(3)
    opt = torch.optim.Adam([p for p in gpt.parameters() if p.requires_grad], 1e-2)
    for step in range(300):
        idx_BT = torch.from_numpy(idx_NBT[step % len(idx_NBT)])
        loss = torch.nn.functional.cross_entropy(gpt(idx_BT[:, :-1]).flatten(0, 1), idx_BT[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()
    gpt.save(folder, gpt.vocab, {"layer": 1})


def trainings():
    """[(method, changes of its Config)]."""
    variants, out = ("topk", "batchtopk", "jumprelu", "stochastic", "relu"), []
    act = dict(F=24, k=3, N=40, dead=72)
    for ci_fn in ("global", "mlp", "shared", "vector"):
        for optimizer in ("muon", "adam"):
            out.append(("spd", dict(ci_fn=ci_fn, optimizer=optimizer)))
    for change in (dict(adversary="none"), dict(adversary="pgd"), dict(adversary="pgd", optimizer="adam", penalty="lp"),
                   dict(penalty="lp"), dict(penalty="lp", freq_a=0.), dict(start="neurons"),
                   dict(start="neurons", ci_fn="mlp", adversary="pgd"), dict(faith="absolute", c_faith=1000.),
                   dict(project=False), dict(eval_every=5), dict(adversary="pgd", adv_ascents=0)):
        out.append(("spd", change))
    for v in variants:
        out += [("sae", act | dict(variant=v, site=site)) for site in ("mlp_out", "mlp_in", "resid")]
        out += [("sae", act | dict(variant=v) | change) for change in (
            dict(frozen=True), dict(optimizer="muon"), dict(objective="kl"), dict(objective="kl", site="resid"))]
        out += [("transcoder", act | dict(variant=v) | change) for change in (
            {}, dict(skip=True), dict(objective="kl"), dict(objective="kl", skip=True), dict(optimizer="muon"),
            dict(optimizer="muon", skip=True))]
    for noiseless in (dict(noise=False), dict(noise=False, w_freq=0.), dict(noise=False, w_freq=1e3, c_first=1e-6)):
        out += [(name, act | dict(variant="stochastic") | noiseless) for name in ("sae", "transcoder")]
    for v in ("batchtopk", "jumprelu"):
        out += [("clt", dict(F=10, k=2, N=40, lam=.01, variant=v) | change) for change in (
            {}, dict(off_diagonal=False), dict(optimizer="muon"), dict(replace="all"))]
    for kind in ({}, dict(objective="kl"), dict(sum_to_weights=True), dict(sum_to_weights=True, beta=0.),
                 dict(gate="relu"), dict(objective="kl", sum_to_weights=True)):
        out += [("molt", dict(groups="3@1,2@2,1@4", N=36, optimizer=o) | kind) for o in ("adam", "muon")]
    return out


TINY = dict(T=T, steps=20, lr=1e-2, log_every=1, save_every=20, eval_tokens=240, device="cpu")
TINY_SPD = dict(C=16, B=3, ci_hidden=8, pgd_rows=4, eval_every=0)


def sha(*parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def tensors_sha(path):
    """Of all tensors but the optimizers', whatever they are called."""
    import common
    tensors, _ = common.load(path)
    return sha(*sorted(sha(str(tuple(v.shape)).encode(), v.numpy().tobytes()).encode() for k, v in tensors.items()
                       if not k.startswith("opt")))


def log_of(folder, *keys):
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in keys if key in row]


def trained(work):
    """{training: its losses, its tensors, its summary}."""
    import importlib
    target, out = random_target(work / "target", [f"w{i}" for i in range(V)], 3, T), {}
    np.random.default_rng(0).integers(0, V, 20_000).astype(np.uint16).tofile(work / "x.bin")
    tiny = TINY | dict(model=target, data=str(work / "x.bin"))
    for i, (name, change) in enumerate(trainings()):
        script, flags, folder = name, change, work / f"run{i}"
        if change.get("variant") == "stochastic":           # recorded as a variant of both, a file of its own since
            script, flags = "stochastic", {k: v for k, v in change.items() if k != "variant"} | dict(base=name)
        module = importlib.import_module(script)
        module.train(module.Config(**tiny | (TINY_SPD if name == "spd" else {}) | flags, out=str(folder)))
        summary = json.loads((folder / "summary.json").read_text())
        numbers = sorted(repr(v) for k, v in summary.items() if isinstance(v, float) and "second" not in k)
        out[" ".join([name, *(f"{k}={v}" for k, v in change.items() if k not in "FkN dead groups lam")])] = dict(
            losses=log_of(folder, "loss"), tensors=tensors_sha(folder / f"{script}.safetensors"),
            summary=sha(*(v.encode() for v in numbers)))
    return out


def pretrained(work):
    import pretrain
    words = [chr(97 + i % 26) * (1 + i // 26) for i in range(30)]
    steps = np.random.default_rng(0).integers(0, 2, 4000)
    at, text = 0, []
    for step in steps:
        text.append(words[at])
        at = (at + 1) % 30 if step else (7 * at + 3) % 30
    Path("x.txt").write_text(" ".join(text))
    pretrain.train(pretrain.Config(data="x.txt", out="mine", steps=20, lr=1e-2, mlp0=3, copy=0.2, n_layer=3, n_embd=16,
                                   n_head=2, n_inner=32, T=16, B=4, warmup=5, every=1, vocab=40, device="cpu"))
    return dict(losses=log_of("runs/pretrain-mine", "loss", "validation"),
                tensors=tensors_sha("runs/pretrain-mine/checkpoint.safetensors"))


def told(n=200):
    """n stories with all that is known of them, and the prompts."""
    import data
    try:
        from tinytales import concepts, prompts, story
        vocab = story.VOCAB
    except ImportError:
        import concepts
        import prompts
        import story
        vocab = data.VOCAB
    stories = [story.tell(i) for i in range(n)]
    ids = np.concatenate([np.array(s.ids, np.uint16) for s in stories])
    events = [[s.events, s.spans, s.plan] for s in stories]
    labels = concepts.labels(ids, vocab, concepts.lexical(vocab))
    return dict(ids=sha(ids.tobytes()), state=sha(repr(events).encode()), labels=sha(np.packbits(labels).tobytes()),
                names=sha(repr(concepts.concept_names(True)).encode()),
                prompts=sha(repr({k: [[*map(sorted, (p.right, p.wrong)), p.ids] for p in v]          # sets have no order
                                  for k, v in prompts.prompts(5).items()}).encode())), ids


def table_rows(work, ids, vocab):
    """The rows of compare.py for every method and floor at one sparsity, all groups but the judge; stability of two seeds."""
    import compare
    count = np.bincount(ids, minlength=len(vocab))
    common_words = np.union1d([0, 1], count.argsort(kind="stable")[-700:])        # 0 and 1: end of text, unknown word
    new = np.ones(len(vocab), np.uint16)
    new[common_words] = np.arange(len(common_words))
    new[ids[:30_000]].tofile(work / "words.bin")
    target = random_target(work / "words", [vocab[i] for i in common_words], 3, 24)
    taught(target, new[ids[:61 * 384]].astype(np.int64).reshape(61, 16, 24))
    small = dict(F=72, N=96, C=16, B=4, ci_hidden=8, groups="3@2,2@4", dead=100)
    for name, m in list(compare.METHODS.items()):
        fields = {f.name for f in dataclasses.fields(m.module.Config)}
        change = m.change | {k: v for k, v in small.items() if k in fields}
        compare.METHODS[name] = m._replace(change=change, values=(m.values[len(m.values) // 2],))
    for name, floor in list(compare.FLOORS.items()):
        compare.FLOORS[name] = floor._replace(values=(floor.values[len(floor.values) // 2],))
    compare.SMALL = 72
    compare.sae.Config.F = 72
    cfg, out = compare.Config(model=target, data=str(work / "words.bin"), device="cpu", tokens=96 * 10, explained=10,
                              eval_tokens=960, runs=str(work / "runs")), {}
    for seeds, metrics in ((1, "all"), (2, "stability")):
        with contextlib.suppress(SystemExit):
            compare.main(dataclasses.replace(cfg, seeds=seeds, metrics=metrics, out=str(work / metrics)))
        for row in json.loads((work / metrics / "results.json").read_text())["rows"]:
            row["metrics"] = {k: v["mean"] for k, v in row["metrics"].items() if "seconds" not in k}
            out[f"{row['name']} {metrics}"] = flat(row)
    return out


def flat(value, name=""):
    """{a.b.c: leaf}."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}").items()}
    return {name.removeprefix("."): value}


def machine():
    """What the bits depend on."""
    import torch
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    # the features say more than the name, which virtual machines make up
    return dict(torch=torch.__version__, numpy=np.__version__,
                cpu=sha("".join(re.findall(r"^(?:model name|flags)\s*:.*$", info, re.M)[:2]).encode()))


def record():
    """All of it, in a folder of its own, on one thread."""
    sys.path.insert(0, str(ROOT))
    import torch
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        work, noise = Path(work), io.StringIO()
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            text, ids = told()
            import data
            found = dict(machine=machine(), text=text, pretrain=pretrained(work), trainings=trained(work),
                         rows=table_rows(work, ids, list(data.VOCAB)))
        os.chdir(ROOT)
    return json.loads(json.dumps(found))


# ---------------------------------------------------------------------------------------------------- the tests
@pytest.fixture(scope="module")
def golden():
    """(recorded, found today): in a process of its own, where nothing that other tests did can reach it."""
    was = json.loads(FILE.read_text())
    if was["machine"] != machine():
        pytest.skip(f"recorded on another machine or torch: {was['machine']}, not {machine()}")
    env = os.environ | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    run = subprocess.run([sys.executable, __file__, "-"], env=env, capture_output=True, text=True)
    assert not run.returncode, run.stderr[-3000:]
    return was, json.loads(run.stdout)


def test_text_and_pretraining_are_as_recorded(golden):
    was, now = golden
    assert now["text"] == was["text"]
    assert now["pretrain"] == was["pretrain"]


def test_trainings_are_as_recorded(golden):
    was, now = (found["trainings"] for found in golden)
    assert len(now) == len(was)
    for name in was:
        assert now[name] == was[name], name


def test_rows_of_the_table_are_as_recorded(golden):
    was, now = (found["rows"] for found in golden)
    assert now.keys() == was.keys()
    for name in was:
        changed = {k: (v, now[name].get(k)) for k, v in was[name].items() if now[name].get(k) != v}
        assert not changed, (name, changed)


if __name__ == "__main__":
    text = json.dumps(record(), allow_nan=True).replace('}, "', '},\n"')
    if sys.argv[1:] == ["-"]:
        print(text)
    else:
        FILE.write_text(text + "\n")
