"""The target's activations at its MLPs, as the activation-space methods train on them: one token, one example.

    x = the MLP's input after LayerNorm, y = its output, at every token but the first of a row; stream: y is the
    residual stream that the output is added to, after the addition
B sequences, T positions, N tokens of a batch, L layers, D residual width
"""
import torch

import common
import fused

ROWS = 512          # sequences whose tokens are shuffled together; 127 tokens each, 67 MB a layer in the bundled target

@torch.no_grad()
def at_mlps(gpt, idx_BT, layers, stream=False):
    """Input x and output y of the MLPs of `layers` (ascending) at every token but the first of a row, one clean pass
    without the unembedding: two of shape (L, B (T - 1), D)."""
    (x_BTD, r_BTD), xs, ys = gpt.prefix(idx_BT, layers[0]), [], []
    for layer in range(layers[0], layers[-1] + 1):
        y_BTD = gpt.h[layer].mlp(x_BTD)
        if layer in layers:
            out_BTD = r_BTD + y_BTD if stream else y_BTD
            xs.append(x_BTD[:, 1:].flatten(0, 1)), ys.append(out_BTD[:, 1:].flatten(0, 1))
        if layer < layers[-1]:
            x_BTD, r_BTD = gpt.h[layer + 1].to_mlp(r_BTD + y_BTD)
    return torch.stack(xs), torch.stack(ys)

def over_rows(gpt, idx_RT, layers, stream=False):
    """at_mlps of many rows, 16 at a time."""
    return [torch.cat(part, 1) for part in zip(*(at_mlps(gpt, idx, layers, stream) for idx in idx_RT.split(16)))]

@torch.no_grad()
def clean_pass(gpt, layer, idx_BT):
    """Input x and output y of one MLP and the stream r that y is added to, in one clean pass; and kl(y_hat_BTD), with
    gradients: KL(clean || spliced) at each position (B, T) when y_hat stands in for y, through the suffix alone."""
    W_VD, (x_BTD, r_BTD) = gpt.wte.weight, gpt.prefix(idx_BT, layer)
    y_BTD = gpt.h[layer].mlp(x_BTD)
    final_BTD = gpt.hidden(r_BTD, y_BTD, layer)
    clean = final_BTD, *fused.log_partition(final_BTD, W_VD)
    kl = lambda y_hat_BTD: fused.kl_unembed(clean, gpt.hidden(r_BTD, y_hat_BTD, layer), W_VD)
    return x_BTD, y_BTD, r_BTD, kl

def batches(gpt, corpus, layers, T, N, seed, start=0, stream=False):
    """Endless training batches (x_LND, y_LND) from step `start` on: tokens of ROWS sequences of the corpus at a time,
    in random order, each token once an epoch but for less than N at the end of each shuffle. What step s gets depends
    on the arguments and s alone: a resumed run sees what the killed one would have. Memory: 2 L ROWS T D floats.
    Fails if N is over ROWS (T - 1)."""
    steps = ROWS * (T - 1) // N             # from one shuffle to the next
    if not steps:
        common.fail(f"--N {N}: must be from 1 to {ROWS * (T - 1)}")
    step, device = start, gpt.wte.weight.device
    while True:
        turn = step // steps
        idx_RT = corpus.batch(turn, ROWS, T, seed).to(device)
        x_LND, y_LND = over_rows(gpt, idx_RT, layers, stream)
        order = torch.randperm(x_LND.shape[1], generator=common.generator(seed, f"shuffle {turn}")).to(device)
        for step in range(step, (turn + 1) * steps):
            some = order[step % steps * N:][:N]
            yield x_LND[:, some], y_LND[:, some]
        step += 1
