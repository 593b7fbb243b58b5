"""PGD-10 on an adversarially trained network: images per second beside foolbox, torchattacks and ART.

    OMP_NUM_THREADS=1 python benchmarks/evasion.py --net FILE [--images 256] [--batch 128] [--repeats 5]

Peers are installed by whoever measures (`pip install foolbox`; torchattacks and adversarial-robustness-toolbox with
`--no-deps`); one that is missing is left out. The network is a ResNet-20 of width 16 on 3 x 32 x 32 images: the embedded
Fashion-MNIST, padded and in three equal channels, so that nothing is needed besides; it is trained against PGD with the
same budget in some minutes and kept in FILE. All take the same images, batches, budget, step size and number of steps, from
random starts, and leave the network in eval mode. Who goes first changes with each repeat; seconds are those of the processor,
medians over the repeats. What is left right is judged by one forward of the network itself.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.attack import pgd
from secateur.data import load_data
from secateur.models import Classifier, build
from secateur.state import generator, seeded
from secateur.types import to_float

EPS, STEPS = 0.1, 10
SIZE = 2.5 * EPS / STEPS
Attack = Callable[[Tensor, Tensor], Tensor]


def images(split: str) -> tuple[Tensor, Tensor]:
    """Return images as float ``(n, 3, 32, 32)`` in [0, 1], and labels."""
    data = load_data(f"fashion-mini:{split}")
    return F.pad(to_float(data.x), (2, 2, 2, 2)).repeat(1, 3, 1, 1), data.y


def network(file: Path, epochs: int) -> Classifier:
    """Return the network in a file, or train one against PGD and write it."""
    with seeded(generator(0)):
        net = build("resnet20", classes=10, width=16)
    model = Classifier(net, classes=tuple("abcdefghij"), input_shape=(3, 32, 32), mean=[0.3] * 3, std=[0.3] * 3)
    if file.exists():
        net.load_state_dict(load_file(file))
        return model.eval()
    x, y = images("train")
    start, random, steps = time.perf_counter(), generator(1), epochs * (len(x) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    model.train()
    for step in range(steps):
        rows = torch.randint(len(x), (64,), generator=random)
        harder = pgd(model, x[rows], y[rows], eps=EPS, steps=2, step_size=EPS, generator=random)
        optimizer.zero_grad()
        F.cross_entropy(model(harder), y[rows]).backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"training: {step} of {steps}, {time.perf_counter() - start:.0f} s", flush=True)
    model.zero_grad()
    save_file(net.state_dict(), file)
    return model.eval()


def ours(model: nn.Module, batch: int, *, drop: bool) -> Attack:
    """Return our PGD."""
    settings = {"eps": EPS, "steps": STEPS, "step_size": SIZE, "batch_size": batch, "drop_broken": drop}
    return lambda x, y: pgd(model, x, y, **settings, generator=generator(0))


def hooked(model: nn.Module) -> nn.Module:
    """Return a network with a hook, which is attacked itself and not as a folded copy."""
    own = copy.deepcopy(model)
    own.register_forward_hook(lambda *_: None)
    return own


def batched(attack: Attack, batch: int) -> Attack:
    """Return an attack that goes batch by batch."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([attack(a, b) for a, b in zip(x.split(batch), y.split(batch), strict=True)])

    return run


def foolbox_pgd(model: nn.Module, batch: int) -> Attack:
    """Return foolbox's PGD."""
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=SIZE, steps=STEPS, random_start=True)
    return batched(lambda x, y: attack(wrapped, x, y, epsilons=EPS)[1], batch)


def torchattacks_pgd(model: nn.Module, batch: int) -> Attack:
    """Return torchattacks' PGD."""
    import torchattacks

    attack = torchattacks.PGD(model, eps=EPS, alpha=SIZE, steps=STEPS, random_start=True)
    return batched(lambda x, y: attack(x, y).detach(), batch)


def art_pgd(model: nn.Module, batch: int) -> Attack:
    """Return ART's PGD."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    wrapped = PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1), device_type="cpu")
    attack = ProjectedGradientDescentPyTorch(
        wrapped, eps=EPS, eps_step=SIZE, max_iter=STEPS, num_random_init=1, batch_size=batch, verbose=False
    )
    return lambda x, y: torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images answered rightly."""
    with torch.inference_mode():
        return float(torch.cat([model(part).argmax(dim=1) for part in x.split(256)]).eq(y).float().mean())


def contestants(model: Classifier, batch: int) -> dict[str, Attack]:
    """Return every attack that can be measured here, each with a network of its own."""
    found: dict[str, Attack] = {}
    for name, make in (("foolbox", foolbox_pgd), ("torchattacks", torchattacks_pgd), ("ART", art_pgd)):
        try:
            found[name] = make(copy.deepcopy(model), batch)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    found["ours, no folded copy"] = ours(hooked(model), batch, drop=False)
    found["ours"] = ours(copy.deepcopy(model), batch, drop=False)
    found["ours, broken images dropped"] = ours(copy.deepcopy(model), batch, drop=True)
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--net", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    model = network(given.net, given.epochs)
    x, y = (part[: given.images] for part in images("test"))
    attacks = contestants(model, given.batch)
    seconds: dict[str, list[float]] = {name: [] for name in attacks}
    left: dict[str, float] = {}
    for repeat in range(given.repeats + 1):  # the first warms up
        order = list(attacks)[repeat % len(attacks) :] + list(attacks)[: repeat % len(attacks)]
        for name in order:
            start = time.process_time()
            found = attacks[name](x, y)
            if repeat:
                seconds[name].append(time.process_time() - start)
            left[name] = right(model, found, y)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min((medians[name] for name in medians if not name.startswith("ours")), default=float("nan"))
    print(f"PGD-{STEPS}, eps {EPS:g}, {given.images} images, batches of {given.batch}, {given.repeats} repeats; ", end="")
    print(f"clean accuracy {100 * right(model, x, y):.1f} %\n\n| who | images/s | seconds | still right | to the best peer |")
    print("|---|---|---|---|---|")
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.2f}-{max(seconds[name]):.2f}"
        print(f"| {name} | {len(x) / median:.0f} | {spread} | {100 * left[name]:.1f} % | {best / median:.2f}x |")


if __name__ == "__main__":
    main()
