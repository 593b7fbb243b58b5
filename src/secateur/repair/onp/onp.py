"""ONP, optimized neuron pruning: an agent learns by reinforcement which neurons of a backdoored network to cut.

Li, Yu, Yi, "Optimized Neuron Pruning" (arXiv:2405.17746, 2024); their code is not public.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from ...data import count_steps, holdout
from ...detect import Precision
from ...errors import MethodError, check_choice, check_range
from ...prune import apply_and_heal
from ...prune.mask import Edit
from ...state import seeded
from ...train import OnNote, OnStep
from ...types import HardMask, ImageSet, NeuronGraph, Repaired
from ..evidence import examine, grown
from ..fine_tuning import healing
from .choice import choose
from .features import ablations, features
from .layers import Layer, Residual, layers
from .signs import Sign, clean_errors, noisy, triggered, unlearned

if TYPE_CHECKING:
    from .env import Pruning

PROXIES = "trigger", "unlearned", "noise"
JUDGED = 0.25  # share of the clean images that are kept for the choice among cuts
ACCURATE = 2  # times as many images tell accuracy as tell a sign: to lose ``drop`` is less to see


def onp(
    model: nn.Module,
    clean: ImageSet,
    *,
    proxies: str = "trigger+unlearned",
    policy: str = "",
    games: int = 64,
    images: int = 256,
    drop: float = 0.1,
    bonus: float = 1.0,
    epochs: int = 10,
    tuning_lr: float = 0.05,
    lr: float = 3e-3,
    width: int = 32,
    degree: int = 8,
    ablate: bool = True,
    residual: Residual = "tied",
    edit: Edit = "weight",
    precision: Precision = "float32",
    on_step: OnStep | None = None,
    on_note: OnNote | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Let a graph network learn, game by game, which neurons to cut; cut them, and fine-tune what is left.

    A game goes from the last layer to the first. For each, the policy sees a graph of its neurons (see
    `secateur.repair.onp.layers` and `features`) and says which go; a move is rewarded by how much it lowers the signs of a
    backdoor and by how many neurons it cuts, less what it costs in accuracy beyond ``drop``, at a price that follows from what
    earlier games lost (a Lagrange multiplier). The policy learns by PPO. In the end the neurons are ranked by how likely it
    cuts them, and go in this order, each unless accuracy then falls by more than ``drop``. Of the cuts on this way and the ends
    of all games, the one is taken that is worth most of those that cost at most ``drop`` on images of the game, and not
    significantly more on images kept for this (one-sided, 5 %). Up to 32 cuts are looked at there, the best first.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images: three quarters are learned from, a quarter chooses how much to cut.
        proxies: What shows a backdoor, joined by ``+``: inverted ``trigger``s, an ``unlearned`` copy, neuron ``noise``; or
            ``none``: then as much goes as ``drop`` allows.
        policy: What to start from. Without one two rules: a neuron is the likelier cut the further the slope of a sign stands
            out, and the more the signs fall and the less accuracy does in its ablation; ``random`` starts without them;
            ``pretrained`` is the policy that comes with the package; otherwise the folder of a policy (see
            `secateur.repair.onp.saved`).
        games: To learn from, >= 0. With 0 the policy is used as it is.
        images: Clean images that tell a sign, >= 1; accuracy is told by up to twice as many.
        drop: Clean accuracy that the cut may cost before the fine-tuning, in [0, 1].
        bonus: What it is worth to cut all neurons, >= 0, where the signs are worth at most 1: what no sign shows goes with the
            neurons, and fine-tuning brings the accuracy back.
        epochs: Of fine-tuning after the cut, >= 0; 0 leaves it out (then ``drop`` is what is lost in the end).
        tuning_lr: Learning rate of the fine-tuning, > 0.
        lr: Learning rate of the policy, > 0.
        width: Of a new policy, >= 1.
        degree: Neighbours that each neuron chooses, >= 0; 0 looks at each neuron alone.
        ablate: Tell the policy what the ablation of each neuron alone does to accuracy and signs: for each neuron an evaluation
            of the network and of each sign before the first game.
        residual: Whether the channels of a residual stream go ``tied`` or ``apart``.
        edit: Set the ``weight`` of a cut neuron to 0, or ``weight+bias``.
        precision: Of the inversion and the fine-tuning.
        on_step: Progress in games, then in steps of the fine-tuning.
        on_note: Told after each update how its games went.
        generator: Source of all randomness.

    Raises:
        DataError: ``clean`` is too small to hold a quarter out, or ``images`` for a sign.
        MethodError: An argument is out of range.
        ModelError: The network cannot be traced, or the policy cannot be read.

    What is the paper's: a graph per layer of the network, nodes for neurons, edges by the cosine between vectors of l1 norms,
    coupled channels of residual streams that go together, a graph network that learns by reinforcement, little clean data.
    What is not published, and ours: the kind of graph network (GraphSAGE), the algorithm (PPO), features, moves, reward, the
    number of neighbours in place of a threshold, the ranking in the end, and the fine-tuning.
    """
    try:
        from .policy import Policy
        from .ppo import Learner, chances, train
        from .saved import PRETRAINED, WIDEST, load_policy
    except ImportError:
        raise MethodError("onp needs torch_geometric and gymnasium; run: pip install secateur[onp]") from None
    check_range("games", games, 0, 2**31)
    check_range("images", images, 1, 2**31)
    check_range("lr", lr, 1e-12, 1e6)
    recipe = replace(healing(epochs, tuning_lr), precision=precision)
    whole = games + epochs * count_steps(len(clean), recipe.batch_size)
    check_range("width", width, 1, WIDEST)
    check_range("drop", drop, 0, 1)
    check_range("bonus", bonus, 0, 1e6)
    wanted = read_proxies(proxies)
    start = None if policy in ("", "random") else load_policy(PRETRAINED if policy == "pretrained" else policy)
    check_choice("edit", edit, get_args(Edit))
    check_choice("precision", precision, get_args(Precision))
    found = layers(model, clean.shape, degree=degree, residual=residual)
    fitted, judged = holdout(clean, JUDGED, generator=generator)
    drawn = torch.randperm(len(fitted), generator=generator)
    few, more = fitted.subset(drawn[:images]), fitted.subset(drawn[: ACCURATE * images])
    signs, notes = seek(model, fitted, few, wanted, precision=precision, generator=generator)
    ablated = {sign.name: ablations(sign, found, edit) for sign in (clean_errors(model, few), *signs)} if ablate else None
    env = board(clean_errors(model, more), found, signs, ablated=ablated, drop=drop, bonus=bonus, edit=edit)
    with seeded(generator):
        learner = Learner(start or Policy(width=width, rule=policy != "random"), lr=lr)

    def watch(done: int, means: Mapping[str, float]) -> None:
        if on_step is not None:
            on_step(done, whole)
        if on_note is not None:
            on_note(f"{done} of {games} games: {said(means)}")

    history = train(learner, [env], games=games, on_update=watch, generator=generator)
    path, mask, keeps = choose(model, judged, env, chances(env, learner.policy), generator=generator)
    graphs = tuple(picture(layer, keep) for layer, keep in zip(found, keeps, strict=True))
    if not any(graph.cut for graph in graphs):
        why = "no cut that is affordable is worth anything"
        if len(path) > 1:
            why = f"the {len(path) - 1} best cuts cost too much on images kept for this; allow more (drop)"
        notes = (*notes, f"nothing was cut{', and the network only fine-tuned' if epochs else ''}: {why}")
    healed = apply_and_heal(
        model, clean, mask, heal=recipe,
        on_step=None if on_step is None else lambda step, _: on_step(games + step, whole), generator=generator,
    )  # fmt: skip
    return Repaired(
        healed.model,
        mask,
        path,
        log={**healed.log, **_shares(graphs), "evaluations": float(env.evaluations)},
        notes=(*notes, *healed.notes),
        history=tuple(history),
        graphs=graphs,
    )


def _shares(graphs: Sequence[NeuronGraph]) -> dict[str, float]:
    """Return how many neurons were cut; one of a residual stream counts once."""
    gone, all_of_them = sum(len(graph.cut) for graph in graphs), sum(graph.size for graph in graphs)
    return {"removed": float(gone), "removed_share": gone / all_of_them}


def said(means: Mapping[str, float]) -> str:
    """Return how games went, in a few words."""
    return (
        f"reward {means['reward']:.2f}, accuracy {0 - 100 * means['rise']:+.1f}, signs {100 * means['sign']:.0f} %, "
        f"{100 * means['cut']:.1f} % cut"
    )


def read_proxies(proxies: str) -> tuple[str, ...]:
    """Return the proxies that a setting names."""
    if proxies == "none":
        return ()
    names = tuple(proxies.split("+"))
    for name in names:
        check_choice("proxies", name, PROXIES)
    return names


def seek(
    model: nn.Module,
    fitted: ImageSet,
    few: ImageSet,
    wanted: Sequence[str],
    *,
    precision: Precision = "float32",
    generator: torch.Generator,
) -> tuple[list[Sign], tuple[str, ...]]:
    """Return the signs that are wanted, and what was learned on the way."""
    found, notes = [], ()
    for name in wanted:
        if name == "trigger":
            evidence = examine(model, fitted, precision=precision, generator=generator)
            triggers = grown(model, fitted, evidence.smallest, sizes=2, precision=precision, generator=generator)[1::2]
            found.append(triggered(model, few, triggers))
            notes = evidence.notes
        elif name == "unlearned":
            found.append(unlearned(model, few, generator=generator))
        else:
            found.append(noisy(model, few, generator=generator))
    return found, notes


def board(
    error: Sign,
    found: Sequence[Layer],
    signs: Sequence[Sign],
    *,
    ablated: Mapping[str, Sequence[Tensor]] | None = None,
    drop: float,
    bonus: float,
    edit: Edit = "weight",
    goal: Callable[[HardMask], float] | None = None,
) -> Pruning:
    """Return the game of a network: its layers, its error on clean images, and what is to become small (see `Pruning`)."""
    from .env import Pruning

    told = {sign.name: ablated[sign.name] for sign in (error, *signs)} if ablated else {}
    nodes = features(error.base, error.images, found, [error, *signs], told)
    env = Pruning(error.base, found, nodes, error, signs, drop=drop, bonus=bonus, edit=edit, goal=goal)
    env.evaluations += env.neurons if told else 0
    return env


def picture(layer: Layer, keep: Tensor) -> NeuronGraph:
    """Return a layer's graph with what is cut, for the report."""
    edges = tuple((i, j) for i, j in layer.edges.T.tolist() if i < j)
    return NeuronGraph(layer.sites, layer.size, edges, tuple((~keep).nonzero().flatten().tolist()))
