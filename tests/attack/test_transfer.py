"""MI-, DI- and TI-FGSM: their loop against a plain one by hand, any number of channels, and what they are for."""

import pytest
import torch
import torch.nn.functional as F
from attacked_models import accuracy, distance, linear

from secateur.attack import di_fgsm, mi_fgsm, ti_fgsm
from secateur.attack.transfer import blur, even, gaussian, resized
from secateur.errors import MethodError
from secateur.state import generator
from secateur.train import Recipe, train

ATTACKS = pytest.mark.parametrize("attack", [mi_fgsm, di_fgsm, ti_fgsm], ids=["mi", "di", "ti"])


def by_hand(model, x, y, eps, steps, decay, kernel=None):
    """The formulas of the papers, written as they stand there."""
    adv, momentum = x.clone(), torch.zeros_like(x)
    for _ in range(steps):
        adv = adv.detach().requires_grad_()
        [slope] = torch.autograd.grad(F.cross_entropy(model(adv), y, reduction="sum"), [adv])
        if kernel is not None:
            channels = x.shape[1]
            slope = F.conv2d(slope, kernel.expand(channels, 1, *kernel.shape), padding=len(kernel) // 2, groups=channels)
        momentum = decay * momentum + slope / slope.abs().sum(dim=(1, 2, 3), keepdim=True)
        adv = (adv.detach() + eps / steps * momentum.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return adv.detach()


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_momentum_is_that_of_the_paper(decay, hardened):
    x, y = hardened.x[:60], hardened.y[:60]
    expected = by_hand(hardened.model, x, y, 0.1, 5, decay)
    adv = mi_fgsm(hardened.model, x, y, eps=0.1, steps=5, decay=decay, generator=generator(0))
    assert float(((adv - expected).abs() > 1e-6).float().mean()) < 0.002  # signs of slopes that are nearly 0


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_translation_invariance_for_any_channels(channels):
    model = linear(4, channels * 81)
    x = torch.rand(12, channels, 9, 9, generator=generator(1))
    y = model(x).argmax(dim=1)
    side = torch.linspace(-3, 3, 5).square().div(-2).exp()
    kernel = torch.outer(side, side) / side.sum() ** 2
    expected = by_hand(model, x, y, 0.1, 4, 1.0, kernel)
    adv = ti_fgsm(model, x, y, eps=0.1, steps=4, kernel=5, generator=generator(0))
    assert float((adv - expected).abs().max()) < 1e-6
    assert not torch.allclose(adv, mi_fgsm(model, x, y, eps=0.1, steps=4, generator=generator(0)))


def test_blur_of_a_point_is_the_kernel():
    point = torch.zeros(1, 2, 7, 7)
    point[0, 1, 3, 3] = 1
    window = gaussian(5)
    assert float(window.sum()) == pytest.approx(1)
    found = blur(point, window)
    assert torch.allclose(found[0, 1, 1:6, 1:6], torch.outer(window, window))
    assert float(found[0, 0].abs().max()) == 0
    assert torch.equal(gaussian(1), torch.ones(1))


def test_resizing_moves_the_chosen_images_only():
    x = torch.rand(400, 2, 10, 8, generator=generator(0)) + 0.1
    found = resized(x, 0.3, 0.6, generator(5))
    changed = (found != x).flatten(1).any(dim=1)
    assert 0.2 < float(changed.float().mean()) < 0.4
    small = found[changed]
    assert 0.36 <= float((small != 0).float().mean()) < 1
    assert small.shape[1:] == x.shape[1:]
    assert torch.equal(resized(x, 0.0, 0.5, generator(5)), x)
    assert torch.equal(resized(x, 1.0, 1.0, generator(5)), x)


@ATTACKS
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 1.5)])
def test_white_box_success_and_budget(attack, norm, eps, hardened):
    x, y, small = hardened.x[:150], hardened.y[:150], {"kernel": 3} if attack is ti_fgsm else {}
    adv = attack(hardened.model, x, y, eps=eps, norm=norm, **small, generator=generator(0))
    assert float(distance(adv, x, norm).max()) <= eps
    assert 0 <= float(adv.min()) <= float(adv.max()) <= 1
    assert accuracy(hardened.model, adv, y) < accuracy(hardened.model, x, y) - 0.05
    wanted = (y + 1) % 10
    towards = attack(hardened.model, x, wanted, eps=2 * eps, norm=norm, targeted=True, **small, generator=generator(0))
    assert accuracy(hardened.model, towards, wanted) > accuracy(hardened.model, x, wanted) + 0.03


@ATTACKS
def test_they_transfer_to_another_network(attack, trained, tiny, images):
    """From one network to another of other seed, better than noise of the same size."""
    other = train(tiny(7, randomise=False), images, Recipe(epochs=8, lr=0.1, batch_size=40), generator=generator(7))
    x, y = images.x.float() / 255, images.y
    kernel = {"kernel": 3} if attack is ti_fgsm else {}
    adv = attack(trained, x, y, eps=0.2, **kernel, generator=generator(0))
    noise = (x + 0.2 * torch.randn(x.shape, generator=generator(1)).sign()).clamp(0, 1)
    assert accuracy(other, adv, y) < accuracy(other, noise, y) - 0.2


def test_the_settings_compose(hardened):
    x, y = hardened.x[:20], hardened.y[:20]
    settings = {"eps": 0.1, "steps": 3, "generator": generator(0)}
    plain = mi_fgsm(hardened.model, x, y, **settings)
    assert torch.equal(ti_fgsm(hardened.model, x, y, kernel=1, **settings), plain)
    assert torch.equal(di_fgsm(hardened.model, x, y, diversity=0.0, **settings), plain)
    both = ti_fgsm(hardened.model, x, y, kernel=5, diversity=1.0, eps=0.1, steps=3, generator=generator(0))
    assert not torch.equal(both, ti_fgsm(hardened.model, x, y, kernel=5, **settings))


def test_even_slopes_count_alike():
    slope = torch.randn(4, 2, 3, 3, generator=generator(0)) * torch.tensor([1e-25, 1.0, 1e20, 0])[:, None, None, None]
    assert even(slope).abs().mean(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1, 1, 0], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": 4}, r"kernel must be odd, got 4; use 3 or 5"),
        ({"decay": -1.0}, r"decay must lie in \[0, 1000000\], got -1"),
        ({"diversity": 1.5}, r"diversity must lie in \[0, 1\], got 1.5"),
        ({"smallest": 0.0}, r"smallest must lie in \[1e-06, 1\], got 0"),
        ({"steps": 0}, r"steps must lie in \[1, 2147483648\], got 0"),
    ],
)
def test_bad_settings(settings, message, hardened):
    with pytest.raises(MethodError, match=message):
        ti_fgsm(hardened.model, hardened.x[:2], hardened.y[:2], **settings, generator=generator(0))
