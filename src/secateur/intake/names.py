"""What to think of a global that a pickle names.

Nothing here is ever imported: the lists only decide what is worth telling, and what is reason to refuse a file. Of the
standard library everything is dangerous that is not listed as harmless, because nearly any module of it can be bent into
running code (``timeit``, ``pdb``, ``logging.config``, ``idlelib``, ...).
"""

from __future__ import annotations

import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from .findings import Finding
from .pickles import HIDDEN, Name

Verdict = Literal["expected", "harmless", "unknown", "dangerous"]
RULE: Mapping[Verdict, str] = {"dangerous": "LOD-001", "unknown": "LOD-002", "harmless": "LOD-003"}
MAX_FINDINGS = 200


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


STORAGES = _names(
    "DoubleStorage FloatStorage HalfStorage BFloat16Storage LongStorage IntStorage ShortStorage CharStorage ByteStorage "
    "BoolStorage ComplexFloatStorage ComplexDoubleStorage QInt8Storage QUInt8Storage QInt32Storage"
)
# What tensors are made of: not worth a word.
EXPECTED: Mapping[str, frozenset[str]] = {
    "collections": _names("OrderedDict"),
    "torch.cuda": STORAGES,
    "torch": STORAGES
    | _names(
        "Size Tensor device float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex32 "
        "complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz qint8 quint8 qint32 strided"
    ),
    "torch.storage": _names("UntypedStorage TypedStorage _load_from_bytes"),
    "torch.nn.parameter": _names("Parameter Buffer UninitializedParameter UninitializedBuffer"),
    "torch.serialization": _names("_get_layout"),
    "torch._tensor": _names("_rebuild_from_type_v2"),
    "torch._utils": _names(
        "_rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter _rebuild_parameter_with_state "
        "_rebuild_sparse_tensor _rebuild_qtensor _rebuild_meta_tensor_no_storage _rebuild_device_tensor_from_numpy "
        "_rebuild_device_tensor_from_cpu_tensor _rebuild_nested_tensor _rebuild_wrapper_subclass"
    ),
}
HARMLESS: Mapping[str, frozenset[str]] = {
    "builtins": _names("bool bytearray bytes complex dict float frozenset int list object range set slice str tuple"),
    "collections": _names("Counter defaultdict deque"),
    "argparse": _names("Namespace"),
    "types": _names("SimpleNamespace"),
    "pathlib": _names("Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath"),
    "pathlib._local": _names("Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath"),
    "datetime": _names("date datetime time timedelta timezone"),
    "decimal": _names("Decimal"),
    "fractions": _names("Fraction"),
    "uuid": _names("UUID"),
    "enum": _names("Enum IntEnum"),
    "logging": _names("getLogger"),
    "copyreg": _names("_reconstructor __newobj__"),
    "_codecs": _names("encode"),
    "numpy": _names("dtype ndarray"),
    "numpy.core.multiarray": _names("_reconstruct scalar"),
    "numpy._core.multiarray": _names("_reconstruct scalar"),
    "numpy.core.numeric": _names("_frombuffer"),
    "numpy._core.numeric": _names("_frombuffer"),
    "torch": _names("relu sigmoid tanh softmax flatten sin cos exp abs"),
    "torch.nn.functional": _names(
        "relu relu6 gelu silu elu selu celu leaky_relu softmax log_softmax hardswish hardtanh hardsigmoid mish softplus "
        "sigmoid tanh logsigmoid softsign tanhshrink glu prelu threshold interpolate max_pool2d avg_pool2d dropout "
        "adaptive_avg_pool2d adaptive_max_pool2d cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss normalize pad linear"
    ),
    "torch.autograd.variable": _names("Variable"),
}
# Packages whose classes a pickled network or its training state is made of.
HARMLESS_WITHIN = (
    *(
        "torch.nn.modules",
        "torch.nn.parallel",
        "torch.optim",
        "torchvision.models",
        "torchvision.ops",
        "torchvision.transforms",
    ),
    *("timm.models", "timm.layers", "numpy.dtypes", "easydict", "yacs.config", "omegaconf", "addict"),
    "secateur.models",
)
DANGEROUS_WITHIN = (
    *(
        "torch.hub",
        "torch.jit",
        "torch.serialization",
        "torch.package",
        "torch.utils",
        "torch.fx",
        "torch.export",
        "torch.onnx",
    ),
    *("torch.distributed", "torch.multiprocessing", "torch.testing", "torch.library", "torch.ops", "torch.classes", "torch._C"),
    *("torch._dynamo", "torch._inductor", "torch._ops", "torch._classes", "torch._jit_internal", "torch._functorch"),
    *("torch._export", "torch._library", "torch._higher_order_ops", "torch._numpy", "torch._subclasses"),
    *("numpy.testing", "numpy.f2py", "numpy.distutils", "numpy.ctypeslib", "numpy.lib"),
    *("pip", "setuptools", "pkg_resources", "wheel", "virtualenv", "conda", "pytest", "_pytest", "nose", "_distutils_hack"),
    *("dill", "cloudpickle", "joblib", "pathos", "multiprocess", "jsonpickle", "pandas", "sympy", "IPython", "ipykernel"),
    *("requests", "urllib3", "aiohttp", "httpx", "paramiko", "fabric", "invoke", "sh", "pexpect", "plumbum", "psutil"),
    *("cffi", "Cython", "numba", "jinja2", "mako", "werkzeug", "flask", "django", "tornado", "twisted", "gevent", "yaml"),
    *("tensorflow", "keras", "mlflow", "fsspec", "huggingface_hub", "boto3", "botocore", "pydash", "secateur", "fickling"),
)
# Modules of other versions and systems than the one this runs on; `sys.stdlib_module_names` has the rest.
OTHER_PYTHONS = _names(
    "__builtin__ commands copy_reg cPickle popen2 os2 posix nt ntpath ce riscos asyncore asynchat smtpd imp lib2to3 distutils "
    "pipes telnetlib nntplib crypt spwd cgi cgitb xdrlib sndhdr urllib2 httplib Queue thread UserDict exceptions _winreg "
    "winreg _winapi msvcrt StringIO cStringIO md5 sets test Tkinter tkinter SocketServer BaseHTTPServer SimpleHTTPServer "
    "CGIHTTPServer xmlrpclib ConfigParser dummy_thread dummy_threading formatter parser symbol binhex _bootlocale _pyrepl "
    "_xxsubinterpreters _xxinterpchannels _interpreters _interpchannels _interpqueues _remote_debugging xxlimited xxsubtype "
    "_testcapi _testinternalcapi _testlimitedcapi _testclinic _testbuffer _testmultiphase _testimportmultiple _xxtestfuzz "
    "_testexternalinspection"
)
PYTHON2_NAMES = {name.partition(".")[0] for name in (*IMPORT_MAPPING, *(module for module, _ in NAME_MAPPING))}
STANDARD_LIBRARY = sys.stdlib_module_names | OTHER_PYTHONS | PYTHON2_NAMES
# In these packages what is on no list and no class is taken for dangerous: they hand on whole modules of the standard library.
LARGE_PACKAGES = frozenset({"torch", "numpy", "torchvision", "timm", "torchaudio", "transformers", "scipy", "sklearn"})
# Classes of other packages that run something, when one of these hands them on.
DANGEROUS_CLASSES = _names(
    "Popen CDLL PyDLL OleDLL WinDLL Process Pool ThreadPool Thread Timer ThreadPoolExecutor ProcessPoolExecutor Unpickler "
    "InteractiveInterpreter InteractiveConsole FunctionType LambdaType CodeType MethodType ModuleType SourceFileLoader Loader "
    "NamedTemporaryFile TemporaryFile TemporaryDirectory FileIO ZipFile TarFile Environment Template Pdb Trace Profile Request "
    "OpenerDirector Server SMTP FTP ServerProxy Repo PackageImporter PackageExporter PyTorchFileReader"
)
PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def judge(name: Name) -> Verdict:
    """Return what to think of one global."""
    if name == HIDDEN:
        return "dangerous"
    module = PYTHON2.get(name.module, name.module)
    if name.name in EXPECTED.get(module, ()):
        return "expected"
    if name.name in HARMLESS.get(module, ()):
        return "harmless"
    path = name.name.split(".")
    plain_class = len(path) == 1 and name.name.isidentifier() and name.name[0].isupper()
    if path[-1] in DANGEROUS_CLASSES and module.partition(".")[0] in LARGE_PACKAGES:
        return "dangerous"
    if plain_class and _within(module, HARMLESS_WITHIN):
        return "harmless"
    top = module.partition(".")[0]
    if top in STANDARD_LIBRARY or not top or _within(module, DANGEROUS_WITHIN):
        return "dangerous"
    if len(path) > 1 and not all(part[:1].isupper() for part in path):  # not a class in a class, but a walk through modules
        return "dangerous"
    if name.name.startswith("__") or (top in LARGE_PACKAGES and not name.name[:1].isupper()):
        return "dangerous"
    return "unknown"


def _within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def findings(names: Mapping[Name, tuple[Any, ...] | None], where: str = "") -> list[Finding]:
    """Return a finding for every global that is worth one, the worst first, at most `MAX_FINDINGS`.

    Args:
        names: Globals, with what they were called with.
        where: Part of the file that they stand in.
    """
    verdicts: dict[Name, Verdict] = {name: judge(name) for name in names}
    found = [Finding(RULE[v], _tell(name, names[name]), where) for name, v in verdicts.items() if v != "expected"]
    found.sort(key=lambda finding: finding.rule)
    if len(found) > MAX_FINDINGS:
        rest = Finding(found[MAX_FINDINGS].rule, f"names {len(found) - MAX_FINDINGS} more objects of this kind or below", where)
        found[MAX_FINDINGS:] = [rest]
    return found


def _tell(name: Name, given: tuple[Any, ...] | None) -> str:
    if given is None or judge(name) != "dangerous":
        return f"names {show(name)}"
    shown = ", ".join(map(_argument, given[:3])) + (", ..." if len(given) > 3 else "")
    return f"calls {show(name)}({shown})"


def _argument(value: Any) -> str:
    """Return an argument of a call as short printable text; what is large or nested is left out."""
    if isinstance(value, Name):
        return show(value)
    if isinstance(value, str | bytes):
        return ascii(value[:80]) + ("..." if len(value) > 80 else "")
    return ascii(value)[:80] if isinstance(value, bool | float | None) or (type(value) is int and abs(value) < 2**64) else "..."


def show(name: Name) -> str:
    """Return a global as one short printable text."""
    if name == HIDDEN:
        return "a global that is computed while the pickle is read"
    text = str(Name(PYTHON2.get(name.module, name.module), name.name))
    return ascii(text if len(text) <= 100 else text[:100] + "...")[1:-1]
