"""ONNX files: facts as the library itself gives them, paths not followed, claims checked, bombs refused at once."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from secateur.errors import ModelError
from secateur.intake import onnxfile
from secateur.intake.onnxfile import KINDS, looks_like_onnx, read_onnx
from secateur.intake.tensors import TensorInfo

WEIGHTS = np.arange(6, dtype=np.float32).reshape(2, 3)


def make(*tensors: Any, nodes: tuple[Any, ...] = (), **settings: Any) -> Any:
    """Return a model that multiplies its input by ``w`` and holds whatever else is given."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="first"), *nodes],
        "graph",
        [value("x", TensorProto.FLOAT, ["batch", 2]), value("w", TensorProto.FLOAT, [2, 3])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(WEIGHTS, "w"), *tensors],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, producer_name="by hand", ir_version=9, **settings)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Any], onnxfile.OnnxFacts]:
    """(model or bytes) -> what `read_onnx` says of the file."""

    def read_model(model: Any) -> onnxfile.OnnxFacts:
        file = tmp_path / "model.onnx"
        file.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        return read_onnx(file)

    return read_model


def outside(location: str, **more: str) -> Any:
    """Return a tensor of two floats in another file."""
    tensor = TensorProto(name="far", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def nested(depth: int, tensor: Any) -> Any:
    """Return a node with a tensor in the innermost of subgraphs, one in another."""
    node = helper.make_node("Constant", [], ["c"], name="inmost", value=tensor)
    for _ in range(depth):
        graph = helper.make_graph([node], "body", [], [])
        node = helper.make_node("If", ["x"], ["z"], then_branch=graph)
    return node


def test_facts(read):
    model = make(nodes=(helper.make_node("Relu", ["y"], ["z"]), helper.make_node("Relu", ["z"], ["a"])))
    helper.set_model_props(model, {"author": "nobody"})
    found = read(model)
    assert found.facts == {
        "ir_version": 9,
        "producer": "by hand",
        "opsets": {"ai.onnx": 17, "ai.onnx.ml": 3},
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 2]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": None}],
        "nodes": 3,
        "operators": {"Relu": 2, "MatMul": 1},
        "functions": [],
        "custom_domains": [],
        "metadata": ["author"],
        "training": False,
        "external_files": [],
    }
    assert found.tensors == (TensorInfo("w", "float32", (2, 3), 0),)
    assert found.findings == ()
    json.dumps(found.facts)


@pytest.mark.parametrize("kind", [number for number in KINDS if number != TensorProto.STRING])
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_every_type(kind, raw, read):
    """Sizes and NaN of all types, as the library writes them."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    values = np.array([0, 1, 1, 0, 1], dtype)
    tensor = numpy_helper.from_array(values, "t") if raw else helper.make_tensor("t", kind, [5], values)
    found = read(make(tensor)).tensors[1]
    assert (found.dtype, found.shape) == (KINDS[kind][0], (5,))
    floating = "float" in KINDS[kind][0] or "complex" in KINDS[kind][0]
    assert found.nonfinite == (None if floating and KINDS[kind][1] < 8 else 0) or "fnu" in KINDS[kind][0]
    tensor.dims[0] = 13
    with pytest.raises(ModelError, match=r"the tensor 't' must hold [0-9]+ (bytes|values) for its sizes, got"):
        read(make(tensor))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", "complex64", "complex128"])
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_nonfinite_values_are_counted(dtype, raw, read):
    kind = next(number for number, (name, _, _) in KINDS.items() if name == dtype)
    values = np.array([1, math.nan, math.inf, -math.inf, -2]).astype(helper.tensor_dtype_to_np_dtype(kind))
    tensor = numpy_helper.from_array(values, "t") if raw else helper.make_tensor("t", kind, [5], values)
    assert read(make(tensor)).tensors[1].nonfinite == 3


def test_texts_scalars_and_nothing(read):
    texts = helper.make_tensor("texts", TensorProto.STRING, [2], [b"a", b"b"])
    scalar = numpy_helper.from_array(np.float32(3), "scalar")
    nothing = numpy_helper.from_array(np.zeros((0, 4), np.float32), "nothing")
    assert [(t.dtype, t.shape) for t in read(make(texts, scalar, nothing)).tensors[1:]] == [
        ("string", (2,)),
        ("float32", ()),
        ("float32", (0, 4)),
    ]


def test_tensors_of_subgraphs_functions_and_sparse_ones(read):
    tensor = numpy_helper.from_array(np.float32([math.nan]), "inner")
    model = make(nodes=(nested(3, tensor),))
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("s", TensorProto.FLOAT, [1], [2.0]), helper.make_tensor("i", TensorProto.INT64, [1], [3]), [5]
    )
    model.graph.sparse_initializer.append(sparse)
    constant = helper.make_node("Constant", [], ["o"], name="own", value=tensor)
    model.functions.append(helper.make_function("mine", "F", [], ["o"], [constant], [helper.make_opsetid("", 17)]))
    model.graph.node.append(helper.make_node("F", [], ["f"], domain="mine"))
    found = read(model)
    assert {t.name: t.nonfinite for t in found.tensors} == {
        "w": 0,
        "s (values)": 0,
        "s (indices)": 0,
        "own/value": 1,
        "inmost/value": 1,
    }
    assert found.facts["functions"] == ["mine::F"]
    assert found.facts["operators"]["mine::F"] == 1
    assert found.findings == ()  # an operator that the file itself defines is no foreign one


@pytest.mark.parametrize(
    "location",
    [
        *("../far.bin", "/etc/passwd", "a/../../far.bin", "a/..", "..\\far.bin", "\\far.bin", "C:\\far.bin", "C:far.bin"),
        *("file:///etc/passwd", "link.bin", "folder/far.bin", "loop.bin", "//host/far.bin"),
    ],
)
def test_files_outside_are_not_followed(location, tmp_path, read):
    (tmp_path.parent / "far.bin").write_bytes(np.float32([1, math.nan]).tobytes())
    (tmp_path / "link.bin").symlink_to(tmp_path.parent / "far.bin")
    (tmp_path / "folder").symlink_to(tmp_path.parent)
    (tmp_path / "loop.bin").symlink_to("loop.bin")
    for model in (make(outside(location)), make(nodes=(nested(1, outside(location)),))):
        found = read(model)
        if location != "loop.bin":
            [told] = found.findings
            assert (told.rule, told.severity) == ("LOD-009", "high")
            assert found.facts["external_files"] == [{"location": location, "inside": False, "bytes": None}]
        assert found.tensors[-1].nonfinite is None


def test_a_location_without_the_flag_counts_too(read):
    tensor = outside("../far.bin")
    tensor.data_location = TensorProto.DEFAULT
    assert [finding.rule for finding in read(make(tensor)).findings] == ["LOD-009"]


def test_files_inside_are_looked_at(tmp_path, read):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "far.bin").write_bytes(bytes(4) + np.float32([1, math.nan]).tobytes())
    found = read(make(outside("sub/far.bin", offset="4", length="8")))
    assert found.tensors[1] == TensorInfo("far", "float32", (2,), 1)
    assert found.facts["external_files"] == [{"location": "sub/far.bin", "inside": True, "bytes": 12}]
    assert found.findings == ()


def test_a_missing_file_is_stated(read):
    found = read(make(outside("far.bin")))
    assert found.facts["external_files"] == [{"location": "far.bin", "inside": True, "bytes": None}]
    assert found.tensors[1].nonfinite is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"offset": "8"}, "claims more values than 'far.bin' holds"),
        ({"offset": "4", "length": "8"}, "claims more values"),
        ({"length": "4"}, "must hold 8 bytes for its sizes, got 4"),
        ({"offset": "-4"}, "must say in digits"),
        ({"offset": "1e3"}, "must say in digits"),
        ({"location": "sub"}, "regular file"),
        ({"location": ""}, "in which file"),
        ({"location": "a\nb"}, "printable"),
        ({"location": "a\0b"}, "printable"),
    ],
)
def test_wrong_places_are_told(more, message, tmp_path, read):
    (tmp_path / "far.bin").write_bytes(bytes(8))
    (tmp_path / "sub").mkdir()
    with pytest.raises(ModelError, match=message) as told:
        read(make(outside(**{"location": "far.bin", **more})))
    assert "\n" not in str(told.value)


def test_two_locations_are_refused(read):
    tensor = outside("far.bin")
    tensor.external_data.add(key="location", value="../far.bin")
    with pytest.raises(ModelError, match="must say once"):
        read(make(tensor))


def test_files_beside_are_searched_within_a_budget(tmp_path, read, monkeypatch):
    (tmp_path / "far.bin").write_bytes(np.float32([1, math.nan] * 8).tobytes())
    monkeypatch.setattr(onnxfile, "MAX_LOOKED_AT", 16)
    monkeypatch.setattr(onnxfile, "BLOCK", 4)
    assert [t.nonfinite for t in read(make(*[outside("far.bin")] * 3)).tensors] == [0, 1, 1, None]


def tampered(**fields: Any) -> Any:
    tensor = numpy_helper.from_array(WEIGHTS, "bad")
    for name, value in fields.items():
        tensor.ClearField(name)
        if isinstance(value, list):
            getattr(tensor, name).extend(value)
        elif name == "segment":
            tensor.segment.begin = value
        elif value is not None:
            setattr(tensor, name, value)
    return tensor


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (tampered(dims=[2**40, 2**40]), "must hold 4835703278458516698824704 bytes for its sizes, got 24"),
        (tampered(dims=[2, 2]), "must hold 16 bytes for its sizes, got 24"),
        (tampered(dims=[-2, -3]), "each from 0 up"),
        (tampered(dims=[1] * 26), "at most 25 sizes"),
        (tampered(float_data=[1.0]), "values in one place"),
        (tampered(segment=1), "values in one place"),
        (tampered(raw_data=None), "must hold 6 values for its sizes, got 0"),
        (tampered(raw_data=None, int64_data=[1] * 6), "must hold 6 values for its sizes, got 6"),
        (tampered(data_location=1), "values in one place"),
        (tampered(data_type=TensorProto.STRING), "must hold"),
    ],
)
def test_false_claims_are_told(tensor, message, read):
    with pytest.raises(ModelError, match=f"is not a usable ONNX model: the tensor 'bad' .*{message}"):
        read(make(tensor))


def test_unknown_types_are_told(read):
    found = read(make(tampered(data_type=99)))
    assert [finding.rule for finding in found.findings] == ["LOD-010"]
    assert found.tensors[1].dtype == "onnx type 99"


@pytest.mark.parametrize(
    ("domain", "name", "words"),
    [
        ("evil.corp", "Steal", "3 node(s) use the operator 'Steal' of the domain 'evil.corp'"),
        ("ai.onnxx", "Relu", "which is no standard one"),
        ("com.microsoft", "PythonOp", "3 node(s) are 'PythonOp', which runs code that the graph does not show"),
        ("ai.onnx.contrib", "PyOp", "'PyOp'"),
        ("", "PyCustomOp", "'PyCustomOp'"),
        ("com.microsoft", "EPContext", "'EPContext'"),
        ("evil\nline", "Steal\x1b[2J", r"'Steal\\x1b[2J' of the domain 'evil\\nline'"),
    ],
)
def test_foreign_operators_are_told(domain, name, words, read):
    nodes = (*[helper.make_node(name, ["y"], ["z"], domain=domain)] * 2, nested(0, numpy_helper.from_array(WEIGHTS)))
    inner = helper.make_graph([helper.make_node(name, [], ["z"], domain=domain)], "body", [], [])
    [told] = read(make(nodes=(*nodes, helper.make_node("Loop", [], ["z"], body=inner)))).findings
    assert (told.rule, told.severity) == ("LOD-002", "medium")
    assert words in told.message
    assert told.message.isprintable()


def test_standard_operators_are_not_told(read):
    known = [("ai.onnx", "Relu"), ("ai.onnx.ml", "Scaler"), ("com.microsoft", "Gelu"), ("com.microsoft.nchwc", "Conv")]
    assert read(make(nodes=tuple(helper.make_node(name, [], ["z"], domain=domain) for domain, name in known))).findings == ()


@pytest.mark.parametrize(
    "content",
    [
        b"not a model at all",
        b"\x80\x04\x95",
        b"PK\x03\x04" + bytes(40),
        bytes(100),
        b"\x08\x08" + b"\xff" * 200,
        b"\x08\x08\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x10",
        b"\x08\x08",
        b"\x0b\x0c",
    ],
)
def test_other_content_is_told(content, read):
    with pytest.raises(ModelError, match=r"is not a usable ONNX model: its? ") as told:
        read(content)
    assert "\n" not in str(told.value)


def test_missing_empty_and_folders(tmp_path):
    (tmp_path / "empty").touch()
    for name, message in (("none", "found none"), ("", "found a folder"), ("empty", "it has no graph")):
        with pytest.raises(ModelError, match=message):
            read_onnx(tmp_path / name)


def test_cut_files_are_told(read):
    whole = make(numpy_helper.from_array(WEIGHTS, "more")).SerializeToString()
    for end in range(1, len(whole) - 1, 7):
        with pytest.raises(ModelError):
            read(whole[:end])


def field(number: int, content: bytes) -> bytes:
    size, length = bytearray(), len(content)
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + content


def bomb(graph: bytes) -> bytes:
    return b"\x08\x08" + field(7, graph)


def deep(count: int) -> bytes:
    graph = b""
    for _ in range(count):
        graph = field(1, field(5, field(6, graph)))
    return bomb(graph)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(b"\x0a\x00" * 1_500_000), "at most 1000000 fields"),
        (bomb(field(5, b"\x32\x00" * 1_500_000)), "at most 1000000 fields"),
        (deep(40), "nested more than 60 levels deep"),
        (deep(3000), "nested more than 60 levels deep"),
        (deep(17), "nested at most 16 deep"),
    ],
)
def test_bombs_are_refused_before_they_are_built(content, message, read):
    start = time.monotonic()
    with pytest.raises(ModelError, match=message):
        read(content)
    assert time.monotonic() - start < 10


def test_packed_numbers_are_bounded(read, monkeypatch):
    monkeypatch.setattr(onnxfile, "MAX_PACKED", 1000)
    with pytest.raises(ModelError, match=r"at most .* 1000 bytes of packed numbers"):
        read(bomb(field(5, field(7, bytes(1001)))))


def test_names_that_are_no_text(read):
    for graph in (field(1, field(4, b"\xff\xfe")), field(5, field(13, field(2, b"\xc0\x80")))):
        with pytest.raises(ModelError, match="a name in it is not UTF-8"):
            read(bomb(graph))


def test_long_and_odd_names_are_shortened(read):
    model = make(nodes=(helper.make_node("N" * 5000, [], ["z"]),))
    model.producer_name = "a\x1b[31m\u202eb"
    found = read(model)
    assert max(map(len, found.facts["operators"])) < 110
    assert found.facts["producer"].isprintable()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_changed_bytes_give_facts_or_one_line(data, tmp_path):
    content = bytearray(make(outside("far.bin"), nodes=(nested(2, numpy_helper.from_array(WEIGHTS)),)).SerializeToString())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    told = ""
    try:
        told = json.dumps(read_onnx(file).facts)
    except ModelError as error:
        told = str(error)
    assert told
    assert "\n" not in told


def test_the_sniff_knows_models_and_nothing_else():
    models = [make().SerializeToString(), onnx.ModelProto(ir_version=3, graph=onnx.GraphProto(name="g")).SerializeToString()]
    models.append(make(doc_string="two\nlines").SerializeToString())
    for content in models:
        assert looks_like_onnx(content)
        assert looks_like_onnx(content[:64])
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.ones(2)}, zipped)
    torch.save({"w": torch.ones(2)}, legacy, _use_new_zipfile_serialization=False)
    safe = safetensors.numpy.save({"w": WEIGHTS})
    saved_model = b"\x08\x01" + field(2, field(1, b"\x12\x05serve") + bytes(200))
    lengths = [n.to_bytes(8, "little") + b"{" for n in (0x0308, 0x120308, 0x3A0308, 0x42030208)]
    others = [
        zipped.getvalue(),
        legacy.getvalue(),
        safe,
        saved_model,
        *lengths,
        b"",
        b"\x08",
        b"\x08\x08",
        b"\x08text",
        b"hello",
    ]
    assert not any(looks_like_onnx(content[:512]) for content in others)


def test_the_sniff_is_seldom_wrong_about_noise():
    noise = np.random.default_rng(0).integers(0, 256, (20_000, 64), np.uint8)
    noise[:, 0] = 8
    assert sum(looks_like_onnx(row.tobytes()) for row in noise) < 40


def test_no_torch_and_no_onnx_before_they_are_needed(tmp_path):
    (tmp_path / "model.onnx").write_bytes(make().SerializeToString())
    code = (
        "import sys\nfrom pathlib import Path\nfrom secateur.intake.onnxfile import looks_like_onnx, read_onnx\n"
        "assert looks_like_onnx(bytes.fromhex('08081a0131')) and 'onnx' not in sys.modules\n"
        f"read_onnx(Path({str(tmp_path)!r}) / 'model.onnx')\nassert 'torch' not in sys.modules\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'onnx']: del sys.modules[name]\n"
        "sys.modules['onnx'] = None\n"
        f"read_onnx(Path({str(tmp_path)!r}) / 'model.onnx')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith("reading ONNX needs the extra: pip install 'secateur[onnx]'")
