"""What is thought of globals: tensors are made of expected ones, ways to run code are dangerous, the rest is told."""

from __future__ import annotations

import sys

import pytest
import torch

from secateur.intake import names
from secateur.intake.findings import RULES, SEVERITIES, Finding, at_least
from secateur.intake.names import EXPECTED, HARMLESS, findings, judge, show
from secateur.intake.pickles import HIDDEN, Name

DANGEROUS = """
    os.system posix.system nt.system subprocess.Popen builtins.eval builtins.exec builtins.getattr builtins.__import__
    builtins.open builtins.compile builtins.input builtins.breakpoint builtins.type builtins.setattr __builtin__.eval
    __builtin__.apply operator.attrgetter operator.methodcaller functools.partial functools.reduce
    importlib.import_module runpy.run_path pty.spawn ctypes.CDLL socket.create_connection urllib.request.urlopen
    shutil.rmtree sys.exit pickle.loads _pickle.loads marshal.loads types.FunctionType types.CodeType code.interact
    codeop.compile_command pdb.run bdb.Bdb timeit.timeit cProfile.run profile.run trace.Trace doctest.debug_script
    webbrowser.open asyncio.create_subprocess_shell multiprocessing.util.spawnv_passfds logging.config.dictConfig
    logging.config._resolve idlelib.pyshell.ModifiedInterpreter.runcommand lib2to3.pgen2.pgen.ParserGenerator
    distutils.file_util.write_file ensurepip._run_pip venv.create site.main zipimport.zipimporter imp.load_source
    _io.open io.open io.FileIO tempfile.mktemp pathlib.os.system http.server.test smtplib.SMTP ftplib.FTP
    telnetlib.Telnet xmlrpc.client.ServerProxy torch.load torch.hub.load torch.jit.load torch.serialization.load
    torch.utils.cpp_extension.load torch.package.PackageImporter torch.fx.graph_module.reduce_graph_module
    torch.ops.load_library torch.classes.load_library torch._dynamo.optimize
    torch.utils.bottleneck.__main__.run_cprofile torch.utils.collect_env.run torch.utils._config_module.load_config
    torch.multiprocessing.spawn torch._inductor.codecache.compile_file torch.distributed.rpc.rpc_sync
    torch.testing._internal.x
    numpy.testing._private.utils.runstring numpy.f2py.crackfortran.getlincoef numpy.f2py.compile numpy.load
    numpy.distutils.exec_command pip.main pip._internal.main setuptools.Distribution pkg_resources.run_script
    dill._dill._create_function cloudpickle.cloudpickle._make_function joblib.load pandas.read_pickle
    sympy.parsing.sympy_parser.parse_expr IPython.start_ipython requests.get aiohttp.ClientSession yaml.load
    __main__.__builtins__ unknown.package.__class__ os.path.os.system torch.nn.Module.__init__ .system
"""
UNKNOWN = """
    __main__.Net __mp_main__.Net models.resnet.ResNet my_project.models.Outer.Inner utils.helper wrn.WideResNet
    transformers.models.vit.ViTModel sklearn.svm.SVC torch.something.Layer
    torchvision.datasets.folder.ImageFolder timm.data.config.Mean
"""
PARTS = """
    torch.nn.modules.conv.Conv2d torch.nn.modules.container.Sequential torch.optim.sgd.SGD torchvision.models.resnet.ResNet
    timm.models.resnet.BasicBlock argparse.Namespace collections.defaultdict numpy.core.multiarray.scalar builtins.set
    __builtin__.set copy_reg._reconstructor torch.nn.parallel.data_parallel.DataParallel torch.nn.functional.relu
"""


@pytest.mark.parametrize("text", DANGEROUS.split())
def test_ways_to_run_code_are_dangerous(text):
    module, _, name = text.rpartition(".")
    assert judge(Name(module, name)) == "dangerous"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.nn.functional", "torch.hub.load"),
        ("torch.nn.modules.module", "functools.partial"),
        ("pathlib", "os.system"),
        ("models", "Net.__init__.__globals__"),
        ("collections", "OrderedDict.__class__"),
        ("argparse", "Namespace.__init__.__globals__"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch.nn.modules.module", "os"),
        ("torch.autograd.profiler_util", "attrgetter"),
        ("torch.cuda.memory", "pickle"),
        ("torch.cuda._memory_viz", "format_flamegraph"),
        ("torch._utils", "_import_dotted_name"),
        ("torchvision._internally_replaced_utils", "load_state_dict_from_url"),
        ("torch.nn.modules.module", "Popen"),
        ("SimpleXMLRPCServer", "resolve_dotted_attribute"),
        ("anydbm", "open"),
    ],
)
def test_walks_from_module_to_module_are_dangerous(module, name):
    assert judge(Name(module, name)) == "dangerous"


def test_hidden_names_are_dangerous():
    assert judge(HIDDEN) == "dangerous"
    assert judge(Name("", "x")) == "dangerous"


def test_the_standard_library_is_dangerous_unless_listed():
    for module in sys.stdlib_module_names:
        assert judge(Name(module, "anything")) == "dangerous"
        assert judge(Name(f"{module}.inner", "Thing")) == "dangerous"


@pytest.mark.parametrize("text", UNKNOWN.split())
def test_other_peoples_code_is_unknown(text):
    module, _, name = text.rpartition(".")
    assert judge(Name(module, name)) == "unknown"


def test_nested_classes_are_unknown_and_not_dangerous():
    assert judge(Name("models", "Outer.Inner")) == "unknown"


@pytest.mark.parametrize("text", PARTS.split())
def test_parts_of_networks_are_harmless(text):
    module, _, name = text.rpartition(".")
    assert judge(Name(module, name)) == "harmless"


def test_what_tensors_are_made_of_is_expected():
    state = {"w": torch.nn.Parameter(torch.rand(2))}
    assert judge(Name("torch._utils", "_rebuild_tensor_v2")) == "expected"
    assert judge(Name("collections", "OrderedDict")) == "expected"
    assert judge(Name("torch", "FloatStorage")) == "expected"
    assert state["w"].dtype == torch.float32


def test_lists_do_not_contradict_each_other():
    both = {(module, name) for module, found in EXPECTED.items() for name in found}
    assert not both & {(module, name) for module, found in HARMLESS.items() for name in found}
    for module, found in HARMLESS.items():
        assert not found & {"eval", "exec", "getattr", "open", "compile", "__import__", "partial", "system", "load"}, module


def test_findings_come_worst_first_and_bounded(monkeypatch):
    told = findings(dict.fromkeys([Name("argparse", "Namespace"), Name("a", "B"), Name("os", "system"), Name("torch", "Size")]))
    assert [finding.rule for finding in told] == ["LOD-001", "LOD-002", "LOD-003"]
    assert told[0].message == "names os.system"
    monkeypatch.setattr(names, "MAX_FINDINGS", 2)
    told = findings(dict.fromkeys(Name("a", f"B{i}") for i in range(10)))
    assert len(told) == 3
    assert "8 more" in told[-1].message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("touch x\n",), r"calls os.system('touch x\n')"),
        (("x" * 100, 1, None), f"calls os.system('{'x' * 80}'..., 1, None)"),
        ((Name("os", "popen"), [1], 2, 3), "calls os.system(os.popen, ..., 2, ...)"),
        ((10**5000, b"\xff"), r"calls os.system(..., b'\xff')"),
        (None, "names os.system"),
    ],
)
def test_calls_are_shown_with_what_they_are_given(given, message):
    assert findings({Name("os", "system"): given})[0].message == message


def test_names_are_shown_on_one_printable_line():
    assert show(Name("a\nb", "\x1b[31mc" + "d" * 500)).isprintable()
    assert len(show(Name("a", "d" * 500))) < 200
    assert "computed" in show(HIDDEN)


def test_severities():
    assert at_least("critical", "high")
    assert not at_least("medium", "high")
    assert {rule.severity for rule in RULES.values()} <= set(SEVERITIES)
    assert Finding("LOD-001", "x").record() == {"rule": "LOD-001", "severity": "critical", "message": "x", "where": ""}
