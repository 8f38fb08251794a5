"""What does one method's unit look like in the other methods' terms?

Each two rows of compare.py are held against each other on the same tokens, seed by seed, by three
kinds of evidence (metrics/mapping.py):

    activation  which units are on together? Partners, orphans, one to many; which units are parts
                of another; what few units of one method tell of a unit of the other
    weight      do units that are each other's best partner read and write alike? And which units
                are neurons?
    effect      does switching off the one do to the predictions what switching off the other does?

The null of activation is the other method's units moved to the wrong text, those of weight and
effect another unit in the partner's place, a random one and the second-best partner, that of
groups of parts random groups as large. The ceiling is another seed of the row itself, the floors
are neurons and random directions. SPD's components are asked alone and as clusters of components,
of both matrices, that are on together: alone they are half-units. Units on at 50 tokens of fit take
part. What is chosen is chosen on fit, what is said is from test; seeds are the unit of replication.

    python -m studies.map       # trains what compare.py has not trained yet; goes on after a kill
    python -m studies.map --methods spd,transcoder --seeds 1 --out results-quick    # a look

P pairs of units; i, j units of two methods A and B; other letters as in metrics/mapping.py
"""
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as nnf           # F is the number of units here

import baselines
import common
import compare
import data
import evals
from metrics import atoms, effects, mapping, matching, recording, stability, words
from metrics.stability import mean
from model import GPT
from report import curve, maps
from studies.kept import SPD_ROWS, Found, apart, column

METHODS = "spd-former,transcoder,transcoder-kl,transcoder-stochastic,clt,molt,sae,spd-long"


@dataclass
class Config:
    # what is compared, on what
    model: str = "target"           # folder of the GPT-2 (Hugging Face layout)
    data: str = "tinytales"         # tinytales, a .bin of uint16 token ids or a .txt
    layer: int = -1                 # [-1, 1e4] whose MLP; -1: config.json's, or the middle one
    methods: str = METHODS          # rows of compare.py, comma-separated
    cases: str = ""                 # two rows whose clearest cases are shown; empty: the first two
    # how much of it
    seeds: int = 3                  # [1, 10] models of each row, seeds 0, 1, ..
    tokens: int = compare.Config.tokens     # [1, 1e11] that each model is trained on
    eval_tokens: int = 50_000       # [1, 1e9] of fit (choices) and of test (numbers)
    pairs: int = 50                 # [1, 1e4] partners whose weights and effects are compared
    rows: int = 32                  # [1, 1e6] of test, on which effects are measured
    # models that were trained by other code than their files now hold stop the run; instead:
    retrain: bool = False           # train those models anew
    keep: bool = False              # use those models as they are
    # where it is kept
    out: str = "results"            # folder for map.json, .md and .png; a part: results-part
    runs: str = "runs/compare"      # folder for the models, shared with compare.py
    device: str = "auto"            # auto, cpu, cuda


FLOORS = ("neurons", "random")
# rows that are made of another row's units
CLUSTERED = {"spd clusters": "spd", "spd-former clusters": "spd-former"}
# rows of parameter components, or of clusters of them
COMPONENTS = (*SPD_ROWS, *CLUSTERED)
CASES = 20                              # shown of each kind
SHOWN = 6                               # units of one side of a case that are described
FEWEST = 2                              # units that a row needs: one has no control
ALIKE = (0.7, 0.9)                      # cosines from which on a unit is a neuron
CODE = (evals, baselines, mapping, matching, recording, atoms, effects, stability)


# ----------------------------------------------------------------------------------- what is asked
class Pair(NamedTuple):
    """Two rows, at a seed each, that are held against each other."""
    one: str
    other: str
    seed: int
    other_seed: int

    @property
    def name(self):
        """Of all its seeds, for the time left."""
        return f"{self.one}, {self.other}"

    def __str__(self):
        return f"{self.one} seed {self.seed} and {self.other} seed {self.other_seed}"


def rows_asked(cfg):
    """The names of all rows, floors last."""
    allowed = [name for name in compare.METHODS if ":" not in name]
    compare.check_names("methods", cfg.methods, allowed)
    names = allowed if cfg.methods == "all" else list(dict.fromkeys(cfg.methods.split(",")))
    made_of_them = [name for name, source in CLUSTERED.items() if source in names]
    return [*names, *made_of_them, *FLOORS]


def pairs(names, n_seeds):
    """List what is held against each other, seeds outermost: each two rows, each row and a floor,
    and as their ceiling each row with itself. Always one seed and the next: methods that are alike
    have the same weights at the start of one seed, and would keep some of that."""
    todo = []
    for seed in range(n_seeds):
        next_seed = (seed + 1) % n_seeds
        for one, other in combinations(names, 2):
            # a component against its own cluster, or a floor against a floor, would say nothing
            if CLUSTERED.get(other) != one and one not in FLOORS:
                todo.append(Pair(one, other, seed, next_seed))
        if next_seed > seed or n_seeds > 2:         # of two seeds there is one pair
            todo += [Pair(name, name, seed, next_seed) for name in names if name not in FLOORS]
    return todo


def cases_asked(cfg, names):
    """The two rows whose clearest cases are shown."""
    if len(names) < 2:
        common.fail(f"--methods {cfg.methods}: is one row, and two are held against each other")
    shown = cfg.cases.split(",") if cfg.cases else names[:2]
    if len(set(shown)) != 2 or not {*shown} <= {*names}:
        common.fail(f"--cases {cfg.cases}: two of the rows {', '.join(names)}, with a comma")
    return shown


# ------------------------------------------------------------------------------------ the units
class Units:
    """The units of one model that are on often enough, or clusters of them: where they are on in
    fit and in test, and what they read and write."""

    def __init__(self, m, arena, fit, test, cluster_F=None):
        """fit, test: recordings of all of m's units. cluster_F: the clusters, if it is of them."""
        self.m = m
        self.arena = arena
        self.recorded = fit, test
        self.often = mapping.frequent(fit)
        self.single = mapping.select(fit, self.often)
        self.cluster_F = cluster_F
        self.fit = self.single
        self.test = mapping.select(test, self.often)
        if cluster_F is not None:
            self.fit = mapping.clustered(self.fit, cluster_F)
            self.test = mapping.clustered(self.test, cluster_F)

    @property
    def are_clusters(self):
        return self.cluster_F is not None

    @property
    def row(self):
        """How many tokens of one row of text are in a recording?"""
        return self.arena.fit[0].shape[1] - 1

    @cached_property
    def blocks(self):
        return matching.blocks(self.m)

    def block_of(self, origin_F):
        """In which block is each of m's units?"""
        last = [block.unit_n[-1] for block in self.blocks]
        return torch.searchsorted(torch.stack(last), origin_F)

    @cached_property
    def inputs(self):
        """What each block reads on a few rows, less its mean."""
        inputs = self.m.unit_inputs(self.arena.gpt, self.arena.fit[0][:8])
        return [x_ND - x_ND.mean(0) for x_ND in inputs]

    @cached_property
    def sign_F(self):
        """Is what each unit says above 0 or below, on average?"""
        return mapping.mean_value(self.fit).sign().float()

    @cached_property
    def write_FD(self):
        """Which way does each unit write on average? Unit vectors."""
        # what a component adds depends on all that are on, the rare ones too
        c_FJD = recording.contributions(self.m, self.recorded[0], self.often)
        return recording.write_directions(c_FJD)

    def similarities(self):
        """How alike do two units write and read? For mapping.coherence; clusters do neither."""
        if self.are_clusters:
            return {}
        return dict(write=matching.cosines(self.write_FD, self.write_FD),
                    read=mapping.read_similarity(self.m, self.fit))

    @cached_property
    def concepts(self):
        """The true concept that says best where each unit is on, chosen on fit, and its F1 on test:
        (F) each. None where no concept can be asked about."""
        testable = recording.testable_concepts(self.fit)
        if not len(testable):
            return None
        best_F1 = atoms.best_concepts(self.fit, testable, 1)
        scored = atoms.score_explanations(self.test, testable, best_F1)
        return testable[best_F1].squeeze(1), scored.single_FC.squeeze(1)

    def switched(self, units_P):
        """Which of m's units does switching off each of these switch off? (P, units of m), bool."""
        n_units = len(self.m.params_F)
        if not self.are_clusters:
            return mapping.switched(self.fit, units_P, n_units)
        return mapping.switched_clusters(self.single, self.cluster_F, n_units)[units_P]

    def label(self, u):
        """What is one unit called? Its block, where there are several, and its number there."""
        origins = self.fit.origin_F[u].view(1)
        if self.are_clusters:
            origins = self.single.origin_F[self.cluster_F == u]
        names = []
        for origin, k in zip(origins.tolist(), self.block_of(origins).tolist()):
            number = f"#{origin - self.blocks[k].unit_n[0]}"
            names.append(number if len(self.blocks) == 1 else f"{self.blocks[k].name} {number}")
        return " + ".join(names)


class Rows:
    """The units of all rows and seeds: each model trained or loaded, and recorded, when it is first
    asked for."""

    def __init__(self, base, arena):
        self.base = base
        self.arena = arena
        self.models = {}
        self.units = {}

    def key(self, name, seed):
        """What tells a row and seed from a floor, and its job: (name, seed)."""
        name = CLUSTERED.get(name, name)
        has_seeds = name not in compare.FLOORS or compare.FLOORS[name].has_seeds
        return name, seed if has_seeds else 0

    def job(self, name, seed):
        """The job of compare.py that has the model, at the middle sparsity of its row."""
        job, = compare.jobs_of_row(*self.key(name, seed), True)
        return job

    def model(self, name, seed):
        """The model, a floor's too."""
        key = self.key(name, seed)
        if key not in self.models:
            job = self.job(name, seed)
            self.models[key] = compare.subject_of(job, self.base, self.arena).model
        return self.models[key]

    def depends_on(self, name, seed):
        """What the numbers of a row depend on, whether its model is there or not."""
        job = self.job(name, seed)
        code = common.training_code(job.method.module.__file__) if job.method else {}
        return [name, str(job), compare.which_of(job, self.base, self.arena), code]

    def of_pair(self, pair):
        one = self.depends_on(pair.one, pair.seed)
        return [one, self.depends_on(pair.other, pair.other_seed), pair]

    def both(self, pair):
        """The Units of a pair."""
        return self[pair.one, pair.seed], self[pair.other, pair.other_seed]

    def __getitem__(self, key):
        """The Units of a row and seed."""
        if key not in self.units:
            self.units[key] = self.made(*key)
        return self.units[key]

    def made(self, name, seed):
        if name in CLUSTERED:
            single = self[CLUSTERED[name], seed]
            return Units(single.m, self.arena, *single.recorded, mapping.clusters(single.fit))
        m = self.model(name, seed)
        fit = recording.record(m, self.arena.gpt, *self.arena.fit)
        test = recording.record(m, self.arena.gpt, *self.arena.test)
        units = Units(m, self.arena, fit, test)
        if units.fit.F < FEWEST:
            common.fail(f"{name} seed {seed}: {units.fit.F} of its units are on at {mapping.OFTEN} "
                        f"tokens of fit, and {FEWEST} have to be: give more --eval_tokens", 1)
        return units

    def keep_only(self, seeds):
        """Forget the recordings of other seeds: 140 MB a row for 50,000 tokens."""
        self.units = {key: units for key, units in self.units.items() if key[1] in seeds}


# -------------------------------------------------------------------------------------- activation
def map_numbers(one, other, cfg, gen):
    """How do the units of two rows lie to each other, by where they are on? `mapping.mapping`, and
    how many units take part."""
    numbers = mapping.mapping((one.fit, other.fit), (one.test, other.test), one.row, gen)
    return numbers | dict(units_a=one.fit.F, units_b=other.fit.F)


def graph(a, b, row, gen):
    """How alike are the units of two recordings, and which are linked? r or |r|, and edges at 0.4:
    (F, G) each."""
    floor = mapping.information_floor(mapping.coactivation(a, mapping.by_chance(b, row, gen)))
    r_FG = mapping.likeness(mapping.covariances(a, b), a, b)
    return r_FG, mapping.edges(r_FG, mapping.coactivation(a, b).information(), floor)


# ------------------------------------------------------------------------------------------ groups
def group_numbers(one, other, cfg, gen):
    """Do the units that are parts of one unit belong together, and does that unit stand for a
    concept? .._a: A's units as parts of B's, .._b: B's as parts of A's."""
    numbers = {}
    for side, parts, wholes in (("a", one, other), ("b", other, one)):
        for key, value in parts_of_wholes(parts, wholes, gen).items():
            numbers[f"{key}_{side}"] = value
    return numbers


def parts_of_wholes(parts, wholes, gen):
    """Which units are parts of one unit of another row, and what have they in common?

        groups, members     units with two parts or more; parts in such a group
        NAME, z_NAME        mean over groups of each number of `mapping.coherence`, and its z
        coherent            share of the members that are in a coherent group: z > 2 in what they
                            write and in the concept where one of them is on; null_coherent: of
                            random groups
        whole_f1, part_f1   mean F1 of the best concept of a whole, and of the parts of one
        gain                their difference

    Groups are those of fit, what is said of them is from test."""
    counts = mapping.coactivation(parts.fit, wholes.fit)
    groups = mapping.subsumed_groups(mapping.relations(counts))
    numbers = dict(groups=len(groups.whole_Q), members=len(groups.unit_M.unique()))
    if not len(groups.whole_Q):
        return numbers

    # Against random groups, and what random groups have against other random ones.
    stand_in_F = mapping.alike_units(parts.fit.on(), 1, gen)[0]
    random = groups._replace(unit_M=stand_in_F[groups.unit_M])
    similarities = parts.similarities()
    for prefix, some in (("", groups), ("null_", random)):
        scores = mapping.coherence(parts.test, wholes.test, some, similarities, gen)
        has = [name for name in ("write", "f1") if name in scores]
        if has:
            numbers[f"{prefix}coherent"] = mapping.share_coherent(scores, some, has)
        for name, score in scores.items():
            numbers[f"{prefix}{name}"] = mean(score.value_Q.tolist())
            numbers[f"{prefix}z_{name}"] = mean(score.z_Q.tolist())

    if wholes.concepts:
        numbers["whole_f1"] = mean(wholes.concepts[1][groups.whole_Q].tolist())
        part_f1_M = parts.concepts[1][groups.unit_M].double()
        sum_Q = part_f1_M.new_zeros(len(groups.whole_Q)).index_add(0, groups.group_M, part_f1_M)
        numbers["part_f1"] = mean((sum_Q / groups.sizes()).tolist())
        numbers["gain"] = numbers["whole_f1"] - numbers["part_f1"]
    return numbers


# ------------------------------------------------------------------------------- weight and effect
def matched_pairs(one, other, most, gen):
    """Which units are each other's best partners, and linked? Up to `most` pairs (P), (P), drawn at
    random, and A's second-best partners (P). By what they say on fit."""
    r_FG, is_edge_FG = graph(one.fit, other.fit, one.row, gen)
    i = torch.arange(len(r_FG), device=r_FG.device)
    best_F = r_FG.argmax(1)
    is_mutual_F = r_FG.argmax(0)[best_F] == i
    i = i[is_mutual_F & is_edge_FG[i, best_F]]
    i = i[torch.randperm(len(i), generator=gen)[:most].to(i.device)]
    r_PG = r_FG[i].scatter(1, best_F[i].unsqueeze(1), -torch.inf)
    return i, best_F[i], r_PG.argmax(1)


def correlation_of_pairs(one, other, i_P, j_P):
    """Pearson's r of what the two units of each pair say on test, signed: (P)."""
    return matching.correlation(one.test, other.test, i_P, j_P).diagonal()


def write_cosines(one, other, i_P, j_P):
    """Do the two units of each pair write alike where both say something above 0? (P). NaN for
    clusters, and for components of two matrices, which are no alternatives to each other."""
    if one.are_clusters or other.are_clusters:
        return torch.full((len(i_P),), torch.nan, device=i_P.device)
    cosine_P = (one.write_FD[i_P] * other.write_FD[j_P]).sum(1)
    cosine_P = cosine_P * one.sign_F[i_P] * other.sign_F[j_P]
    if one.m.kind == other.m.kind == "component":
        block_P = one.block_of(one.fit.origin_F[i_P])
        is_apart_P = block_P != other.block_of(other.fit.origin_F[j_P])
        cosine_P = cosine_P.masked_fill(is_apart_P, torch.nan)
    return cosine_P


def same_inputs(x_ND, y_ND):
    """Do two blocks read the same thing, up to a constant and a factor?"""
    if x_ND.shape != y_ND.shape:
        return False
    return nnf.cosine_similarity(x_ND.flatten(), y_ND.flatten(), dim=0) > 0.9999


def read_cosines(one, other, i_P, j_P):
    """Do the two units of each pair read alike? (P). NaN for clusters, for units of a map, which
    read more than one direction, and where the two do not read the same thing."""
    cosine_P = torch.full((len(i_P),), torch.nan, device=i_P.device)
    if one.are_clusters or other.are_clusters or "map" in (one.m.kind, other.m.kind):
        return cosine_P
    origin_P = one.fit.origin_F[i_P]
    other_origin_P = other.fit.origin_F[j_P]
    blocks = zip(one.block_of(origin_P).tolist(), other.block_of(other_origin_P).tolist())
    for p, (k, n) in enumerate(blocks):
        if same_inputs(one.inputs[k], other.inputs[n]):
            a = one.blocks[k]
            b = other.blocks[n]
            read_D = a.read[origin_P[p] - a.unit_n[0]]
            other_read_D = b.read[other_origin_P[p] - b.unit_n[0]]
            cosine_P[p] = nnf.cosine_similarity(read_D, other_read_D, dim=0)
    return cosine_P


def evidence(one, other, cfg, gen):
    """Do partners by activation read, write and act alike? Means over up to cfg.pairs pairs, and in
    the partner's place null_KEY with another unit of B that is on about as often, next_KEY with the
    unit of B that is most like A's after the partner:

        r               correlation of what the two say, |r| where one has a sign
        read, write     cosines, times the sign of r where one has a sign
        effect          `mapping.effect_match` of switching them off
        against_KEY     share of the pairs in which KEY is below 0: it contradicts the activations
        against         share in which one of them is

    A component and its negative are one: with the sign of r, agreement is above 0 for both. What
    has no evidence is left out."""
    i_P, j_P, next_P = matched_pairs(one, other, cfg.pairs, gen)
    numbers = dict(pairs=len(i_P))
    if not len(i_P):
        return numbers
    partners = {"": j_P, "null_": mapping.control_units(other.fit, j_P, gen), "next_": next_P}
    off_KPG = torch.stack([other.switched(partner_P) for partner_P in partners.values()])
    effect_KP = mapping.effect_match(
        one.m, other.m, one.arena.gpt, one.arena.test[0][:cfg.rows], one.switched(i_P), off_KPG)

    for (prefix, partner_P), effect_P in zip(partners.items(), effect_KP):
        r_P = correlation_of_pairs(one, other, i_P, partner_P)
        likeness_P = matching.unsigned(r_P, one.test, other.test)
        sign_P = torch.where(likeness_P == r_P, 1., -1.)
        found = dict(read=read_cosines(one, other, i_P, partner_P) * sign_P,
                     write=write_cosines(one, other, i_P, partner_P) * sign_P,
                     effect=effect_P)
        numbers[f"{prefix}r"] = mean(likeness_P.tolist())
        for key, value_P in found.items():
            numbers[f"{prefix}{key}"] = mean(value_P.tolist())
            numbers[f"{prefix}against_{key}"] = share_below_0(value_P)
        all_P = torch.stack([*found.values()])
        lowest_P = all_P.nan_to_num(torch.inf).amin(0)
        numbers[f"{prefix}against"] = share_below_0(lowest_P.where(lowest_P.isfinite(), torch.nan))
    return numbers


def share_below_0(value_P):
    """Which share of those that are no NaN?"""
    return mean((value_P < 0).double().where(~value_P.isnan(), torch.nan).tolist())


# ----------------------------------------------------------------------------------------- neurons
def neuron_numbers(one, neurons, gen):
    """Which of a row's units are neurons? Each is held against the neuron that writes most alike:

        units           how many
        write           mean cosine of what the two write
        write_0.7, ..   share of the units in which it is so high
        both_0.7        and that of what they read, too; not where the two do not read the same
        found_0.7       share of the neurons that such a unit writes like

    null_KEY: with what the units write drawn anew, alike in mean and covariance."""
    i_F = torch.arange(one.fit.F, device=one.write_FD.device)
    numbers = dict(units=one.fit.F)
    for prefix, write_FD in (("", one.write_FD), ("null_", matching.redraw(one.write_FD, gen))):
        cosine_F, best_F = matching.cosines(write_FD, neurons.write_FD).max(1)
        # a component and its negative are one: as it is on average, as what it writes
        read_F = read_cosines(one, neurons, i_F, best_F) * one.sign_F * neurons.sign_F[best_F]
        numbers[f"{prefix}write"] = cosine_F.mean().item()
        for least in ALIKE:
            is_alike_F = cosine_F >= least
            both_F = (is_alike_F & (read_F >= least)).double().where(~read_F.isnan(), torch.nan)
            numbers[f"{prefix}write_{least}"] = is_alike_F.double().mean().item()
            numbers[f"{prefix}both_{least}"] = mean(both_F.tolist())
            numbers[f"{prefix}found_{least}"] = len(best_F[is_alike_F].unique()) / neurons.fit.F
    return numbers


# ---------------------------------------------------------------------------------------- clusters
def cluster_numbers(clusters, gen):
    """Which components of a row are on together? Of its clusters, and null_KEY of the clusters of
    units that are moved to the wrong text:

        units, clusters     how many
        together            share of the units that are in a cluster of two or more
        across              share of these clusters that have units of both matrices
        saved               which share of the bits that say where all units are on clusters save"""
    moved = mapping.by_chance(clusters.single, clusters.row, gen)
    block_F = clusters.block_of(moved.origin_F)
    numbers = dict(units=moved.F)
    for prefix, units, cluster_F in (("", clusters.single, clusters.cluster_F),
                                     ("null_", moved, mapping.clusters(moved))):
        size_C = torch.bincount(cluster_F)
        sum_C = torch.bincount(cluster_F, block_F.double())
        sum_square_C = torch.bincount(cluster_F, block_F.double()**2)
        # blocks do not vary within a cluster of one matrix
        is_across_C = sum_square_C * size_C > sum_C**2
        alone = mapping.code_length(units, torch.arange(units.F, device=cluster_F.device))
        numbers[f"{prefix}clusters"] = len(size_C)
        numbers[f"{prefix}together"] = (size_C[cluster_F] > 1).double().mean().item()
        numbers[f"{prefix}across"] = mean(is_across_C[size_C > 1].double().tolist())
        numbers[f"{prefix}saved"] = 1 - mapping.code_length(units, cluster_F) / alone
    return numbers


# ------------------------------------------------------------------------------------ single cases
def clearest_cases(one, other, gen):
    """Which cases show best what units of A are in B's terms? {kind: [case]}, the clearest first: a
    dict of r, of how many units there are on each side, and of what they are. Chosen on fit."""
    r_FG, is_edge_FG = graph(one.fit, other.fit, one.row, gen)
    found = mapping.clearest_cases(r_FG, is_edge_FG, CASES)
    literals = words.Literals(one.arena.fit[0], one.arena.gpt.vocab)
    sides = []
    for side, units in (("one", one), ("other", other)):
        asked = set()
        for some in found.values():
            for case in some:
                asked.update(getattr(case, side)[:SHOWN])
        sides.append(described(units, sorted(asked), literals))

    # what was chosen for its r on fit is as clear as its r on test
    on_test = mapping.covariances(one.test, other.test)
    r_FG = mapping.likeness(on_test, one.test, other.test)
    kinds = {}
    for kind, some in found.items():
        kinds[kind] = [told(case, clearness(case, r_FG, is_edge_FG), *sides) for case in some]
    return dict(kinds=kinds)


def clearness(case, r_FG, is_edge_FG):
    """The smallest r of the links of a case; of an orphan, the largest r that it has."""
    if not case.other:
        return r_FG[case.one].max().item()
    if not case.one:
        return r_FG[:, case.other].max().item()
    is_link = is_edge_FG[case.one][:, case.other]
    return r_FG[case.one][:, case.other][is_link].min().item()


def told(case, r, one, other):
    """A mapping.Case as a dict of what its units are."""
    return dict(r=r, n_one=len(case.one), n_other=len(case.other),
                one=[one[u] for u in case.one[:SHOWN]],
                other=[other[u] for u in case.other[:SHOWN]])


def described(units, asked, literals):
    """What are some units, for a reader? {unit: a dict of texts and numbers}: at which share of the
    tokens of test it is on, its rule in words and its best concept, with their F1 on test, and the
    token of test at which it says most."""
    if not asked:
        return {}
    arena = units.arena
    asked_U = torch.tensor(asked, device=units.fit.unit_E.device)

    # rules are found on fit
    value_NU = words.dense(units.fit, asked_U).abs()
    rules = words.find_rules(literals, literals(arena.fit[0]), value_NU)
    test_NU = words.dense(units.test, asked_U).abs()
    rule_f1_U = words.f1_of_guesses(rules.guess(literals(arena.test[0])) > 0, test_NU > 0)

    texts = {}
    for p, u in enumerate(asked):
        row, t = divmod(test_NU[:, p].argmax().item(), units.row)
        example = evals.in_context(arena.gpt, arena.test[0][row].tolist(), t + 1)
        text = dict(label=units.label(u), on=(test_NU[:, p] > 0).float().mean().item(),
                    rule=rules.text(p), rule_f1=rule_f1_U[p].item(), example=example)
        if units.concepts:
            concept_F, f1_F = units.concepts
            text |= dict(concept=arena.names[concept_F[u]], concept_f1=f1_F[u].item())
        texts[u] = text
    return texts


# ----------------------------------------------------------------------------------- to be shown
def panel(rows, pair):
    """The map of one pair, on test."""
    one, other = rows.both(pair)
    gen = common.generator(pair.seed, f"picture {pair}")
    labels = [f"{pair.one}, seed {pair.seed}", f"{pair.other}, seed {pair.other_seed}"]
    return maps.Panel(*labels, *graph(one.test, other.test, one.row, gen))


def names_in(found):
    """The rows that something is known of, in the order of compare.py's table."""
    known = {row["one"] for row in found["maps"]} | {row["other"] for row in found["maps"]}
    ordered = [name for name in (*compare.METHODS, *CLUSTERED, *FLOORS) if name in known]
    return maps.Names(ordered, FLOORS, [name for name in COMPONENTS if name in known])


# ------------------------------------------------------------------------------- for the table
def columns(found):
    """What compare.py's table takes from here: {row: {key: metric}}.

    The degree of a row's units is a mean over the other methods that are trained; an SPD that is
    trained for longer is no other one."""
    degrees = {}
    for row in found["maps"]:
        both = {row["one"], row["other"]}
        is_one_method = len(both) == 1 or both <= {*COMPONENTS}
        if both <= compare.METHODS.keys() and not is_one_method:
            for name, side in ((row["one"], "a"), (row["other"], "b")):
                by_seed = degrees.setdefault(name, {})
                by_seed.setdefault(row["seed"], []).append(
                    (row[f"degree_{side}"], row[f"null_degree_{side}"]))
    rows = {}
    for name, by_seed in degrees.items():
        values, nulls = zip(*(map(mean, zip(*pairs)) for pairs in by_seed.values()))
        rows[name] = column("degree", values, nulls)
    return rows


# -------------------------------------------------------------------------------------------- main
MEASURES = {"maps": map_numbers, "groups": group_numbers, "evidence": evidence}
HERE = {                                # the code that each table depends on alone
    "maps": (map_numbers,),
    "groups": (group_numbers, parts_of_wholes),
    "evidence": (evidence, share_below_0, matched_pairs, graph, correlation_of_pairs,
                 write_cosines, same_inputs, read_cosines),
    "clusters": (cluster_numbers,),
    "neurons": (neuron_numbers, same_inputs, read_cosines),
    "cases": (clearest_cases, clearness, told, described, graph, words),
    "drawn": (panel, graph, maps.picture, maps.draw_map, maps.in_order, maps.sort_by),
}


@cache
def code_of(table):
    return [compare.code_of(part) for part in (Rows, Units, *HERE[table])]


def order(row):
    """What rows are sorted by."""
    return row["one"], row.get("other", ""), row["seed"]


def measure(known, rows, cfg, todo, shared):
    """Ask all pairs what is not known yet, with progress."""
    for pair in compare.in_turn(todo):
        rows.keep_only({pair.seed, pair.other_seed})
        depends_on = [*shared, *rows.of_pair(pair)]
        for name, find in MEASURES.items():
            gen = common.generator(pair.seed, f"{name} {pair}")
            more = [cfg.pairs, cfg.rows] if name == "evidence" else []
            known.row(name, depends_on + code_of(name) + more, pair._asdict(),
                      lambda: find(*rows.both(pair), cfg, gen))


def measure_rows(known, rows, names, seeds, shared):
    """Ask of each row alone, and not of two: which of its units are neurons, and for clusters,
    which components are on together."""
    neurons = "neurons", 0
    for seed, name in product(seeds, [name for name in names if name not in FLOORS]):
        rows.keep_only({seed, 0})
        depends_on = [*shared, rows.depends_on(name, seed)]
        gen = common.generator(seed, name)
        row = dict(one=name, seed=seed)
        print(f"{name}, seed {seed}", flush=True)
        if name in CLUSTERED:
            known.row("clusters", depends_on + code_of("clusters"), row,
                      lambda: cluster_numbers(rows[name, seed], gen))
        else:
            depends_on += [rows.depends_on(*neurons), ALIKE, code_of("neurons")]
            known.row("neurons", depends_on, row,
                      lambda: neuron_numbers(rows[name, seed], rows[neurons], gen))


def keep_asked(found, todo, shown):
    """Forget the pairs that only another run asked: they would be averaged with this one's."""
    for table in MEASURES:
        found[table] = [row for row in found[table] if pair_of(row) in todo]
    found["cases"] = [row for row in found["cases"] if pair_of(row) == shown]


def pair_of(row):
    return Pair(*(row.get(name) for name in Pair._fields))


def draw(known, rows, drawn, shared, path):
    """Draw the maps of some pairs, unless the picture that is there is of these."""
    of_pairs = [rows.of_pair(pair) for pair in drawn]
    key = compare.digest([shared, code_of("drawn"), maps.DRAWN, of_pairs])
    if known.found.get("drawn") != key or not path.exists():
        curve.save_picture(maps.picture([panel(rows, pair) for pair in drawn]), path)
        known.write(drawn=key)


def main(cfg):
    cfg = apart(cfg)
    # what is asked, of what
    common.check(cfg)
    names = rows_asked(cfg)
    shown = cases_asked(cfg, [name for name in names if name not in FLOORS])
    trained = [name for name in names if name in compare.METHODS]
    base = compare.Config(
        cfg.model, cfg.data, cfg.layer, ",".join(trained), seeds=cfg.seeds, tokens=cfg.tokens,
        eval_tokens=cfg.eval_tokens, retrain=cfg.retrain, keep=cfg.keep, runs=cfg.runs,
        device=cfg.device)
    dev = common.device(cfg.device)
    gpt = GPT.load(cfg.model, dev)
    layer, _ = compare.check(base, gpt)
    arena = compare.prepared(base, gpt, layer, dev)
    rows = Rows(base, arena)
    seeds = range(cfg.seeds)
    for name in trained:
        compare.check_models(base, arena, [rows.job(name, seed) for seed in seeds])
    known = Found(Path(cfg.out) / "map.json", (*MEASURES, "neurons", "clusters", "cases"), order)
    common.must_be_writable(cfg.out, cfg.runs)
    common.hold(cfg.out)

    # pairs of rows
    code = [compare.code_of(part) for part in CODE]
    shared = [gpt.hash, layer, data.fingerprint(cfg.data), cfg.eval_tokens, code]
    todo = pairs(names, cfg.seeds)
    pair = Pair(*shown, 0, 1 % cfg.seeds)       # of unlike seeds, as all of them
    keep_asked(known.found, todo, pair)
    measure(known, rows, cfg, todo, shared)

    measure_rows(known, rows, names, seeds, shared)

    # single cases
    print(f"the clearest cases of {pair}", flush=True)
    depends_on = [*shared, *rows.of_pair(pair), code_of("cases"), CASES, SHOWN]
    known.row("cases", depends_on, pair._asdict(),
              lambda: clearest_cases(*rows.both(pair), common.generator(0, "cases")))

    # what it looks like
    drawn = [pair] + ([pair._replace(one=pair.other)] if cfg.seeds > 1 else [])
    draw(known, rows, drawn, shared, Path(cfg.out) / "map.png")
    known.write(columns=columns(known.found), provenance=common.provenance(cfg, gpt))
    text = maps.render(known.found, names_in(known.found))
    common.write(Path(cfg.out) / "map.md", text.encode())
    print("", text, f"-> {cfg.out}/map.json, .md, .png", sep="\n")


if __name__ == "__main__":
    main(common.cli(Config))
