"""Folders as other programs write them, and folders that are wrong: what folders.py makes of each."""
import hashlib
import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import baselines
import common
import data
import evals
import folders
import spd
from model import GPT, GPTConfig
from test_common import fails

V, D, L, T = 50, 24, 3, 16
VOCAB = ["<|endoftext|>", *(f"w{i}" for i in range(1, V))]


@pytest.fixture(scope="module")
def gpt():
    gpt = GPT(GPTConfig(V, n_layer=L, n_embd=D, n_head=3, n_inner=40, n_positions=T))
    for p in gpt.parameters():
        torch.nn.init.normal_(p, mean=0.3 if p.ndim == 1 else 0, std=0.3, generator=common.generator(p.numel(), "test"))
    return gpt.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def idx_BT():
    return torch.randint(V, (4, T), generator=common.generator(0, "idx"))


@pytest.fixture
def folder(gpt, tmp_path):
    gpt.save(tmp_path / "m", VOCAB, dict(layer=1))
    return tmp_path / "m"


def write(folder, tensors, **config):
    """Replace the weights of a folder, and some fields of its config.json."""
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def weights(folder):
    return load_file(folder / "model.safetensors")


def as_linear(tensors):
    """nanoGPT keeps all matrices of the blocks the other way round."""
    return {k: t.T if t.ndim == 2 and ".h." in k else t for k, t in tensors.items()}


# ------------------------------------------------------------------------------------- the head
@pytest.mark.parametrize("tied", [True, False, None, "silent"])
def test_a_head_that_differs_is_the_unembedding_everywhere(gpt, folder, idx_BT, tied):
    """As in transformers, whatever config.json says; logits, the two distances and the words that a unit pushes."""
    head_VD = torch.randn(V, D, generator=common.generator(1, "head"))
    write(folder, weights(folder) | {"lm_head.weight": head_VD}, tie_word_embeddings=tied)
    if tied == "silent":
        config = json.loads((folder / "config.json").read_text())
        del config["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(config))
    got = GPT.load(folder)
    x_BTD, r_BTD = gpt.prefix(idx_BT, 1)
    y_BTD = gpt.mlp(1)(x_BTD)
    want_BTV = gpt.hidden(r_BTD, y_BTD, 1) @ head_VD.T
    torch.testing.assert_close(got(idx_BT), want_BTV)
    torch.testing.assert_close(got.suffix(r_BTD, y_BTD, 1), want_BTV)
    other_BTV = gpt.hidden(r_BTD, 0.5 * y_BTD, 1) @ head_VD.T
    clean, other = want_BTV.log_softmax(-1), other_BTV.log_softmax(-1)
    torch.testing.assert_close(got.distance_from(r_BTD, y_BTD, 1)(0.5 * y_BTD), (clean.exp() * (clean - other)).sum(-1))
    up, down = evals.pushed(got, head_VD[:9] / gpt.ln_f.weight)
    scores = head_VD[:9] @ head_VD.T
    assert torch.equal(up, scores.topk(5).indices) and torch.equal(down, (-scores).topk(5).indices)
    got.save(folder, VOCAB, {})                                         # and again
    torch.testing.assert_close(GPT.load(folder)(idx_BT), want_BTV)
    assert set(weights(folder)) == {"lm_head.weight", *(f"transformer.{k}" for k in gpt.state_dict())}


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_wte(gpt, folder, idx_BT, tied):
    tensors = weights(folder)
    write(folder, tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, tie_word_embeddings=tied)
    assert torch.equal(GPT.load(folder)(idx_BT), gpt(idx_BT)) and "lm_head.weight" not in GPT.load(folder).state_dict()
    # of two names for one tensor safetensors.torch.save_model writes one
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    write(folder, tensors)
    assert torch.equal(GPT.load(folder)(idx_BT), gpt(idx_BT))


def test_a_random_target_has_a_head_of_its_own_too(gpt):
    cfg = GPTConfig(V, tie_word_embeddings=False)
    fresh = GPT(cfg, common.generator(0, "init"))
    assert abs(fresh.lm_head.weight.std() / 0.02 - 1) < 0.05 and fresh.unembedding is fresh.lm_head.weight
    assert torch.equal(fresh.wte.weight, GPT(GPTConfig(V), common.generator(0, "init")).wte.weight)


# ------------------------------------------------------------------------------------- spellings
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "base_model.model.", "model.", "_orig_mod.transformer.",
                                    "module._orig_mod.transformer.", "base_model.model.transformer.", "gpt.", "model.module.",
                                    "_forward_module.transformer.", "pretrained_model.transformer."])
def test_prefixes(gpt, folder, idx_BT, prefix):
    tensors = {prefix + k.removeprefix("transformer."): t for k, t in weights(folder).items()}
    tensors[prefix.replace("transformer.", "") + "lm_head.weight"] = -gpt.wte.weight
    write(folder, tensors)
    torch.testing.assert_close(GPT.load(folder)(idx_BT), -gpt(idx_BT))


def test_names_that_are_not_told_apart(folder, capsys):
    tensors = weights(folder)
    write(folder, tensors | {"ema.wte.weight": tensors["transformer.wte.weight"]})
    fails(capsys, lambda: GPT.load(folder), "more than one tensor is called wte.weight")
    write(folder, {k.replace("h.1.", "h.1._orig_mod."): t for k, t in tensors.items()})
    assert GPT.load(folder).cfg.n_layer == L
    for extra in ("lm_head.bias", "score.weight", "transformer.h.0.attn.c_attn.lora_A.default.weight"):
        write(folder, tensors | {extra: torch.ones(V)})
        fails(capsys, lambda: GPT.load(folder), extra.removeprefix("transformer."), "no part of GPT-2", "GPT2LMHeadModel")


@pytest.mark.parametrize("biases", [True, False])
def test_nanogpts_layout(gpt, folder, idx_BT, biases):
    tensors = as_linear(weights(folder)) | {"lm_head.weight": gpt.wte.weight}
    if not biases:
        tensors = {k: t for k, t in tensors.items() if not k.endswith(".bias")}
    write(folder, {f"_orig_mod.{k}": t for k, t in tensors.items()}, block_size=T, bias=biases, dropout=0.0)
    want = GPT(gpt.cfg).eval()
    want.load_state_dict({k: t * (biases or not k.endswith(".bias")) for k, t in gpt.state_dict().items()})
    torch.testing.assert_close(GPT.load(folder)(idx_BT), want(idx_BT))


@pytest.mark.parametrize("name", [f"transformer.h.{layer}.{name}.weight" for layer in (0, 2)
                                  for name in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")])
def test_one_matrix_that_lies_the_other_way_round(folder, capsys, name):
    """nanoGPT's layout is all or nothing; the square matrix of attention goes with the others."""
    for tensors in (weights(folder), as_linear(weights(folder))):
        write(folder, tensors | {name: tensors[name].T})
        fails(capsys, lambda: GPT.load(folder), "model.safetensors", "has shape", "config.json wants")


def test_one_missing_bias_is_missing(folder, capsys):
    tensors = weights(folder)
    del tensors["transformer.h.1.ln_2.bias"]
    write(folder, tensors)
    fails(capsys, lambda: GPT.load(folder), "h.1.ln_2.bias is missing")


@pytest.mark.parametrize("name", ["gelu_new", *folders.GELU_NEW])
def test_names_of_one_activation_function(gpt, folder, idx_BT, name):
    write(folder, weights(folder), activation_function=name)
    assert torch.equal(GPT.load(folder)(idx_BT), gpt(idx_BT))


@pytest.mark.parametrize("name, act", [("gelu", torch.nn.functional.gelu), ("relu", torch.relu)])
def test_other_activation_functions_go_wherever_the_mlp_is_taken_apart(folder, idx_BT, name, act):
    """gelu is not gelu_new; the target, SPD, SVD and neurons all take the target's."""
    plain = GPT.load(folder)
    write(folder, weights(folder), activation_function=name)
    gpt = GPT.load(folder)
    mlp, (x_BTD, _) = gpt.mlp(1), gpt.prefix(idx_BT, 1)
    h_BTM = act(x_BTD @ mlp.c_fc.weight + mlp.c_fc.bias)
    assert torch.allclose(mlp(x_BTD), h_BTM @ mlp.c_proj.weight + mlp.c_proj.bias, atol=1e-5)
    assert not torch.allclose(gpt(idx_BT), plain(idx_BT), atol=1e-6) and gpt.hash != plain.hash
    m = spd.build(spd.Config(C=D, ci_hidden=2, T=T), gpt)
    m.V[0].data, m.U[0].data, m.V[1].data, m.U[1].data = torch.eye(D), mlp.c_fc.weight, mlp.c_proj.weight, torch.eye(D)
    on = [torch.ones(1, D)] * 2
    assert torch.allclose(m.site(on, torch.zeros(2, 1)).mlp(x_BTD), mlp(x_BTD), atol=1e-5)
    for floor in (baselines.SVD(1, mlp, D), baselines.Neurons(1, mlp, len(mlp.c_proj.weight))):
        assert torch.allclose(floor.decode(1, floor.encode(1, x_BTD, mlp), x_BTD), mlp(x_BTD), atol=1e-5)
    gpt.save(folder, gpt.vocab, {})
    assert GPT.load(folder).cfg == gpt.cfg


# ---------------------------------------------------------------------------------------- shards
def shards(folder, edit=lambda file_of, a, b: None):
    """Cut the weights of a folder in two; edit changes the index and the two files' tensors."""
    tensors = weights(folder)
    names = sorted(tensors)
    a, b = ({k: tensors[k] for k in part} for part in (names[:20], names[20:]))
    file_of = dict.fromkeys(a, "a.safetensors") | dict.fromkeys(b, "b.safetensors")
    edit(file_of, a, b)
    (folder / "model.safetensors").unlink()
    save_file(a, folder / "a.safetensors")
    save_file(b, folder / "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=file_of)))


def test_shards(gpt, folder, idx_BT):
    shards(folder)
    got = GPT.load(folder)
    assert torch.equal(got(idx_BT), gpt(idx_BT))
    content = b"".join((folder / f"{name}.safetensors").read_bytes() for name in "ab")
    assert got.hash == hashlib.sha256(b'{"n_head": 3}' + content).hexdigest()[:16]


FIRST = "transformer.h.0.attn.c_attn.bias"

@pytest.mark.parametrize("edit, words", [
    (lambda m, a, b: m.update({FIRST: "c.safetensors"}), ["c.safetensors", "no such file"]),
    (lambda m, a, b: m.update({FIRST: "../a.safetensors"}), ["../a.safetensors", "not the name of a file"]),
    (lambda m, a, b: m.update({FIRST: "/etc/passwd"}), ["/etc/passwd", "not the name of a file"]),
    (lambda m, a, b: m.update({FIRST: ".."}), ["no such file"]),
    (lambda m, a, b: m.update({FIRST: 3}), ["3 is not the name"]),
    (lambda m, a, b: m.update({FIRST: "x" * 5000}), ["no such file"]),
    (lambda m, a, b: m.update({FIRST: "b.safetensors"}), [FIRST, "index"]),
    (lambda m, a, b: b.update({FIRST: a[FIRST]}), [FIRST, "b.safetensors"]),         # in two shards
    (lambda m, a, b: b.update({"lm_head.weight": torch.ones(V, D)}), ["lm_head.weight", "index"]),
    (lambda m, a, b: m.update({"lm_head.weight": "b.safetensors"}), ["lm_head.weight", "index"]),
    (lambda m, a, b: m.clear(), ["weight_map"]),
])
def test_shards_that_do_not_fit_their_index(folder, capsys, edit, words):
    shards(folder, edit)
    fails(capsys, lambda: GPT.load(folder), *words)


# ------------------------------------------------------------------------------------------ numbers
@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight", "transformer.ln_f.bias"])
def test_weights_that_are_no_floats(folder, capsys, name, dtype):
    tensors = weights(folder)
    write(folder, tensors | {name: tensors[name].to(getattr(torch, dtype))})
    fails(capsys, lambda: GPT.load(folder), name, dtype)


@pytest.mark.parametrize("dtype, exact", [("float16", 2e-2), ("bfloat16", 2e-1), ("float64", 1e-6)])
def test_floats_of_other_sizes(gpt, folder, idx_BT, dtype, exact):
    write(folder, {k: t.to(getattr(torch, dtype)) for k, t in weights(folder).items()})
    got = GPT.load(folder)
    torch.testing.assert_close(got(idx_BT), gpt(idx_BT), rtol=0, atol=exact)
    assert {p.dtype for p in got.parameters()} == {torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_weights_that_are_not_finite(gpt, folder, capsys, value):
    tensors = weights(folder)
    for name in ("transformer.wte.weight", "transformer.h.2.ln_1.bias", "transformer.h.1.attn.c_proj.weight"):
        bad = tensors[name].double()
        bad.view(-1)[-1] = value
        write(folder, tensors | {name: bad})
        fails(capsys, lambda: GPT.load(folder), name, "not finite")


# ------------------------------------------------------------------------------------ config.json
@pytest.mark.parametrize("name", ["vocab_size", "n_layer", "n_embd", "n_head", "n_inner", "n_positions"])
@pytest.mark.parametrize("value", [10**6, 10**9, 10**12, 10**30, 0, -1, "24", 24.0, True, [24], 1e30, float("nan")], ids=str)
def test_sizes_that_are_not_there(folder, capsys, name, value):
    """Compared with the weights before anything is made of them."""
    write(folder, weights(folder), **{name: value})
    fails(capsys, lambda: GPT.load(folder), name)


@pytest.mark.parametrize("change", [
    *(dict(layer_norm_epsilon=value) for value in (float("inf"), float("nan"), 0.0, -1e-5, 1e300, "1e-5", True, None)),
    *(dict(nanodecomp=value) for value in (None, [], "x", dict(layer="1"), dict(layer=-1), dict(layer=L), dict(layer=10**30),
                                           dict(layer=True), dict(data=3))),
    dict(model_type=None), dict(model_type=["gpt2"]), dict(tie_word_embeddings="no"),
], ids=str)
def test_config_values_that_mean_nothing(folder, capsys, change):
    write(folder, weights(folder), **change)
    fails(capsys, lambda: GPT.load(folder), next(iter(change)))


@pytest.mark.parametrize("name", ["config.json", "vocab.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'[["n_layer", 3]]', b"3", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000,
                                     b'{"n_layer": ' + b"9" * 5000 + b"}", bytes(range(256))], ids=lambda b: str(b[:9]))
def test_json_that_is_no_object(folder, capsys, name, content):
    (folder / name).write_bytes(content)
    fails(capsys, lambda: GPT.load(folder), folder / name, "not a JSON object")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_other_encodings(folder, encoding):
    for name in ("config.json", "vocab.json"):
        (folder / name).write_text((folder / name).read_text(), encoding=encoding)
    assert GPT.load(folder).vocab == VOCAB


# ---------------------------------------------------------------------------------- what is missing
def test_what_is_no_folder(folder, capsys, monkeypatch):
    fails(capsys, lambda: GPT.load(folder / "model.safetensors"), "is a file, --model takes a folder")
    monkeypatch.chdir(folder)
    for name in ("gpt2", "openai-community/gpt2"):
        fails(capsys, lambda: GPT.load(name), "no such file", f"hf download {name} ", f"--local-dir {name}")
    fails(capsys, lambda: GPT.load("target"), f"there is {os.path.dirname(common.__file__) + '/target'}, give --model that")
    for name in ("../gpt2", "/nowhere/gpt2", "a/b/c", "x" * 5000 + "/../y", "a\0b"):
        with pytest.raises(SystemExit):
            GPT.load(name)
        assert "hf download" not in capsys.readouterr().err
    fails(capsys, lambda: GPT.load("x" * 5000), "no such file")
    for kind in (os.mkfifo, os.mkdir):
        (folder / "model.safetensors").unlink()
        kind(folder / "model.safetensors")
        fails(capsys, lambda: GPT.load(folder), "model.safetensors", "no such file")
        os.rename("model.safetensors", kind.__name__)
        (folder / "model.safetensors").touch()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt", "my model.ckpt"])
def test_the_command_that_converts(gpt, folder, idx_BT, capsys, name):
    """It is run as it is printed. nanoGPT's checkpoint brings its sizes along, and its exact gelu."""
    tensors = weights(folder)
    nano = dict(model=as_linear(tensors), optimizer={}, model_args=dict(
        n_layer=L, n_head=3, n_embd=D, block_size=T, bias=True, vocab_size=V, dropout=0.0))
    torch.save({"pytorch_model.bin": tensors, "ckpt.pt": nano}.get(name, dict(state_dict=tensors)), folder / name)
    (folder / "model.safetensors").unlink()
    if name == "ckpt.pt":
        (folder / "config.json").unlink()
    with pytest.raises(SystemExit):
        GPT.load(folder)
    command = capsys.readouterr().err.strip().split("converts them: ")[1]
    assert command.startswith("python -c ") and os.system(sys.executable + command.removeprefix("python")) == 0
    if name == "ckpt.pt":
        assert set(weights(folder)) == set(tensors)
        write(folder, weights(folder) | {k: torch.zeros(96 if "c_fc" in k else D, D) for k in tensors if "mlp.c_fc.w" in k}
              | {k: torch.zeros(D, 96) for k in tensors if "mlp.c_proj.w" in k}
              | {k: torch.zeros(96) for k in tensors if "c_fc.b" in k})
        assert (GPT.load(folder).cfg.n_inner, GPT.load(folder).cfg.activation_function) == (96, "gelu")
    else:
        assert torch.equal(GPT.load(folder)(idx_BT), gpt(idx_BT))


# --------------------------------------------------------------------------------------- vocabulary
def tokenizer(folder, content):
    (folder / "vocab.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))


IDS = {token: i for i, token in enumerate(VOCAB)}
EOT = dict(id=0, content="<|endoftext|>", special=True)

@pytest.mark.parametrize("content", [
    dict(model=dict(type="BPE", vocab=IDS, merges=[]), added_tokens=[EOT]),
    dict(model=dict(vocab={k: i for k, i in IDS.items() if i}), added_tokens=[EOT]),
    dict(model=dict(vocab=IDS), added_tokens=None),
    dict(model=dict(vocab=IDS), added_tokens=[EOT, dict(id=V, content="[PAD]")]),     # which the model does not know
    dict(model=dict(type="Unigram", vocab=[[token, -0.5 * i] for i, token in enumerate(VOCAB)])),
])
def test_tokenizer_json(folder, content):
    tokenizer(folder, content)
    assert GPT.load(folder).vocab == VOCAB


def test_a_padded_vocabulary(folder):
    tokenizer(folder, dict(model=dict(vocab={"Ġcat": 3, "the": 1}), added_tokens=[dict(id=7, content="<|endoftext|>")]))
    vocab = GPT.load(folder).vocab
    assert (vocab[1], vocab[3], vocab[7], vocab[49], len(vocab)) == ("the", "Ġcat", "<|endoftext|>", "<49>", V)


@pytest.mark.parametrize("content", [
    [], {}, dict(model=[]), dict(model=dict(vocab=3)), dict(model=dict(vocab=None)), dict(model=dict(vocab=[1])),
    dict(model=dict(vocab=IDS | {"x": 3})), dict(model=dict(vocab=IDS | {"x": V})), dict(model=dict(vocab={"x": True})),
    *(dict(model=dict(vocab=IDS), added_tokens=added) for added in (
        3, [3], [{"id": 1}], [dict(id=1, content="x")], [dict(id="1", content="x")], [dict(id=-1, content="x")],
        [dict(id=1, content=[1])], {"a": 1})),
], ids=lambda content: str(content)[-60:])
def test_a_tokenizer_json_that_is_none(folder, capsys, content):
    tokenizer(folder, content)
    fails(capsys, lambda: GPT.load(folder), folder / "tokenizer.json")


def test_without_names_there_is_a_warning(folder, capsys):
    (folder / "vocab.json").unlink()
    write(folder, weights(folder), eos_token_id=None)
    assert GPT.load(folder).vocab[7] == "<7>"
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in ("warning", "tokenizer.json", "concepts", "rows"))


def test_tokens_that_were_added_to_a_vocab_json(folder):
    """transformers writes them to added_tokens.json or tokenizer.json; vocab.json is the one from before."""
    names = {token: i for token, i in IDS.items() if i < V - 2}
    for extra in ("tokenizer.json", "added_tokens.json"):
        (folder / "vocab.json").write_text(json.dumps(names))
        content = {"<|user|>": V - 1, "[PAD]": V}               # the model does not know the second
        if extra == "tokenizer.json":
            content = dict(model=dict(vocab=names), added_tokens=[dict(id=i, content=token) for token, i in content.items()])
        (folder / extra).write_text(json.dumps(content))
        assert GPT.load(folder).vocab == [*VOCAB[:-2], f"<{V - 2}>", "<|user|>"]
        (folder / extra).unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps(dict(model=dict(vocab=IDS))))
    assert GPT.load(folder).vocab == VOCAB


def test_a_vocabulary_of_few_names_is_a_warning(folder, capsys):
    for names, warns in ({}, True), ({token: i for token, i in IDS.items() if i < 24}, True), (IDS, False):
        (folder / "vocab.json").write_text(json.dumps(names))
        GPT.load(folder)
        err = capsys.readouterr().err
        assert err.startswith(f"warning: {folder}: {len(names)} of {V} tokens") if warns else err == ""


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json"])
def test_a_pointer_of_git_lfs(folder, capsys, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 548105171\n")
    fails(capsys, lambda: GPT.load(folder), folder / name, f"git -C {folder} lfs pull")


def test_documents_end_at_the_tokenizers_own_mark(folder):
    for token, eos, want in (("</s>", 3, data.EOT), ("[SEP]", 3, data.EOT), ("word", 3, "word"), ("</s>", V, "</s>"),
                             ("</s>", [3, 7], data.EOT), ("</s>", [], "</s>"),
                             ("</s>", "3", "</s>"), ("</s>", None, "</s>")):
        (folder / "vocab.json").write_text(json.dumps({token: 3}))
        write(folder, weights(folder), eos_token_id=eos)
        assert GPT.load(folder).vocab[3] == want
    (folder / "vocab.json").write_text(json.dumps({"</s>": 3, data.EOT: 5}))
    write(folder, weights(folder), eos_token_id=3)
    assert GPT.load(folder).vocab[3] == "</s>"
