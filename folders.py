"""What lies in a model's folder? Its configuration, weights and vocabulary, whoever wrote them.

    config.json                 the sizes; what it says beside them must be what GPT-2 is
    model.safetensors           the weights, or shards that model.safetensors.index.json lists
    vocab.json, tokenizer.json  either of them: the token strings, {token: id}

Read as it is meant: prefixes of names, shards, 16 or 64 bits, nanoGPT's layout, a head of its own.
All else ends in one line: what is damaged, not finite or no GPT-2, or would have to be guessed.
Sizes are compared with the weights that are there before anything is made of them.

D residual width, V vocabulary
"""
import hashlib
import json
import os
import re
import shlex
import sys
from pathlib import Path

import torch

import common

# What a config.json must say, or leave out, to be GPT-2; the first of each is how GPT.save says it.
# The activation functions are names of one formula, the tanh approximation of gelu.
ALLOWED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
LARGEST = 1e15          # no weight is: from 1e19 on squares overflow in float32
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# files that may hold pickled weights, the likeliest first
PICKLES = ("pytorch_model*.bin", "*.ckpt", "*.pt", "*.pth", "*.bin")
# Turns {files} into model.safetensors in {folder}; of nanoGPT's checkpoint, which holds the sizes
# too, it also makes a config.json.
CONVERT = """python -c "import json, sys, torch; from safetensors.torch import save_file; d = {{}};
 [d.update(torch.load(f, 'cpu', weights_only=True)) for f in sys.argv[2:]];
 w = d.get('model', d.get('state_dict', d)); a = d.get('model_args');
 save_file({{k: v.contiguous().clone() for k, v in w.items()}}, sys.argv[1] + '/model.safetensors');
 a and json.dump(a | dict(model_type='gpt2', activation_function='gelu',
 n_positions=a['block_size']), open(sys.argv[1] + '/config.json', 'w'))" {folder} {files}"""


def advice(folder) -> str:
    """What can be done about a file that a folder lacks? Names on Hugging Face's hub are no
    folders, and pickles are not read: they can hold code."""
    if os.path.isfile(folder):
        return f"; {folder} is a file, --model takes a folder with config.json and weights"
    if not os.path.isdir(folder):
        beside = Path(__file__).resolve().parent / folder
        if os.path.isdir(beside):
            return f"; there is {beside}, give --model that"
        if not re.fullmatch(r"\w[\w.-]{,95}(/[\w.-]{1,96})?", str(folder)):
            return ", nor such a folder"
        return (f"; if {folder} is a model on Hugging Face's hub, download it: pip install "
                f"huggingface_hub && hf download {folder} --include '*.json' --include "
                f"'*.safetensors' --local-dir {folder}")
    for pattern in PICKLES:
        files = [shlex.quote(str(file)) for file in sorted(folder.glob(pattern))]
        if files:
            command = CONVERT.format(folder=shlex.quote(str(folder)), files=" ".join(files))
            return f"; pickled weights are not read, but this converts them: {command}"
    return ""


# ----------------------------------------------------------------------------------- config.json
def read_json(path) -> dict:
    """Read a JSON object in UTF-8, 16 or 32; fails if the file holds none."""
    if not os.path.isfile(path):
        common.fail(f"{path}: no such file{advice(path.parent)}")
    try:
        found = json.loads(path.read_bytes())
        reason = "" if isinstance(found, dict) else f"it is a {type(found).__name__}"
    except (OSError, ValueError, RecursionError) as e:
        reason = str(e)
    if reason:
        common.fail(f"{path}: not a JSON object ({reason})")
    return found


def read_config(folder) -> dict:
    """Read config.json with what it may leave out; fails if it describes another architecture."""
    path = folder / "config.json"
    conf = {"layer_norm_epsilon": 1e-5, "n_inner": None, "nanodecomp": {}} | read_json(path)
    for name, allowed in ALLOWED.items():
        value = conf.get(name, allowed[0])
        if value not in allowed:
            names = " or ".join(map(repr, allowed))
            more = "; gelu_new is within 5e-4 of it" if value == "gelu" else ""
            common.fail(f"{path}: {name} is {short(value)}, only {names} is supported{more}")
    if conf["n_inner"] is None and type(conf.get("n_embd")) is int:
        conf["n_inner"] = 4 * conf["n_embd"]            # which Hugging Face writes as null

    # what pretrain.py notes: the layer to decompose, and the data
    notes = conf["nanodecomp"]
    if not isinstance(notes, dict) or not isinstance(notes.get("data", ""), str):
        common.fail(f"{path}: nanodecomp must be an object, and its data a string")
    layer = notes.get("layer", 0)
    n_layer = conf.get("n_layer")
    has_layer = type(layer) is int and layer >= 0 and (type(n_layer) is not int or layer < n_layer)
    if "layer" in notes and not has_layer:
        common.fail(f"{path}: nanodecomp's layer is {short(layer)}, "
                    f"must be from 0 to n_layer - 1, n_layer is {short(n_layer)}")
    return conf


def short(value):
    """Write a value that may be long in up to 60 characters."""
    return repr(value)[:60]


# --------------------------------------------------------------------------------------- weights
def weight_files(folder) -> tuple[list, dict]:
    """Where are the weights? (paths, {tensor: name of its file}, empty if no index lists them)."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if os.path.isfile(single):
        return [single], {}
    if not os.path.isfile(index):
        common.fail(f"{single}: no such file{advice(folder)}")
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        common.fail(f"{index}: weight_map must be an object, {{tensor: file}}")
    for file in file_of.values():
        if not isinstance(file, str) or Path(file).name != file:
            common.fail(f"{index}: {short(file)} is not the name of a file in the folder")
        if not os.path.isfile(folder / file):
            common.fail(f"{folder / file}: no such file, though {index.name} lists it; "
                        "download the folder anew")
    return [folder / file for file in sorted(set(file_of.values()))], file_of


def read_weights(paths, file_of) -> dict:
    """Read the weights as finite float32, by the names that GPT's state dict has, causal masks of
    old checkpoints left out. Fails if two tensors have one name, or the index lists others."""
    tensors = {}
    missing = set(file_of)
    for path in paths:
        for name, tensor in common.load(path)[0].items():
            if file_of.get(name, path.name) != path.name or file_of and name not in file_of:
                common.fail(f"{path}: holds {name}, which the index does not say")
            missing.discard(name)
            plain = plain_name(name)
            if plain in tensors:
                common.fail(f"{path}: more than one tensor is called {plain}, {name} is the second")
            if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", plain):
                tensors[plain] = as_floats(path, name, tensor)
    if missing:
        common.fail(f"{paths[0].parent}: no file holds {min(missing)}, which the index lists")
    return tensors


def plain_name(name):
    """Leave out of a tensor's name what stands before wte, wpe, h, ln_f or lm_head, and wrappers
    such as _orig_mod anywhere: "module.transformer.h.0.ln_1.bias" is "h.0.ln_1.bias"."""
    name = re.sub(r"\b_\w+\.", "", name)
    return re.sub(r"^.*?\b(?=(wte|wpe|h\.\d+|ln_f|lm_head)\.)", "", name)


def as_floats(path, name, tensor):
    """Turn a weight into float32; fails if it is another kind of number, not finite, or larger
    than any model's."""
    if tensor.dtype not in FLOATS:
        common.fail(f"{path}: {name} is {tensor.dtype}, must be a float of 16, 32 or 64 bits; "
                    "save the model unquantised")
    tensor = tensor.to(torch.float32)
    if not (tensor.abs() < LARGEST).all():              # NaN is not, either
        common.fail(f"{path}: {name} has values that are not finite, or beyond {LARGEST:g}")
    return tensor


def usual_layout(tensors) -> dict:
    """Turn nanoGPT's layout into GPT-2's. There all matrices of the blocks lie the other way round,
    which that of queries, keys and values tells, for it is never square; and a model may have no
    biases at all."""
    qkv = tensors.get("h.0.attn.c_attn.weight")
    is_nanogpt = qkv is not None and qkv.ndim == 2 and len(qkv) == 3 * qkv.shape[1]
    has_biases = any(name.endswith(".bias") for name in tensors)
    out = dict(tensors)
    for name, tensor in tensors.items():
        if not name.startswith(("h.", "ln_f.")) or not tensor.ndim:
            continue
        if is_nanogpt and tensor.ndim == 2:
            out[name] = tensor.T.contiguous()
        if not has_biases:
            out[name.replace(".weight", ".bias")] = torch.zeros(out[name].shape[-1])
    return out


def tie(path, conf, tensors) -> bool:
    """Is the head wte? One that is equal is taken out of tensors; one that differs is the model's
    head whatever config.json says, as in transformers. Fails if config.json wants one and there is
    none."""
    head = tensors.get("lm_head.weight")
    if head is None:
        if conf.get("tie_word_embeddings", True) is not True:
            common.fail(f"{path}: has no lm_head.weight, but config.json says tie_word_embeddings "
                        f"{short(conf['tie_word_embeddings'])}")
        return True
    # of two names for one tensor some programs write this one alone
    tied = torch.equal(head, tensors.setdefault("wte.weight", head))
    if tied:
        del tensors["lm_head.weight"]
    return tied


def check_sizes(path, cfg, tensors):
    """Fail if config.json wants more than there is, before anything of its sizes is made."""
    n_layer = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    longest = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    if cfg.n_layer != n_layer:
        common.fail(f"{path}: has {n_layer} layers, config.json wants n_layer {cfg.n_layer}")
    for name in ("vocab_size", "n_embd", "n_inner", "n_positions"):
        if getattr(cfg, name) > longest:
            common.fail(f"{path}: has tensors of up to {longest} rows or columns, "
                        f"config.json wants {name} {getattr(cfg, name)}")


def check_shapes(path, tensors, wanted):
    """Fail if a tensor is missing, unknown, or has another shape than in `wanted`, a state dict."""
    for name in wanted | tensors:
        shape = shape_of(tensors.get(name))
        if shape != shape_of(wanted.get(name)):
            common.fail(f"{path}: {name} has shape {shape}, "
                        f"config.json wants {shape_of(wanted.get(name))}")


def shape_of(tensor):
    return None if tensor is None else tuple(tensor.shape)


def hash_files(paths) -> str:
    """Are these the weights that a run began with? A hash of the files' content."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------ vocabulary
def read_vocab(folder, default: list[str]) -> list[str]:
    """Read the token strings of a vocab.json, or else a tokenizer.json, in the order of their ids.
    An id that is left out keeps its string in `default`; fails on an id beyond that list, or there
    twice."""
    path = folder / "vocab.json"
    if os.path.exists(path):
        ids = read_json(path)
    elif os.path.exists(folder / "tokenizer.json"):
        path = folder / "tokenizer.json"
        ids = tokenizer_ids(path, len(default))
    else:
        print(f"warning: {folder} has neither vocab.json nor tokenizer.json: tokens have no names "
              "and no concepts, and rows of text begin anywhere", file=sys.stderr)
        return default
    tokens = {i: token for token, i in ids.items() if type(i) is int and 0 <= i < len(default)}
    if len(tokens) < len(ids):
        common.fail(f"{path}: ids must be distinct and from 0 to {len(default) - 1}")
    return [tokens.get(i, token) for i, token in enumerate(default)]


def tokenizer_ids(path, V) -> dict:
    """Read {token: id} from a tokenizer.json: its model's vocabulary, and tokens that were added.
    Some of these may lie beyond the V that the model knows; they can't occur in its text."""
    found = read_json(path)
    try:
        ids = found["model"]["vocab"]
        added = {token["content"]: token["id"] for token in found.get("added_tokens") or ()}
        added = {token: i for token, i in added.items() if type(i) is not int or i < V}
        return ids | added
    except (TypeError, ValueError, KeyError):
        common.fail(f"{path}: must hold model.vocab, {{token: id}}, and added_tokens, "
                    "each with content and id")


def mark_documents(vocab, eos, mark):
    """Call the token that ends documents `mark`, in place, where the tokenizer has another name for
    it: config.json's eos_token_id, if that token looks like one, </s> or [SEP]."""
    if mark not in vocab and type(eos) is int and 0 <= eos < len(vocab):
        if re.fullmatch(r"<.+>|\[.+\]", vocab[eos]):
            vocab[eos] = mark
