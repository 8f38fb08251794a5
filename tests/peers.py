"""Our SAEs against public trainers: TopK and JumpReLU of dictionary-learning, TopK of eai-sparsify, on one file of this
target's activations, with the same width, sparsity, batches, schedule and learning rates to choose from. Prints the FVE
of each on held-out tokens; exit code 1 if ours is more than 0.005 below one of theirs.
Each trainer is used as its own code has it: dictionary-learning's on activations of mean square norm 1, sparsify's
SparseCoder in the loop of its Trainer, with Adam and AuxK; warm-up, decay and the rule for dead units are ours for all.
A package that is not installed is named, and its rows are left out.

    python -m venv venv-peers && venv-peers/bin/pip install -r requirements.txt dictionary-learning eai-sparsify
    venv-peers/bin/python tests/peers.py
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import data  # noqa: E402
import evals  # noqa: E402
import sae  # noqa: E402
from model import GPT, default_layer  # noqa: E402


@dataclass
class Config:
    model: str = "target"           # folder of the GPT-2
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    out: str = "runs/peers"         # folder for activations.safetensors
    F: int = 1024                   # units
    k: int = 16                     # units on per token
    steps: int = 1000               # training steps
    N: int = 2048                   # tokens per step
    lrs: str = "1e-3,2e-3,4e-3"     # learning rates, of which each trainer has its best counted
    seed: int = 0                   # of every trainer


AUX, DEAD = sae.Config.c_aux, sae.Config.dead
WARM, DECAY = 0.05, 0.8         # the schedule of sae.update, in shares of the run
MARGIN = 0.005


def ours(variant):
    """build(a_ND, F, k, steps, lr, seed) -> (update(step, a_ND), model(a_ND) -> a_hat_ND, codes(a_ND) -> f_NF)"""
    def build(a_ND, F, k, steps, lr, seed):
        job = sae.Config(variant=variant, F=F, k=k, steps=steps, lr=lr, seed=seed, N=len(a_ND))
        m = sae.SAE(job, a_ND.shape[1], common.generator(seed, "init"))
        m.start(a_ND)
        opts = sae.optimizers(m)

        def update(step, a_ND):
            loss, _, seen = sae.loss_fn(m, a_ND, None, step / steps)
            sae.update(m, opts, loss, step / steps)
            sae.remember(m, step / steps, *seen)
        return update, lambda a: m.rebuild(m.codes(a)), m.codes
    return build


def dictionary_learning_topk(a_ND, F, k, steps, lr, seed):
    from dictionary_learning.trainers.top_k import TopKTrainer
    trainer = TopKTrainer(steps=steps, activation_dim=a_ND.shape[1], dict_size=F, k=k, layer=0, lm_name="", lr=lr,
                          auxk_alpha=AUX, warmup_steps=max(1, int(WARM * steps)), decay_start=int(DECAY * steps),
                          seed=seed, device="cpu")
    trainer.dead_feature_threshold = DEAD
    scale = a_ND.square().sum(-1).mean() ** -0.5
    return (lambda step, a: trainer.update(step, a * scale), lambda a: trainer.ae(a * scale) / scale,
            lambda a: trainer.ae.encode(a * scale))


def dictionary_learning_jumprelu(a_ND, F, k, steps, lr, seed):
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    torch.manual_seed(seed)
    trainer = JumpReluTrainer(steps=steps, activation_dim=a_ND.shape[1], dict_size=F, layer=0, lm_name="", lr=lr,
                              warmup_steps=max(1, int(WARM * steps)), sparsity_warmup_steps=max(1, steps // 2),
                              decay_start=int(DECAY * steps), target_l0=k, device="cpu", seed=seed)
    scale = a_ND.square().sum(-1).mean() ** -0.5
    return (lambda step, a: trainer.update(step, a * scale), lambda a: trainer.ae(a * scale) / scale,
            lambda a: trainer.ae.encode(a * scale))


def sparsify_topk(a_ND, F, k, steps, lr, seed):
    from sparsify import SparseCoder, SparseCoderConfig
    torch.manual_seed(seed)
    m = SparseCoder(a_ND.shape[1], SparseCoderConfig(num_latents=F, k=k))
    m.b_dec.data = a_ND.mean(0)
    opt = torch.optim.Adam(m.parameters(), lr)
    schedule = lambda step: min(1, (step + 1) / (WARM * steps), (steps - step) / ((1 - DECAY) * steps))
    plan, idle = torch.optim.lr_scheduler.LambdaLR(opt, schedule), torch.zeros(F)

    def update(step, a):
        m.set_decoder_norm_to_unit_norm()
        out = m(a, dead_mask=idle > DEAD)
        (out.fvu + AUX * out.auxk_loss).backward()
        m.remove_gradient_parallel_to_decoder_directions()
        opt.step(), opt.zero_grad(), plan.step()
        idle.add_(len(a))[out.latent_indices.flatten()] = 0

    def codes(a):
        top = m.encode(a)
        return torch.zeros(len(a), F).scatter(1, top.top_indices, top.top_acts)
    return update, lambda a: m(a).sae_out, codes


PAIRS = {"topk": {"dictionary-learning": dictionary_learning_topk, "eai-sparsify": sparsify_topk},
         "jumprelu": {"dictionary-learning": dictionary_learning_jumprelu}}


def activation_file(cfg):
    """Path of the file of shuffled activations: `train` (steps N, D), in the order of training, and `test` (n, D)."""
    gpt = GPT.load(cfg.model, common.device("cpu"))
    layer, path = default_layer(gpt), Path(cfg.out) / "activations.safetensors"
    train, test = (data.load(cfg.data, split, gpt.vocab) for split in ("train", "test"))
    draw = data.batches(gpt, train, [layer], min(128, gpt.cfg.n_positions), cfg.N, cfg.seed)
    ys = [y[0] for _, (_, y) in zip(tqdm(range(cfg.steps), desc="activations"), draw)]
    held_out = data.at_mlps(gpt, test.rows(min(128, gpt.cfg.n_positions), 400), [layer])[1][0]
    common.save(path, dict(train=torch.cat(ys), test=held_out), dict(target=gpt.hash))
    return path


def score(build, a, cfg, lr):
    """(FVE, L0) on the held-out tokens after a run on the file."""
    update, model, codes = build(a["train"][:cfg.N], cfg.F, cfg.k, cfg.steps, lr, cfg.seed)
    for step in tqdm(range(cfg.steps), desc=build.__name__, leave=False):
        update(step, a["train"][step * cfg.N:][:cfg.N])
    with torch.no_grad():
        fve = evals.explained((part, model(part)) for part in a["test"].split(4096))
        return fve, sum((codes(part) > 0).sum().item() for part in a["test"].split(4096)) / len(a["test"])


def main(cfg):
    torch.manual_seed(cfg.seed)
    a, _ = common.load(activation_file(cfg))
    lrs, worse = [float(lr) for lr in cfg.lrs.split(",")], []
    for variant, peers in PAIRS.items():
        best = {}
        for name, build in {"sae.py": ours(variant), **peers}.items():
            try:
                runs = {lr: score(build, a, cfg, lr) for lr in lrs}
            except ImportError as e:
                print(f"{variant:9} {name:20} not installed here ({e}): not compared", flush=True)
                continue
            lr, (best[name], l0) = max(runs.items(), key=lambda run: run[1])
            print(f"{variant:9} {name:20} FVE {best[name]:.4f} at L0 {l0:.1f}, lr {lr:g} of {cfg.lrs}", flush=True)
        worse += [f"{variant}: {name}" for name in best if best["sae.py"] < best[name] - MARGIN]
    print(f"ours is more than {MARGIN} below {', '.join(worse)}" if worse else f"ours is at least theirs - {MARGIN}")
    raise SystemExit(bool(worse))


if __name__ == "__main__":
    main(common.cli(Config))
