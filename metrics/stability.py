"""Do two seeds find the same units?

A decomposition is trained from a random start, on data in random order. If its units are parts of
the model, and not accidents of the training, then a training with another seed finds them again.
Four steps say how far it does:

    1. match    Each unit of one seed gets at most one unit of the other seed, its mate, such that
                the sum of the similarities of all pairs is largest (metrics/matching.py).
    2. count    A pair is shared where its two units are alike, SHARED = 0.7 or more in each thing
                that is compared. The number to read is the share of ALL alive units (those that
                are on at ALIVE = 10 tokens or more) that are in shared pairs: `agreement`. The
                mean similarity of the matched pairs says nothing about units that have no mate.
    3. chance   A matching is the best of very many, so that even random units get mates that are
                somewhat like them. Each number that needs a matching, KEY, is computed once more
                as null_KEY with random units (in activations: with the second seed's units at the
                wrong text) in place of the second seed's: `by_chance`, `with_null`.
    4. error    Three seeds make three pairs, but these are not three independent numbers. From
                three seeds on a number, KEY, also has a standard error, KEY_se: `over_seeds`.

Similar in what? There are three answers, here called spaces:

    weights         two units read alike and write alike: cosines of their vectors (MOLT: of their
                    matrices)
    inputs          two units write alike, and get alike numbers from the inputs that do occur, but
                    for a constant where units have biases: what they read may differ in directions
                    that no input takes
    activations     two units say alike things at each token: Pearson's r of their values. A unit's
                    value at a token, what it says there, is its m.strength, which may be negative,
                    or its activation f if m has no strength; 0 where the unit is off. If a value
                    is negative, |r|

Units that are alike in weights need not be alike in activations (a threshold, or a competitor, can
keep one of them silent): activations_shared_if_weights says how often they are. And two seeds can
write alike outputs without sharing a single unit, so outputs are compared too, without any
matching: `function_agreement`. Its fve has no null_KEY: chance is fve_independent, what two seeds
with independent errors would get.

Matching one to one and the threshold of 0.7 are from Paulo and Belrose 2025, arXiv:2501.16615,
who find about 30 % of the units of two large SAEs shared.

A decomposition is m, and those of all seeds are ms. S seeds, s and t two of them; F units of a
decomposition, n units of one of its blocks, J of a unit's tokens, P matched pairs, E entries of a
recording (metrics/recording.py), R rows of tokens, T positions, B rows of a batch, N tokens
(position 0 of each row left out), D residual width. x_SF is a list of S tensors x_F, and n_..
counts something
"""
import itertools
import math
from collections import defaultdict
from typing import NamedTuple

import torch

from evals import ALIVE, clean
from metrics import columns, matching
from metrics.columns import Column
from metrics.matching import AROUND, SHARED
from metrics.recording import Active, contributions, record
from model import split_rows

SPACES = ("weights", "inputs", "activations")       # in which two units can be similar
ALIKE = 0.5                 # Jaccard index from which on two units are on at the same tokens


def mean(values):
    """Average those values that are numbers: neither None nor NaN. None if there is none."""
    values = [v for v in values if v is not None and math.isfinite(v)]
    return sum(values) / len(values) if values else None


# ----------------------------------------------------------------------------- one seed, and chance
class Seed(NamedTuple):
    """The units of one training: what has to be known to look for them in another."""
    blocks: list            # what units read and write: the Blocks of metrics/matching.py
    recording: Active       # where they are on in rows_RT, on which seeds are compared
    on_F: torch.Tensor      # at how many tokens of fit_RT each is on
    written_F: torch.Tensor     # how much each writes in all of rows_RT

    @property
    def is_alive_F(self):
        return self.on_F >= ALIVE

    def alive_blocks(self):
        """Leave out dead units: what is hardly ever on is no part that could be found again."""
        return [block.where(self.is_alive_F[block.unit_n]) for block in self.blocks]


def look_at(m, gpt, fit_RT, rows_RT, tau):
    """Collect what has to be known of one trained decomposition m of the model gpt: a Seed."""
    recording = record_units(m, gpt, rows_RT, tau)
    blocks = matching.with_inputs(matching.blocks(m), m, gpt, fit_RT)
    on_F = record_units(m, gpt, fit_RT, tau).on()
    return Seed(blocks, recording, on_F, total_written(m, recording))


def record_units(m, gpt, rows_RT, tau):
    """Where are m's units on, f > tau? An Active without labels: no concept is asked about."""
    return record(m, gpt, rows_RT, rows_RT.new_zeros(*rows_RT.shape, 0), tau)


def total_written(m, recording):
    """How much does each unit of a recording write in all? (F)

    The mean length of its contribution to the output, over J of the tokens at which it is on,
    times the number of all those tokens.
    """
    if not len(recording.unit_E):
        return torch.zeros(recording.F, device=recording.x_ND.device)
    length_FJ = contributions(m, recording).norm(dim=-1)
    return length_FJ.nanmean(1).nan_to_num() * recording.on()


def by_chance(seed, R, T, gen):
    """Make the null of a seed: as many units, but random ones.

    weights, inputs     what units read and write is redrawn (`null_blocks`)
    activations         each unit says what it says, but some whole rows of text later: it is on as
                        often, and at the same positions of a row, but in front of the wrong text

    Which units are alive, on_F, stays that of the seed. A recording has T - 1 tokens of each row.
    """
    rows_later = int(torch.randint(1, R, (1,), generator=gen))
    later = matching.shifted(seed.recording, rows_later * (T - 1))
    return seed._replace(blocks=matching.null_blocks(seed.blocks, gen), recording=later)


# -------------------------------------------------------------------------------- one pair of seeds
class Pair(NamedTuple):
    """What two seeds have in common."""
    matches: dict           # {space: Matches of the first seed's alive units with the second's}
    numbers: dict           # {key: number}: what `agreement` does not say


def compare_pair(one, other):
    """Which unit of one seed is which unit of the other? A Pair. Its numbers:

        weights_most, weights_writes, weights_same_mate, inputs_most, ..
                                    `matched_by_one_side` (metrics/matching.py), in the spaces
                                    weights and inputs. most asks the units of `one` alone
        activations_jaccard_0.5     share of the alive units whose mate in activations is on at
                                    about their tokens, a Jaccard index of 0.5 or more: mean of the
                                    share of the first seed's and that of the second seed's
    """
    one_blocks = one.alive_blocks()
    other_blocks = other.alive_blocks()
    matches = {}
    numbers = {}

    # By what units read and write: plainly, and with what they read as the inputs see it.
    one_seen = [block.over_inputs() for block in one_blocks]
    other_seen = [block.over_inputs() for block in other_blocks]
    for space, *sides in (
            ("weights", one_blocks, other_blocks), ("inputs", one_seen, other_seen)):
        matches[space] = matching.weight_matches(*sides)
        for key, value in matching.matched_by_one_side(*sides).items():
            numbers[f"{space}_{key}"] = value

    # By what they say at each token. Units are matched within their blocks here too.
    matches["activations"] = matching.activation_matches(
        one.recording, other.recording,
        [block.unit_n for block in one_blocks], [block.unit_n for block in other_blocks])
    jaccard_P = matching.jaccard(one.recording, other.recording, matches["activations"])
    n_alike = (jaccard_P >= ALIKE).sum().item()
    n_alive = [seed.is_alive_F.sum().item() for seed in (one, other)]
    numbers[f"activations_jaccard_{ALIKE}"] = mean(n_alike / n if n else None for n in n_alive)
    return Pair(matches, numbers)


def share_confirmed(pairs, matches):
    """Which share of some pairs of units is shared in these Matches too? None if no pair is given.

    pairs: a set of (unit of the first seed, its mate).
    """
    confirmed = pairs & matches.pairs(SHARED)
    return len(confirmed) / len(pairs) if pairs else None


def shared_units(matches, least, F):
    """Which of the first seed's F units are in pairs whose least_P reaches `least`? Bool, (F)."""
    unit = matches.one_P[matches.least_P >= least]
    is_shared_F = torch.zeros(F, dtype=torch.bool, device=unit.device)
    return is_shared_F.index_fill(0, unit, True)


def agreement_of_pair(matches, on_F, written_F):
    """Which share of one seed's units does another seed have? What `agreement` averages."""
    # Similarity, value_P: of the matched pairs, of all alive units, of the shared pairs.
    is_alive_F = on_F >= ALIVE
    n_alive = int(is_alive_F.sum())
    value_P = matches.value_P.double()
    is_shared_P = matches.least_P >= SHARED
    row = dict(similarity=value_P.mean().item(),
               similarity_alive=value_P.sum().item() / n_alive if n_alive else None,
               similarity_shared=value_P[is_shared_P].mean().item())

    # Counts: every share is of the alive units, so that a unit without a mate is one not found.
    for least in AROUND:
        is_found_F = shared_units(matches, least, len(on_F))
        row[f"shared_{least}"] = is_found_F[is_alive_F].double().mean().item()

    # Are rare units found less often? Quarters of the alive units, those most often on first.
    is_found_F = shared_units(matches, SHARED, len(on_F))
    by_rate = on_F.masked_fill(~is_alive_F, -1).argsort(descending=True, stable=True)
    for i, quarter in enumerate(by_rate[:n_alive].tensor_split(4)):
        row[f"shared_rate{4 - i}"] = is_found_F[quarter].double().mean().item()

    # Are the units that matter found? Each counts as much as it writes.
    written = written_F[is_alive_F].sum().item()
    row["shared_written"] = (written_F * is_found_F).sum().item() / max(written, 1e-12)
    return row


# ----------------------------------------------------------------- all pairs, with chance and error
def agreement(pairs, on_SF, written_SF):
    """How many units does another seed find again, in one space? Means over all ordered pairs
    (survival_j: over the seeds).

        similarity              mean similarity of the matched pairs
        similarity_alive        mean similarity of the alive units to their mates, 0 without a mate
        similarity_shared       mean similarity of the shared pairs
        shared_0.5, 0.7, 0.9    share of the alive units in pairs that reach this threshold
        shared_rate1 .. 4       shared_0.7 of each quarter of the alive units; 1: those least often
                                on, 4: those most often on
        shared_written          shared_0.7 with each unit weighted by how much it writes
        survival_j              share of the alive units that j or more of the other seeds share

    0 = nothing is found again, 1 = everything. pairs: {(s, t): Matches of s's units with t's} for
    all s != t. on_SF: at how many tokens each unit of each seed is on; written_SF: how much it
    writes. For a null, pairs alone are by chance: on_SF and written_SF are those of the seeds.
    """
    rows = []
    n_finders_SF = [torch.zeros_like(on_F) for on_F in on_SF]
    for (s, _), matches in pairs.items():
        rows.append(agreement_of_pair(matches, on_SF[s], written_SF[s]))
        n_finders_SF[s] += shared_units(matches, SHARED, len(on_SF[s]))
    answers = {}
    for key in rows[0]:
        answers[key] = mean(row[key] for row in rows)

    # Is a unit in one of the other seeds, in two, .. in all?
    for j in range(1, len(on_SF)):
        shares = []
        for on_F, n_finders_F in zip(on_SF, n_finders_SF):
            is_alive_F = on_F >= ALIVE
            shares.append((n_finders_F >= j)[is_alive_F].double().mean().item())
        answers[f"survival_{j}"] = mean(shares)
    return answers


def over_seeds(ask, S):
    """Ask about all S seeds, and ask how far the answers depend on which seeds these are.

    ask(seeds) -> {key: number}. From three seeds on each key also gets KEY_se, its standard error
    by the jackknife, which leaves out one seed at a time. The spread over pairs would be too small
    an error: pairs with a seed in common are not independent.

        se^2 = (S - 1) / S  sum over s of (x_s - mean of all x_s)^2,  x_s: x without seed s

    Nulls get no error, nor does survival_j, which means something else for fewer seeds, nor a key
    that some of these S answers lack.
    """
    answers = ask(range(S))
    if S < 3:
        return answers

    without = []
    for left_out in range(S):
        without.append(ask([s for s in range(S) if s != left_out]))
    for key in list(answers):
        values = [row.get(key) for row in without]
        if None in values or key.startswith(("survival", "null")):
            continue
        center = sum(values) / S
        squares = sum((value - center)**2 for value in values)
        answers[f"{key}_se"] = ((S - 1) / S * squares)**0.5
    return answers


def over_pairs(table, S):
    """Average {key: {(s, t): number}} over pairs of S seeds: {key: number}, and KEY_se."""
    def average(seeds):
        answers = {}
        for key, row in table.items():
            answers[key] = mean(row[s, t] for s, t in row if s in seeds and t in seeds)
        return answers

    return over_seeds(average, S)


def renumber(pairs, seeds):
    """Keep the pairs among these seeds, and number these seeds from 0 on: {(s, t): Matches}."""
    new = {s: i for i, s in enumerate(seeds)}
    return {(new[s], new[t]): matches for (s, t), matches in pairs.items() if s in new and t in new}


def with_null(pairs, null_pairs, on_SF, written_SF):
    """How far is agreement above chance? `agreement` of pairs, and of null pairs as null_KEY, and

        similarity_corrected = (similarity - null) / (1 - null), null = null_similarity:
                               0 = chance, 1 = found again

    with the standard errors of `over_seeds`.
    """
    def answers_of(seeds):
        about = ([on_SF[s] for s in seeds], [written_SF[s] for s in seeds])
        answers = agreement(renumber(pairs, seeds), *about)
        nulls = agreement(renumber(null_pairs, seeds), *about)
        real = answers["similarity"]
        null = nulls["similarity"]
        if real is not None and null < 1:
            answers["similarity_corrected"] = (real - null) / (1 - null)
        return answers | {f"null_{key}": value for key, value in nulls.items()}

    return over_seeds(answers_of, len(on_SF))


# ----------------------------------------------------------------------------- without any matching
@torch.no_grad()
def function_agreement(ms, gpt, rows_RT, batch=16):
    """Do the seeds write the same output, whatever their units? Means over ordered pairs (s, t).

        fve                 1 - <|y_s - y_t|^2> / <|y_s - <y_s>|^2>      1 = the same output
        fve_independent     1 - (<|e_s|^2> + <|e_t|^2>) / <|y_s - <y_s>|^2>: the fve of two seeds
                            that make errors of these sizes independently. So much comes from both
                            being good at y: only what fve has above fve_independent is agreement
        error_cosine        <e_s . e_t> / sqrt(<|e_s|^2> <|e_t|^2>)      0 = chance, 1 = fail alike

    with < > the mean over tokens, y the MLP's output, y_s what seed s writes in its place and
    e_s = y - y_s. FVE is the fraction of variance explained. One pass per seed.
    """
    layer, = ms[0].layers
    S = len(ms)
    n_tokens = 0
    gram = 0                # sum over tokens of y_s . y_t, (S + 1, S + 1): y_S, the last, is y
    total = 0               # sum over tokens of y_s, (S + 1, D)
    for idx_BT in split_rows(rows_RT, batch):
        outputs = []
        for m in ms:
            x_BTD, f_BTF = clean(m, gpt, idx_BT, layer)
            outputs.append(m.decode(layer, f_BTF, x_BTD))
        outputs.append(gpt.mlp(layer)(x_BTD))
        # the outputs of the S seeds and y, position 0 left out: (S + 1, N, D)
        y = torch.stack(outputs)[:, :, 1:].flatten(1, 2).double()
        gram = gram + torch.einsum("snd,tnd->st", y, y)
        total = total + y.sum(1)
        n_tokens += y.shape[1]

    # Sums over tokens, whose number cancels in each quotient: |y_s|^2, |y_s - y_t|^2 = |y_s|^2 +
    # |y_t|^2 - 2 y_s . y_t, and |y_s - <y_s>|^2 = |y_s|^2 - |sum of y_s|^2 / n_tokens.
    square = gram.diagonal()
    distance = square.unsqueeze(1) + square - 2 * gram
    spread = square - total.square().sum(1) / n_tokens
    # An output that never varies has nothing to be explained: NaN, which `mean` leaves out.
    spread = torch.where(spread > 1e-9 * square, spread, math.nan)
    spread_S1 = spread[:S].unsqueeze(1)

    # e_s . e_t = (|e_s|^2 + |e_t|^2 - |e_s - e_t|^2) / 2, where e_s - e_t = y_t - y_s
    error_S = distance[:S, S]
    error_S1 = error_S.unsqueeze(1)
    apart_SS = distance[:S, :S]
    dot_SS = (error_S1 + error_S - apart_SS) / 2
    table = dict(fve=ordered_pairs(1 - apart_SS / spread_S1),
                 fve_independent=ordered_pairs(1 - (error_S1 + error_S) / spread_S1),
                 error_cosine=ordered_pairs(dot_SS / (error_S1 * error_S).sqrt().clamp(min=1e-12)))
    return over_pairs(table, S)


def ordered_pairs(table_SS):
    """Read a table of seeds by seeds off its diagonal: {(s, t): number}."""
    pairs = itertools.permutations(range(len(table_SS)), 2)
    return {(s, t): table_SS[s, t].item() for s, t in pairs}


# ---------------------------------------------------------------------------------------- all of it
@torch.no_grad()
def stability(ms, gpt, fit_RT, rows_RT, gen, tau=0.):
    """Do two or more seeds of one method find the same units of one MLP? A flat dict.

        weights_.., inputs_.., activations_..   `with_null`, in each space; and for one block alone
                                                where there are several: weights_BLOCK_..
        weights_most, ..                        the numbers of `compare_pair`, means over s < t
        activations_shared_if_weights           share of the pairs shared in weights that are shared
                                                in activations too, with the same mate. Hold this
                                                share against activations_shared_0.7, that of all
                                                alive units. Its null has the real pairs in weights
                                                and chance in activations
        function_..                             `function_agreement`

    and null_KEY of all but function_.. and similarity_corrected, and from three seeds on KEY_se.
    Which units are alive is counted on fit_RT, and the inputs of the space inputs are those of
    fit_RT too; everything else is measured on rows_RT. A unit is on where f > tau. gen draws the
    chance. 1,024 units, 50,000 tokens: 20 s for two seeds, 42 s for three.
    """
    R, T = rows_RT.shape
    S = len(ms)
    seeds = [look_at(m, gpt, fit_RT, rows_RT, tau) for m in ms]

    # Each pair of seeds is compared once for real and once for chance.
    pairs = defaultdict(dict)       # {space or null_space: {(s, t): Matches}}
    table = defaultdict(dict)       # {key or null_key: {(s, t): number}}
    for s, t in itertools.combinations(range(S), 2):
        real = compare_pair(seeds[s], seeds[t])
        null = compare_pair(seeds[s], by_chance(seeds[t], R, T, gen))
        shared_in_weights = real.matches["weights"].pairs(SHARED)
        for prefix, pair in (("", real), ("null_", null)):
            for space, matches in pair.matches.items():
                pairs[prefix + space][s, t] = matches
                pairs[prefix + space][t, s] = matches.back()
            for key, number in pair.numbers.items():
                table[prefix + key][s, t] = number
            confirmed = share_confirmed(shared_in_weights, pair.matches["activations"])
            table[f"{prefix}activations_shared_if_weights"][s, t] = confirmed

    # What is said of all units in each space, and of each block where there are several. A block
    # has as many units in each seed, with the numbers unit_n.
    answers = over_pairs(table, S)
    blocks = {"": torch.arange(len(seeds[0].on_F), device=rows_RT.device)}
    if len(seeds[0].blocks) > 1:
        blocks |= {f"_{block.name}": block.unit_n for block in seeds[0].blocks}
    for space in SPACES:
        for block, unit_n in blocks.items():
            inside = within_units(pairs[space], pairs[f"null_{space}"], seeds, unit_n)
            answers |= put_before(f"{space}{block}_", inside)
    return answers | put_before("function_", function_agreement(ms, gpt, rows_RT))


def within_units(pairs, null_pairs, seeds, unit_n):
    """Ask `with_null` about these units alone. All other units pass for dead: on at 0 tokens."""
    on_SF = []
    for seed in seeds:
        on_SF.append(torch.zeros_like(seed.on_F).index_put((unit_n,), seed.on_F[unit_n]))
    inside = {pair: matches.within(unit_n) for pair, matches in pairs.items()}
    null_inside = {pair: matches.within(unit_n) for pair, matches in null_pairs.items()}
    return with_null(inside, null_inside, on_SF, [seed.written_F for seed in seeds])


def put_before(name, answers):
    """Put a name before each key but after "null_": null_similarity -> null_weights_similarity."""
    named = {}
    for key, value in answers.items():
        plain = key.removeprefix("null_")
        null = "null_" if plain != key else ""
        named[f"{null}{name}{plain}"] = value
    return named


# ------------------------------------------------------------------------------------ for the table
COLUMNS = {
    "weights_similarity_corrected": Column(
        "weights", "up", 0, 3, table="stability",
        text="similarity in weights of units of two seeds, matched one to one, in excess of "
             "random units: mean of two cosines, spd and molt their product, which is lower"),
    "weights_shared_0.7": Column(
        "same w", "up", None, 3, table="stability",
        text="share of the alive units with a mate in another seed that reads and writes alike, "
             "cosines of 0.7 or more (molt: their product)"),
    "inputs_shared_0.7": Column(
        "same i", "up", None, 3, table="stability",
        text="share of the alive units with a mate in another seed that writes alike and gets "
             "alike numbers from each token: cosines of 0.7 or more, that of what two units read "
             "taken over the inputs, of units with biases over how these vary (molt: their "
             "product)"),
    "activations_similarity_corrected": Column(
        "values", "up", 0, 3, table="stability",
        text="correlation over tokens of the values of units of two seeds, matched one to one, in "
             "excess of shifted tokens"),
    "activations_shared_0.7": Column(
        "same v", "up", None, 3, table="stability",
        text="share of the alive units with a mate in another seed whose values correlate with "
             "theirs, 0.7 or more"),
    "activations_survival": Column(
        "in all", "up", None, 3, table="stability",
        text="share of the alive units with a mate in every other seed whose values correlate with "
             "theirs, 0.7 or more"),
    "function_fve": Column(
        "output", "up", None, 3, table="stability",
        text="FVE of one seed's output by another's"),
    "function_fve_independent": Column(
        "by chance", "", None, 3, table="stability",
        text="FVE of one seed's output by another's, if seeds erred independently"),
}


def measure(ms, arena, gen):
    """Do the seeds ms of one method find the same units? The columns under the heading stability.

    Returns (numbers, details) as metrics/columns.py has them.
    """
    found = stability(ms, arena.gpt, arena.fit[0], arena.test[0], gen)
    # Found in every other seed, however many there are.
    last = f"activations_survival_{len(ms) - 1}"
    found["activations_survival"] = found[last]
    found["null_activations_survival"] = found[f"null_{last}"]
    return columns.split(COLUMNS, found)
