"""GPT-2's layout, its seam, and the folders that it reads and writes."""
import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import data
import evals
import model
from model import GPT, GPTConfig, cross_entropy
from test_common import fails

CFG = GPTConfig(vocab_size=50, n_layer=3, n_embd=24, n_head=3, n_inner=40, n_positions=16)
VOCAB = ["<|endoftext|>", *(f"w{i}" for i in range(1, 50))]

@pytest.fixture
def gpt():
    """A model whose every parameter is random, biases and LayerNorms too, and large enough to matter."""
    gpt, g = GPT(CFG), common.generator(0, "test")
    for p in gpt.parameters():
        torch.nn.init.normal_(p, mean=0.3 if p.ndim == 1 else 0, std=0.3, generator=g)
    return gpt

@pytest.fixture
def idx_BT():
    return torch.randint(50, (5, 16), generator=common.generator(0, "idx"))

def test_layout_is_gpt2(gpt):
    D, M, L = 24, 40, 3
    block = {"ln_1.weight": (D,), "ln_1.bias": (D,), "ln_2.weight": (D,), "ln_2.bias": (D,),
             "attn.c_attn.weight": (D, 3 * D), "attn.c_attn.bias": (3 * D,), "attn.c_proj.weight": (D, D),
             "attn.c_proj.bias": (D,), "mlp.c_fc.weight": (D, M), "mlp.c_fc.bias": (M,), "mlp.c_proj.weight": (M, D),
             "mlp.c_proj.bias": (D,)}
    want = {"wte.weight": (50, D), "wpe.weight": (16, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    want |= {f"h.{l}.{k}": v for l in range(L) for k, v in block.items()}
    assert {k: tuple(v.shape) for k, v in gpt.state_dict().items()} == want

def test_initialisation():
    gpt = GPT(GPTConfig(3000, n_layer=8, n_embd=64, n_inner=256), common.generator(0, "init"))
    for name, p in gpt.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 if name[:2] in ("wt", "wp") else 1 / 32 if name.endswith("c_proj.weight") else 1 / 8
            assert abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < 0.05 * std, name
    again = GPT(gpt.cfg, common.generator(0, "init"))
    assert all(torch.equal(p, q) for p, q in zip(gpt.parameters(), again.parameters()))

def test_logits_by_hand():
    """One layer, two tokens, D = 2: every step of the docstring's equations, in plain Python."""
    gpt = GPT(GPTConfig(3, n_layer=1, n_embd=2, n_head=1, n_inner=1, n_positions=2)).double()
    g = common.generator(1, "w")
    w = {k: torch.randn(p.shape, generator=g, dtype=torch.double) for k, p in gpt.state_dict().items()}
    gpt.load_state_dict(w)
    w = {k: v.tolist() for k, v in w.items()}

    def norm(r, name):
        mean = sum(r) / 2
        std = math.sqrt(sum((a - mean) ** 2 for a in r) / 2 + 1e-5)
        return [(a - mean) / std * s + b for a, s, b in zip(r, w[f"{name}.weight"], w[f"{name}.bias"])]
    def conv(x, name):
        return [sum(a * row[j] for a, row in zip(x, w[f"{name}.weight"])) + b for j, b in enumerate(w[f"{name}.bias"])]
    def add(x, y):
        return [a + b for a, b in zip(x, y)]
    def gelu(a):
        return a / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a ** 3)))
    idx = [2, 0]
    r = [add(w["wte.weight"][i], w["wpe.weight"][t]) for t, i in enumerate(idx)]
    qkv = [conv(norm(x, "h.0.ln_1"), "h.0.attn.c_attn") for x in r]
    want = []
    for t in range(2):
        score = [sum(a * b for a, b in zip(qkv[t][:2], qkv[s][2:4])) / math.sqrt(2) for s in range(t + 1)]
        p = [math.exp(z) / sum(map(math.exp, score)) for z in score]
        z = [sum(p[s] * qkv[s][4 + d] for s in range(t + 1)) for d in range(2)]
        stream = add(r[t], conv(z, "h.0.attn.c_proj"))
        hidden = [gelu(a) for a in conv(norm(stream, "h.0.ln_2"), "h.0.mlp.c_fc")]
        stream = norm(add(stream, conv(hidden, "h.0.mlp.c_proj")), "ln_f")
        want.append([sum(a * b for a, b in zip(stream, row)) for row in w["wte.weight"]])
    torch.testing.assert_close(gpt(torch.tensor([idx]))[0], torch.tensor(want, dtype=torch.double), rtol=0, atol=1e-12)

def test_causal_and_positions(gpt, idx_BT, capsys):
    logits_BTV = gpt(idx_BT)
    other_BT = idx_BT.clone()
    other_BT[:, 9] = (other_BT[:, 9] + 1) % 50
    changed_BT = (gpt(other_BT) != logits_BTV).any(-1)
    assert not changed_BT[:, :9].any() and changed_BT[:, 9:].all()
    torch.testing.assert_close(gpt(idx_BT[:, :7]), logits_BTV[:, :7])
    fails(capsys, lambda: gpt(torch.zeros(1, 17, dtype=torch.long)), "17", "16 positions")

def test_seam_is_exact(gpt, idx_BT):
    logits_BTV, calls = gpt(idx_BT), []
    def original(layer, x_BTD, mlp):
        calls.append((layer, mlp))
        return mlp(x_BTD)
    assert torch.equal(gpt(idx_BT, original), logits_BTV)
    assert calls == [(l, block.mlp) for l, block in enumerate(gpt.h)]
    for l, block in enumerate(gpt.h):
        x_BTD, r_BTD = gpt.prefix(idx_BT, l)
        assert torch.equal(gpt.suffix(r_BTD, block.mlp(x_BTD), l), logits_BTV)

def test_seam_replaces_one_mlp_and_agrees_with_prefix_and_suffix(gpt, idx_BT):
    for l in range(3):
        x_BTD, r_BTD = gpt.prefix(idx_BT, l)
        half_BTD = 0.5 * gpt.h[l].mlp(x_BTD)
        def replace(layer, x, mlp):
            if layer == l:
                assert torch.equal(x, x_BTD)
            return 0.5 * mlp(x) if layer == l else mlp(x)
        spliced_BTV = gpt(idx_BT, replace)
        assert torch.equal(spliced_BTV, gpt.suffix(r_BTD, half_BTD, l))
        assert (spliced_BTV - gpt(idx_BT)).abs().max() > 1e-2

def test_the_seam_goes_from_mlp_to_mlp(gpt, idx_BT):
    x_BTD, r_BTD = gpt.prefix(idx_BT, 0)
    for l in range(2):
        x_BTD, r_BTD = gpt.next_mlp(r_BTD, gpt.mlp(l)(x_BTD), l)
        for got, want in zip((x_BTD, r_BTD), gpt.prefix(idx_BT, l + 1)):
            assert torch.equal(got, want)
    assert torch.equal(gpt.suffix(r_BTD, gpt.mlp(2)(x_BTD), 2), gpt(idx_BT)) and gpt.device == torch.device("cpu")

MATRICES = [f"h.{l}.{name}" for l in range(3) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]

def test_linear_is_called_at_every_matrix_and_exact(gpt, idx_BT):
    calls = []
    def plain(name, x, module):
        calls.append(name)
        assert module is gpt.get_submodule(name) and x.shape[-1] == len(module.weight)
        return module(x)
    assert torch.equal(gpt(idx_BT, linear=plain), gpt(idx_BT)) and calls == MATRICES
    calls.clear()
    for got, want in zip(gpt.prefix(idx_BT, 1, plain), gpt.prefix(idx_BT, 1)):
        assert torch.equal(got, want)
    assert calls == MATRICES[:6]
    calls.clear()                                           # with both, MLPs are replace's
    assert torch.equal(gpt(idx_BT, lambda layer, x, mlp: mlp(x), plain), gpt(idx_BT))
    assert calls == [name for name in MATRICES if "attn" in name]

@pytest.mark.parametrize("name", MATRICES)
def test_linear_stands_in_for_one_matrix(gpt, idx_BT, name):
    got_BTV = gpt(idx_BT, linear=lambda n, x, module: 0.5 * module(x) if n == name else module(x))
    for p in gpt.get_submodule(name).parameters():
        p.data.mul_(0.5)
    torch.testing.assert_close(got_BTV, gpt(idx_BT))
    assert (got_BTV - gpt(idx_BT, linear=lambda n, x, module: 2 * module(x))).abs().max() > 1e-2

def test_distance_by_hand(gpt, idx_BT):
    other_BT = idx_BT.roll(1, 0)
    p, q = (gpt(idx).softmax(-1).tolist() for idx in (idx_BT, other_BT))
    want = [[sum(a * math.log(a / b) for a, b in zip(p[i][t], q[i][t])) for t in range(1, 15)] for i in range(5)]
    clean, other = (gpt.predictions(gpt(idx)) for idx in (idx_BT, other_BT))
    torch.testing.assert_close(gpt.distance(clean, other), torch.tensor(want), rtol=1e-4, atol=1e-5)
    assert (gpt.distance(clean, clean) == 0).all()

@pytest.mark.parametrize("n", [1, 3])
def test_distance_for_training_is_the_distance(gpt, idx_BT, n):
    """Values and gradients of n stand-ins in one pass: those of the plain equation, one by one."""
    gpt.double()
    x_BTD, r_BTD = gpt.prefix(idx_BT, 1)
    y_BTD = gpt.mlp(1)(x_BTD)
    y_hats = [((0.5 + i) * y_BTD).detach().requires_grad_() for i in range(n)]
    got = gpt.distance_from(r_BTD, y_BTD, 1)(torch.cat(y_hats))
    assert got.shape == (5 * n, 16)
    clean = gpt.suffix(r_BTD, y_BTD, 1).log_softmax(-1)
    want = torch.cat([gpt.distance(clean, gpt.suffix(r_BTD, y_hat, 1).log_softmax(-1)) for y_hat in y_hats])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    scored = gpt.distance(*(gpt.predictions(gpt.suffix(r_BTD, y, 1)).double() for y in (y_BTD, y_hats[0])))
    torch.testing.assert_close(got[:5, 1:-1], scored, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(kl.square().sum(), y_hats, retain_graph=True) for kl in (got, want)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)

def test_mlp_in_the_papers_letters(gpt):
    x_BTD, mlp = torch.randn(2, 4, 24, generator=common.generator(0, "x")), gpt.h[1].mlp
    h_BTM = torch.nn.functional.gelu(x_BTD @ mlp.c_fc.weight + mlp.c_fc.bias, approximate="tanh")
    torch.testing.assert_close(mlp(x_BTD), h_BTM @ mlp.c_proj.weight + mlp.c_proj.bias)

def test_save_and_load(gpt, idx_BT, tmp_path):
    gpt.save(tmp_path / "t", VOCAB, dict(layer=2, data="tinytales"))
    state = torch.get_rng_state()
    got = GPT.load(tmp_path / "t")
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(got(idx_BT), gpt(idx_BT)) and got.vocab == VOCAB and got.cfg == CFG
    assert not got.training and not any(p.requires_grad for p in got.parameters())
    assert got.meta == dict(layer=2, data="tinytales") and model.default_layer(got) == 2
    content = b'{"n_head": 3}' + (tmp_path / "t" / "model.safetensors").read_bytes()       # which the weights don't tell
    assert got.hash == hashlib.sha256(content).hexdigest()[:16]
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["config.json", "model.safetensors", "vocab.json"]
    with safe_open(tmp_path / "t" / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}                                 # some versions of transformers insist
    with torch.no_grad():
        gpt.wte.weight[0, 0] += 1
    gpt.save(tmp_path / "u", VOCAB, {})
    other = GPT.load(tmp_path / "u")
    assert other.hash != got.hash and model.default_layer(other) == 1

def rewrite(folder, edit):
    """Edit the tensors of a saved model in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

def test_load_accepts_the_other_spellings(gpt, idx_BT, tmp_path):
    gpt.save(tmp_path, VOCAB, {})
    def respell(tensors):                   # no "transformer." prefix, a copy of the head, old causal masks, float16
        for k in list(tensors):
            tensors[k.removeprefix("transformer.")] = tensors.pop(k)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()
        for l in range(3):
            tensors[f"h.{l}.attn.bias"] = torch.ones(1, 1, 16, 16)
            tensors[f"h.{l}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["wpe.weight"] = tensors["wpe.weight"].half()
    rewrite(tmp_path, respell)
    (tmp_path / "vocab.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    for k in ("nanodecomp", "scale_attn_weights", "tie_word_embeddings", "layer_norm_epsilon"):
        del config[k]
    (tmp_path / "config.json").write_text(json.dumps(config))
    got = GPT.load(tmp_path)
    torch.testing.assert_close(got(idx_BT), gpt(idx_BT), rtol=0, atol=2e-2)
    assert got.vocab[7] == "<7>" and all(p.dtype == torch.float32 for p in got.parameters())

def test_n_inner_null_means_4_D(tmp_path):
    gpt = GPT(GPTConfig(5, n_layer=1, n_embd=4, n_head=1, n_inner=16, n_positions=4))
    gpt.save(tmp_path, list("abcde"), {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_inner": None}))
    assert GPT.load(tmp_path).cfg.n_inner == 16

@pytest.mark.parametrize("change, words", [
    (dict(n_layer=4), ["model.safetensors", "3 layers", "n_layer 4"]),
    (dict(n_embd=12), ["model.safetensors", "wte.weight", "(50, 24)", "(50, 12)"]),
    (dict(n_embd=25), ["n_embd 25", "n_head 3"]),
    (dict(n_layer=0), ["n_layer is 0", "positive int"]),
    (dict(n_head="3"), ["n_head is '3'", "positive int"]),
    (dict(n_embd=None), ["n_embd is None"]),
    (dict(model_type="llama"), ["config.json", "model_type", "'llama'", "gpt2"]),
    (dict(activation_function="silu"), ["activation_function", "'silu'", "gelu_new, gelu, relu"]),
    (dict(activation_function=["gelu"]), ["activation_function", "['gelu']"]),
    (dict(scale_attn_by_inverse_layer_idx=True), ["config.json", "scale_attn_by_inverse_layer_idx"]),
    (dict(tie_word_embeddings=False), ["config.json", "tie_word_embeddings", "lm_head.weight"]),
])
def test_config_and_weights_must_fit(gpt, tmp_path, capsys, change, words):
    gpt.save(tmp_path, VOCAB, {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    fails(capsys, lambda: GPT.load(tmp_path), *words)

def test_bad_folders(gpt, tmp_path, capsys):
    def bad(name, content, *words):
        gpt.save(tmp_path, VOCAB, {})
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
        fails(capsys, lambda: GPT.load(tmp_path), tmp_path / name, *words)
    fails(capsys, lambda: GPT.load(tmp_path / "nowhere"), tmp_path / "nowhere" / "config.json", "no such file")
    gpt.save(tmp_path, VOCAB, {})
    weights = (tmp_path / "model.safetensors").read_bytes()
    bad("config.json", None, "no such file")
    bad("config.json", b'{"n_layer": 3,', "not a JSON object")
    bad("config.json", b"[1, 2]", "not a JSON object")
    bad("config.json", b"\xff\xfe", "not a JSON object")
    bad("model.safetensors", None, "no such file")
    bad("model.safetensors", weights[:len(weights) // 2], "truncated")
    bad("model.safetensors", b"", "truncated")
    for ids in (dict(a=0, b=0), dict(a=50), dict(a=-1), dict(a="0"), dict(a=[1]), dict(a=1.0)):
        bad("vocab.json", json.dumps(ids).encode(), "0 to 49")

def test_missing_unknown_or_misshapen_weights(gpt, tmp_path, capsys):
    key = "transformer.h.1.mlp.c_fc.weight"
    edits = [(lambda t: t.pop(key), "is missing"), (lambda t: t.update({key: t[key].T.contiguous()}), "(40, 24)"),
             (lambda t: t.update({"transformer.h.1.mlp.extra": t[key].clone()}), "mlp.extra")]
    for edit, word in edits:
        gpt.save(tmp_path, VOCAB, {})
        rewrite(tmp_path, edit)
        fails(capsys, lambda: GPT.load(tmp_path), tmp_path / "model.safetensors", "h.1.mlp", word)

def test_failed_save_keeps_the_old_folder(gpt, tmp_path, capsys, monkeypatch):
    gpt.save(tmp_path, VOCAB, {})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(common.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    gpt.wte.weight.data += 1
    fails(capsys, lambda: gpt.save(tmp_path, VOCAB[::-1], {}), "No space left on device")
    assert all((tmp_path / k).read_bytes() == v for k, v in before.items())

@pytest.mark.parametrize("tied", [True, False])
def test_agrees_with_transformers_both_ways(gpt, idx_BT, tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    if not tied:
        state = gpt.state_dict() | {"lm_head.weight": 0.1 * gpt.wte.weight.roll(1, 0)}
        gpt = GPT(dataclasses.replace(CFG, tie_word_embeddings=False))
        gpt.load_state_dict(state)
    gpt.save(tmp_path / "ours", VOCAB, dict(layer=1))
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(theirs.eval()(idx_BT).logits, gpt(idx_BT), rtol=0, atol=1e-4)
    config = transformers.GPT2Config(vocab_size=60, n_positions=20, n_embd=32, n_layer=2, n_head=4, bos_token_id=0,
                                     eos_token_id=0, initializer_range=0.2, tie_word_embeddings=tied)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    idx_BT = torch.randint(60, (3, 20), generator=common.generator(0, "idx"))
    torch.testing.assert_close(GPT.load(tmp_path / "theirs")(idx_BT), theirs(idx_BT).logits, rtol=0, atol=1e-4)

def test_cross_entropy_by_hand(gpt, idx_BT):
    p_BTV = gpt(idx_BT).softmax(-1).tolist()
    nll = [[-math.log(p_BTV[b][t][idx_BT[b, t + 1]]) for t in range(15)] for b in range(5)]
    assert model.cross_entropy(gpt, idx_BT) == pytest.approx(sum(map(sum, nll)) / 75, rel=1e-5)
    fresh_BT = torch.zeros(5, 16, dtype=torch.bool)
    fresh_BT[2, 4] = fresh_BT[3, 15] = fresh_BT[1, 0] = True                    # the first of a row has no prediction
    assert model.cross_entropy(gpt, idx_BT, fresh_BT) == pytest.approx((nll[2][3] + nll[3][14]) / 2, rel=1e-5)
    many_NT = idx_BT.repeat(20, 1)                                              # more than one batch
    assert model.cross_entropy(gpt, many_NT) == pytest.approx(model.cross_entropy(gpt, idx_BT), rel=1e-5)

def test_ablation_costs(gpt, idx_BT):
    with torch.no_grad():
        gpt.h[1].mlp.c_proj.weight.zero_()              # a constant MLP: its mean is all that it does
    costs = model.ablation_costs(gpt, idx_BT)
    clean = model.cross_entropy(gpt, idx_BT)
    assert abs(costs[1][0]) < 1e-5
    for l, mlp in enumerate(block.mlp for block in gpt.h):
        y_D = mlp(gpt.prefix(idx_BT, l)[0]).mean((0, 1))
        for cost, value_D in zip(costs[l], (y_D, 0 * y_D)):
            def replace(layer, x, mlp):
                return value_D.expand_as(x) if layer == l else mlp(x)
            assert cost == pytest.approx(model.cross_entropy(gpt, idx_BT, None, replace) - clean, abs=1e-5)
    assert min(abs(costs[0][0]), abs(costs[0][1]), abs(costs[1][1])) > 1e-3

def test_accuracy_counts_wins(gpt):
    class Prompt:
        def __init__(self, ids, right, wrong):
            self.ids, self.right, self.wrong = ids, right, wrong
    ids = [0, 3, 5]
    order = gpt(torch.tensor([ids]))[0, -1].argsort(descending=True).tolist()
    prompts = [Prompt(ids, [order[9], order[1]], [order[2], order[3]]), Prompt(ids, [order[5]], [order[40], order[4]]),
               Prompt(ids, [order[0]], [order[1]]), Prompt(ids, [order[7]], [order[8]])]
    assert model.accuracy(gpt, prompts) == 0.75

def test_generate(gpt):
    new = model.generate(gpt, [0], 40, -1, common.generator(0, "story"))         # past the 16 positions
    assert len(new) == 40 and all(0 <= i < 50 for i in new)
    assert new == model.generate(gpt, [0], 40, -1, common.generator(0, "story"))
    assert new != model.generate(gpt, [0], 40, -1, common.generator(1, "story"))
    ids = list(range(30))                                                       # only the last 16 are read
    assert model.generate(gpt, ids, 9, -1, common.generator(2, "s")) == model.generate(gpt, ids[14:], 9, -1,
                                                                                       common.generator(2, "s"))
    stop = new[5]
    assert model.generate(gpt, [0], 40, stop, common.generator(0, "story")) == new[:new.index(stop) + 1]


def test_the_bundled_target_is_worth_taking_apart():
    """Close to its text's derivation entropy, right on each phenomenon, and an MLP that matters before the last layer."""
    gpt = GPT.load(Path(__file__).parent.parent / "target")
    dev, T = data.load("tinytales", "dev", gpt.vocab), gpt.cfg.n_positions
    some = (T, 200)
    assert 0 < cross_entropy(gpt, dev.rows(*some), dev.fresh(*some)) - dev.entropy(*some) < 0.15
    asked = data.prompts()
    for name in ("agreement", "pronoun", "article", "quotes", "tense", "induction"):
        assert model.accuracy(gpt, asked[name]) >= 0.95, name
    for name in ("indirect object", "facts"):
        assert model.accuracy(gpt, asked[name]) >= 0.9, name
    layer = model.default_layer(gpt)
    assert 0 < layer < gpt.cfg.n_layer - 1 and gpt.meta["mean_ablation"][layer] >= 0.3
    rows = dev.rows(T)[:64]
    assert model.ablation_costs(gpt, rows)[layer][0] == pytest.approx(gpt.meta["mean_ablation"][layer], abs=0.1)


# a byte-level BPE vocabulary: “ is âĢľ, whole and as two tokens; é is Ã©
BPE = ["<|endoftext|>", "The", "Ġcat", "Ċ", "âĢľ", "âĢ", "ľ", "ĠcafÃ©", "!", "Ġ", "ð", "ŁĺĢ", "<|ひ|>", "Ä", "č"]

def test_the_alphabet_of_bytes():
    assert len(data.BYTES) == 256 and sorted(data.BYTES.values()) == list(range(256))
    known = {"Ġ": 32, "Ċ": 10, "ĉ": 9, "ł": 160, "Ń": 173, "a": 97, "!": 33, "~": 126, "¡": 161, "ÿ": 255, "â": 226,
             "Ģ": 128, "ľ": 156}
    assert {c: data.BYTES[c] for c in known} == known

@pytest.mark.parametrize("ids, text, alone", [
    ([0, 1, 2, 8], "<|endoftext|>The cat!", ["<|endoftext|>", "The", " cat", "!"]),
    ([1, 3, 9, 7], "The\n  café", ["The", "\\n", " ", " café"]),
    ([4, 5, 6], "““", ["“", "\\xe2\\x80", "\\x9c"]),                # a character that two tokens share
    ([10, 11, 12], "😀<|ひ|>", ["\\xf0", "\\x9f\\x98\\x80", "<|ひ|>"]),
    ([5, 1, 6], "\\xe2\\x80The\\x9c", ["\\xe2\\x80", "The", "\\x9c"]),   # bytes that make none
    ([13, 14], "\\xc4\r", ["\\xc4", "\\r"]),
    ([], "", []),
])
def test_tokens_of_bytes_read_as_text(ids, text, alone):
    assert data.decode(ids, BPE) == text and data.spell(ids, BPE) == alone

def test_words_are_no_bytes():
    """Letters of many languages are in the alphabet of bytes too: é is byte 233, and no character."""
    vocab = ["<|endoftext|>", "<unk>", "café", "naïve", "Łukasz", "Ġorġ", ",", "“", "”", "мир", "\x1b"]
    assert not data.is_byte_level(vocab) and not data.is_byte_level(vocab[:5]) and data.is_byte_level(BPE)
    assert data.decode([2, 6, 5, 4, 7, 9, 8], vocab) == "café, Ġorġ Łukasz “мир”"
    assert data.spell([2, 5, 10], vocab) == ["café", "Ġorġ", "\\x1b"]
    assert data.is_byte_level(["<s>", "<unk>", *data.BYTES, "Ġcat"])        # which have an unknown word at times

def test_bytes_are_told_from_words_without_all_of_them():
    """A tokenizer that was trained without the alphabet of bytes has an unknown word, and not every byte."""
    vocab = ["<|endoftext|>", "<unk>", "The", "Ġcat", "Ġsat", ".", "s", "Ġ"]
    assert data.is_byte_level(vocab) and data.decode([2, 3, 4, 5], vocab) == "The cat sat."

PIECES = ["<|endoftext|>", "<unk>", "▁The", "▁cat", "s", "▁", ".", "ca", "t"]

def test_pieces_of_sentencepiece_read_as_text(gpt):
    ids = [2, 3, 4, 5, 7, 8, 6]
    assert data.decode(ids, PIECES) == " The cats cat." and data.spell(ids, PIECES) == [" The", " cat", "s", " ", "ca", "t", "."]
    assert data.spell([2, 3], ["<|endoftext|>", "<unk>", "▁", "cat"]) == ["▁", "cat"]           # a word of its own
    gpt.vocab = PIECES + [f"w{i}" for i in range(50 - len(PIECES))]
    assert evals.as_list(gpt, [3, 4]) == "' cat' s" and evals.in_context(gpt, [0, 2, 3, 4, 6], 3) == "<|endoftext|> The cat[[s]]."
    gpt.vocab = VOCAB

def test_units_are_described_in_text(gpt):
    gpt.vocab = BPE + [f"w{i}" for i in range(50 - len(BPE))]
    assert evals.as_list(gpt, [2, 1, 3, 4]) == "' cat' The \\n “"
    row = [0, 1, 2, 8, 3, 5, 6, 1, 2, 8, 1, 7]
    assert evals.in_context(gpt, row, 6) == "<|endoftext|>The cat!\\n\\xe2\\x80[[\\x9c]]The cat!The"
    assert evals.in_context(gpt, row, 11) == "!\\n“The cat!The[[ café]]"
    gpt.vocab = VOCAB
    assert evals.as_list(gpt, [2, 1]) == "w2 w1" and evals.in_context(gpt, [0, 5, 3, 4], 2) == "<|endoftext|> w5 [[w3]] w4"
