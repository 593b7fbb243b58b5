"""ONNX files: the float one answers as the network, the QDQ one as its twin, in whole numbers."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.attack import bpda, pgd, square
from secateur.compress import Runtime, agreement, export_onnx, kernels, quantise, runtime, safe_weight_bits, saturates
from secateur.compress.runtime import Agreement
from secateur.errors import ModelError
from secateur.measure import evaluate, wilson
from secateur.models import Classifier, build, wrap
from secateur.prune import Fraction, apply_mask, magnitude, select
from secateur.state import generator, seeded
from secateur.types import ImageSet, to_float

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
FEW = {"classes": 10}
NETWORKS = {
    "badnet": {"width": 2},
    "lenet5": {"width": 3},
    "mobilenet_v1": {"width": 0.25, **FEW},
    "mobilenet_v2": {"width": 0.25, **FEW},
    "preact_resnet18": {"width": 2},
    "resnet18_imagenet": {"width": 2},
    "resnet20": {"width": 4},
    "resnet_cifar": {"depth": 8, "width": 4, "option": "B"},
    "small_vgg": {"width": 4},
    "squeezenet": {"width": 0.25, **FEW},
    "vgg11_bn": {"width": 2},
    "vgg11_bn_imagenet": {"width": 1},
    "vit": {"dim": 32, "depth": 2, "heads": 1, "hidden": 64, "patch": 8},
    "wrn": {"depth": 10, "width": 2},
}
WITHOUT = {
    "vit": "'transpose' .transpose. has no translation",
    "vgg11_bn_imagenet": "'avgpool' pools .1, 1. to .7, 7. by windows of several sizes",
}


def random_classifier(name):
    with seeded(generator(0)):
        net = build(name, **NETWORKS[name])
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.5)
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    labels = [str(i) for i in range(10)]
    return Classifier(net, classes=labels, input_shape=(3, 32, 32), mean=[0.4, 0.5, 0.6], std=[0.3, 0.2, 0.3]).eval()


@pytest.fixture(scope="module")
def twin(trained, images):
    return quantise(trained, images, weight_bits=safe_weight_bits()[0])


@pytest.fixture(scope="module")
def int8(twin, tmp_path_factory):
    return export_onnx(twin, tmp_path_factory.mktemp("onnx") / "int8.onnx").path


@pytest.mark.parametrize("name", NETWORKS)
def test_every_architecture_answers_alike(name, tmp_path):
    model = random_classifier(name)
    x = torch.randint(0, 256, (8, *model.input_shape), dtype=torch.uint8, generator=generator(1))
    data = ImageSet(x, torch.zeros(8, dtype=torch.int64), model.classes)
    quantised = quantise(model, data, weight_bits=safe_weight_bits()[0])
    if name in WITHOUT:
        with pytest.raises(ModelError, match=WITHOUT[name]):
            export_onnx(model, tmp_path / "float.onnx")
        return
    for network, path, near in ((model, tmp_path / "float.onnx", 1e-5), (quantised, tmp_path / "int8.onnx", 0.02)):
        export_onnx(network, path)
        with torch.no_grad():
            wanted = network(to_float(x))
        found = Runtime(path)(to_float(x))
        spread = float(wanted.amax() - wanted.amin())
        assert float((found - wanted).abs().mean()) < near * spread
    count = kernels(tmp_path / "int8.onnx")
    assert count["QLinearConv"] >= 1
    assert not set(count) & {"Conv", "FusedConv", "Gemm", "FusedGemm"}
    whole_ = [t for t in onnx.load(tmp_path / "int8.onnx").graph.initializer if t.name.rpartition("_")[0].endswith(".weight")]
    assert {t.data_type for t in whole_} == {onnx.TensorProto.INT8}


def test_the_runtime_stands_beside_its_twin(twin, int8, bars):
    test = bars(120, 3)
    found = agreement(twin, Runtime(int8), test)
    assert found.holds
    assert abs(found.twin.value - found.runtime.value) <= 0.005
    assert found.twin == evaluate(twin, test).accuracy
    assert "same answer" in str(found)
    other = agreement(twin, quantise_wrongly(twin), test)
    assert not other.holds
    assert not Agreement(wilson(98, 100), found.twin, found.runtime).holds


def quantise_wrongly(twin):
    wrong = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(144, 3)), classes=twin.classes, input_shape=(1, 12, 12))
    return wrong.eval()


def test_pruned_weights_are_zero_in_the_file(trained, images, tmp_path):
    mask = select(magnitude.l1(trained, images, generator=generator(0)), Fraction(0.5), scope="global")
    export_onnx(quantise(apply_mask(trained, mask), images), tmp_path / "a.onnx")
    tensors = {
        t.name.rpartition("_")[0]: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "a.onnx").graph.initializer
    }
    for name, keep in mask.keep.items():
        assert not tensors[name][~keep.numpy()].any()
        assert tensors[name].any()


def test_batches_of_any_size_or_of_one(twin, images, tmp_path):
    x = to_float(images.x[:5])
    export_onnx(twin, tmp_path / "any.onnx")
    export_onnx(twin, tmp_path / "two.onnx", batch=2)
    free, fixed = Runtime(tmp_path / "any.onnx"), Runtime(tmp_path / "two.onnx")
    assert (free.batch, fixed.batch) == (None, 2)
    assert fixed(x).shape == (5, 3)
    assert torch.equal(free(x), fixed(x))
    assert torch.equal(free(x), free(x))
    with pytest.raises(ModelError, match="cannot take images of shape"):
        free(x[:, :, :5])


def test_attacks_on_the_runtime(twin, int8, images):
    x, y, network = to_float(images.x[:40]), images.y[:40], Runtime(int8)
    with pytest.raises(ModelError, match="passes no gradient"):
        pgd(network, x, y, eps=0.2, steps=2, generator=generator(0))
    broken = pgd(network, x, y, eps=0.2, steps=5, forward=bpda(twin), generator=generator(0))
    assert float((network(broken).argmax(dim=1) == y).double().mean()) < 0.7
    assert square(network, x, y, eps=0.2, queries=5, generator=generator(0)).shape == x.shape


def test_a_norm_that_flips_or_silences_channels_and_biases_beyond_32_bits(trained, images, tmp_path):
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model.net.bn1.weight[0] *= -1
        model.net.bn2.weight[1] = 0
        model.net.conv3.weight[2] *= 1e-12
        model.net.bn3.running_var[2] = 1e-5
        model.net.conv2.weight[3] = 0
    quantised = quantise(model, images)
    made = export_onnx(quantised, tmp_path / "a.onnx")
    with torch.no_grad():
        wanted = quantised(to_float(images.x[:20]))
    assert torch.allclose(Runtime(made.path)(to_float(images.x[:20])), wanted, atol=0.05 * float(wanted.abs().amax()))
    assert any("coarser weights" in note for note in made.notes)


def dead_rows(trained):
    """A filter of zeros under a norm whose variance has gone, as fine-tuning after pruning leaves it; a norm's weight of 0."""
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model.net.conv2.weight[3] = 0
        model.net.bn2.running_mean[3], model.net.bn2.running_var[3] = 0, 5e-8
        model.net.bn2.weight[3], model.net.bn2.bias[3] = 1.2, 0.418
        model.net.bn2.weight[5], model.net.bn2.bias[5] = 0, 1e-3
    return model


def test_filters_of_zeros_keep_their_biases(trained, images, tmp_path):
    model, x = dead_rows(trained), to_float(images.x[:30])
    quantised = quantise(model, images, weight_bits=7)
    bias = model.net.bn2.bias.detach()
    assert torch.equal(quantised.net.bn2.bias[[3, 5]], bias[[3, 5]])
    without = copy.deepcopy(model)
    with torch.no_grad():
        without.net.bn2.bias[3] = 0
        wanted, found, lost = (network(x) for network in (model, quantised, without))
    assert float((found - wanted).abs().mean()) < 0.5 * float((lost - wanted).abs().mean())
    made = export_onnx(quantised, tmp_path / "a.onnx")
    assert not made.notes
    assert torch.allclose(Runtime(made.path)(x), found, atol=0.01 * float(found.abs().amax()))
    graph = onnx.load(made.path).graph
    [names] = [node.input for node in graph.node if node.input and node.input[0].startswith("conv2.bias")]
    values = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in graph.initializer}
    kept = values[names[0]].double() * values[names[1]].double()
    assert torch.allclose(kept[[3, 5]].float(), bias[[3, 5]], rtol=2e-6)


class Ending(nn.Module):
    """A linear layer, and what a test does to its logits."""

    def __init__(self, end):
        super().__init__()
        self.linear, self.end = nn.Linear(4, 2), end

    def forward(self, x):
        return self.end(self.linear(x.flatten(1)))


def ending(end):
    with seeded(generator(0)):
        return Classifier(Ending(end), classes="ab", input_shape=(1, 2, 2)).eval()


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (
            lambda y: torch.add(y, y * y, alpha=3.0),
            r"'add' \(add\) must have two arguments, .*got 2 by place and alpha by name",
        ),
        (lambda y: torch.sub(y, y * y, alpha=2), r"\(sub\) must have two arguments, .*alpha by name"),
        (lambda y: torch.div(y, 0.01, rounding_mode="floor"), r"\(div\) must have two arguments, .*rounding_mode by name"),
        (lambda y: torch.mul(y, other=2.0), r"\(mul\) must have two arguments, .*got 1 by place and other by name"),
        (lambda y: torch.add(input=y, other=y), r"'add' \(add\) must be given its input by place"),
        (lambda y: torch.relu(input=y), r"'relu' \(relu\) must be given its input by place"),
    ],
)
def test_arguments_that_would_be_lost_are_refused(end, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        export_onnx(ending(end), tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_operations_of_two(tmp_path):
    def end(y):
        return F.pad(torch.cat(tensors=[torch.add(y, 3.0) / 2 - y, 1.5 * y], dim=1), pad=(1, 0))

    model, x = ending(end), torch.rand(3, 1, 2, 2, generator=generator(0))
    export_onnx(model, tmp_path / "a.onnx")
    assert torch.allclose(Runtime(tmp_path / "a.onnx")(x), model(x).detach(), atol=1e-6)


def test_a_layer_that_reads_no_feature_map_is_not_exported_in_whole_numbers(tmp_path):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.first, self.last = nn.Parameter(torch.ones(1, 4)), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(x.flatten(1)) + self.first(self.rows)

    with seeded(generator(0)):
        model = Classifier(Constant(), classes="ab", input_shape=(1, 2, 2)).eval()
    x = torch.rand(3, 1, 2, 2, generator=generator(0))
    quantised = quantise(model, ImageSet((255 * x).to(torch.uint8), torch.zeros(3, dtype=torch.int64), model.classes))
    assert torch.equal(quantised.net.first.bias, model.net.first.bias)
    assert not torch.equal(quantised.net.last.bias, model.net.last.bias)
    with pytest.raises(ModelError, match="'first' reads what is not rounded"):
        export_onnx(quantised, tmp_path / "a.onnx")


def test_what_cannot_be_exported(trained, twin, images, tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"
    with pytest.raises(ModelError, match="feature maps of 8 bits, got 6"):
        export_onnx(quantise(trained, images, bits=6), path)
    assert export_onnx(quantise(trained, images, weight_bits=4), path).kind == "int8"
    with pytest.raises(ModelError, match="overwrite it on purpose"):
        export_onnx(trained, path)
    with pytest.raises(ModelError, match="take them off first"):
        export_onnx(wrap(twin, [{"after": "bn1", "kind": "round", "decimals": 1}]), tmp_path / "b.onnx")
    path.write_bytes(b"no ONNX")
    with pytest.raises(ModelError, match="cannot load"):
        Runtime(path)
    with pytest.raises(ModelError, match="must be a file, found none"):
        Runtime(tmp_path / "none.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"pip install 'secateur\[onnx\]'"):
        Runtime(path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModelError, match=r"pip install 'secateur\[onnx\]'"):
        export_onnx(trained, tmp_path / "b.onnx")


@pytest.mark.parametrize(
    ("machine", "flags", "wanted", "bits"),
    [
        ("x86_64", "flags\t\t: fpu avx2 avx512f avx512_vnni", False, 8),
        ("x86_64", "flags : fpu avx_vnni", False, 8),
        ("AMD64", "flags : fpu avx2 avx512f", True, 7),
        ("x86_64", "model name : x", None, 7),
        ("x86_64", None, None, 7),
        ("aarch64", None, False, 8),
        ("", None, None, 7),
    ],
)
def test_what_the_processor_can(machine, flags, wanted, bits, tmp_path, monkeypatch):
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n", "utf-8")
    monkeypatch.setattr(runtime, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(runtime.platform, "machine", lambda: machine)
    assert saturates() is wanted
    assert safe_weight_bits()[0] == bits
