"""The plan of the code: who may import whom, how large things are, what is written only once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pytest

from .source import (
    Source,
    calls,
    functions,
    imports,
    package_modules,
    private_definitions,
    private_uses,
    scripts_and_tests,
)

MODULES = package_modules()

# Without mini/ and app/, which stand on their own. A larger number needs a reason that is as large.
MAX_MODULES = 92
MAX_LINES = 16500
MAX_MODULE_LINES = 320
MAX_FUNCTION_LINES = 60

TORCH = "torch numpy detectron2"


class Rule(NamedTuple):
    """What modules may import when they run; imports under ``TYPE_CHECKING`` are free.

    Attributes:
        modules: names inside the package; "data" stands for all of ``data/``. The first rule with a
            name of a module, or of a folder that it is in, is the rule of that module.
        may_import: names inside the package, in the same way. A module may always import itself.
        libraries: what it may import besides the standard library; None if anything.
    """

    modules: str
    may_import: str
    libraries: str | None = None


CONTRACTS = "modeling.interfaces modeling.prompts"

RULES = (
    # The root: every other module may stand on these.
    Rule("files config safe_loading stopping", ""),
    Rule("arrays logits", "", "torch numpy"),
    Rule("model_zoo", "config"),
    Rule("journal hub", "files"),
    Rule("checkpoint", "files safe_loading modeling.interfaces modeling.regionspot"),
    # What a part is, and the arithmetic between the parts: torch and Detectron2's structures only.
    Rule("modeling.prompts modeling.lazy_masks modeling.frozen modeling.compiling", "", TORCH),
    Rule("modeling.interfaces", f"{CONTRACTS} modeling.frozen modeling.compiling", TORCH),
    Rule("modeling.questions", f"arrays {CONTRACTS}", TORCH),
    Rule("modeling.inputs", f"logits {CONTRACTS}", TORCH),
    Rule("modeling.views", "", TORCH),
    Rule("modeling.precision", "", "torch"),
    Rule("modeling.encoded", f"{CONTRACTS} modeling.precision modeling.views", TORCH),
    Rule("modeling.answers", f"{CONTRACTS} modeling.encoded modeling.views", TORCH),
    # Vocabularies: what their names are, what they are compared by, what a score of one is.
    Rule("modeling.names", "", "numpy"),
    Rule("modeling.members", "arrays modeling.names", TORCH),
    Rule("modeling.words", "modeling.members modeling.names", TORCH),
    Rule("modeling.word_files", "safe_loading modeling.members modeling.words", "yaml"),
    Rule(
        "modeling.scoring",
        "modeling.members modeling.names modeling.words modeling.word_files",
        TORCH,
    ),
    Rule("modeling.naming", "modeling.lazy_masks modeling.members modeling.scoring", TORCH),
    Rule("modeling.region_head", CONTRACTS, f"{TORCH} fvcore"),
    Rule("modeling.baselines", f"{CONTRACTS} modeling.region_head", TORCH),
    Rule(
        "modeling.vocabulary",
        f"files {CONTRACTS} modeling.members modeling.names modeling.words",
        f"{TORCH} safetensors tqdm",
    ),
    # The model joins the parts; it works inside and around other detectors.
    Rule(
        "modeling.regionspot",
        f"files arrays {CONTRACTS} modeling.answers modeling.compiling modeling.encoded "
        "modeling.inputs modeling.naming modeling.precision modeling.region_head modeling.scoring "
        "modeling.views modeling.vocabulary modeling.words",
    ),
    # Regions that nobody asked for.
    Rule("modeling.grouping", "modeling.encoded modeling.views", TORCH),
    Rule(
        "modeling.everything",
        f"arrays {CONTRACTS} modeling.answers modeling.encoded modeling.naming modeling.grouping "
        "modeling.automatic_masks modeling.questions modeling.scoring modeling.words",
        TORCH,
    ),
    Rule(
        "modeling.panoptic",
        "modeling.everything modeling.inputs modeling.regionspot modeling.vocabulary",
        TORCH,
    ),
    Rule(
        "modeling.detectors",
        f"arrays {CONTRACTS} modeling.inputs modeling.naming modeling.regionspot "
        "modeling.vocabulary modeling.words",
    ),
    Rule("modeling.__init__", "modeling"),
    # Localizers, vision-language models and what they are made of, each with its library.
    Rule("modeling.open_clip_entries", "files hub safe_loading"),
    Rule(
        "modeling",
        f"files {CONTRACTS} modeling.sam modeling.sam_attention modeling.mask_tokens "
        "modeling.square modeling.sam_kinds modeling.precision modeling.image_towers "
        "modeling.open_clip_entries",
    ),
    # Data and evaluation know nothing of models. Extraction runs the localizer that it is given.
    Rule("data.token_extraction", f"files stopping data {CONTRACTS} modeling.precision"),
    Rule("data", "files arrays logits safe_loading journal stopping data"),
    Rule("evaluation", "files safe_loading data evaluation"),
    # What runs them all.
    Rule(
        "engine",
        "files safe_loading stopping config checkpoint model_zoo modeling data evaluation engine",
    ),
    Rule(
        "pretrained",
        "files checkpoint hub config safe_loading model_zoo modeling.interfaces modeling.members "
        "modeling.word_files engine.config",
    ),
    # Embeddings of regions in files.
    Rule("vector_files", "files", "torch safetensors"),
    Rule(
        "region_index", "arrays modeling.precision modeling.questions vector_files", "torch faiss"
    ),
    Rule("exemplars", "data.images vector_files", "torch"),
    Rule("calibration", "files safe_loading modeling.scoring"),
    Rule("image_session", "data.images modeling"),
    Rule(
        "predictor",
        "files calibration checkpoint data.images image_session modeling pretrained renaming",
    ),
    Rule("renaming", "", "numpy"),
    # Detectors find regions; the model names them.
    Rule(
        "detection",
        "files checkpoint data.proposal_sources engine.config modeling.names detection",
    ),
    Rule(
        "app",
        "files logits safe_loading stopping config checkpoint model_zoo journal predictor "
        "pretrained region_index vector_files exemplars modeling data engine detection app",
    ),
    # The embedded default: nobody but the package itself, which registers it, imports it.
    Rule("mini", f"files data.datasets {CONTRACTS} modeling.region_head modeling.sam mini"),
    Rule("__init__", "config data mini modeling predictor"),
)

# Scripts and tests, which use the package and are not part of it.
OUTSIDE = {"demo", "tests", "tools", "train_net", "integrations"}


def covers(names: str, module: str) -> bool:
    """Whether one of the names is the module or a folder that it is in."""
    return any(module == name or module.startswith(f"{name}.") for name in names.split())


def broken_rules(modules: Iterable[Source]) -> Iterator[str]:
    for module in modules:
        rule = next((rule for rule in RULES if covers(rule.modules, module.name)), None)
        if rule is None:
            yield f"{module.name} has no rule"
            continue
        own, others = imports(module)
        for name in sorted(own):
            if not covers(f"{rule.may_import} {module.name}", name):
                yield f"{module.name} imports {name}"
        for name in sorted(others - sys.stdlib_module_names):
            if name in OUTSIDE or (
                rule.libraries is not None and name not in rule.libraries.split()
            ):
                yield f"{module.name} imports {name}"


def test_modules_import_only_what_their_rule_admits() -> None:
    broken = list(broken_rules(MODULES))
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("name", "line", "found"),
    [
        ("data.new", "from ..modeling.sam import SamLocalizer", "modeling.sam"),
        ("data.new", "def f():\n    from regionspot_d2 import modeling", "modeling"),
        ("data.new", "import regionspot_d2.modeling.sam as s", "modeling.sam"),
        ("data.datasets.new", "from ... import predictor", "predictor"),
        ("evaluation.new", "from ..engine import build_optimizer", "engine"),
        ("modeling.naming", "from .sam import SamLocalizer", "modeling.sam"),
        ("modeling.naming", "import open_clip", "open_clip"),
        ("modeling.sam", "from .regionspot import RegionSpot", "modeling.regionspot"),
        ("modeling.new", "from . import detectors", "modeling.detectors"),
        ("predictor", "from .data.build import build_test_loader", "data.build"),
        ("engine.new", "from regionspot_d2.mini import known_vocabulary", "mini"),
        ("engine.new", "from .. import app", "app"),
        ("files", "from tools import check_datasets", "tools"),
    ],
)
def test_a_broken_rule_is_found(name: str, line: str, found: str) -> None:
    assert list(broken_rules([Source(name, line)])) == [f"{name} imports {found}"]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("data.token_extraction", "from ..modeling.interfaces import Localizer"),
        ("data.new", "if TYPE_CHECKING:\n    from ..modeling.interfaces import Localizer"),
        ("modeling.naming", "import math\nimport torch.nn.functional as F"),
        ("predictor", "from .data.images import read_image\nfrom PIL import Image"),
        ("data.datasets.new", "from .lvis import register_lvis\nfrom ... import files"),
    ],
)
def test_what_a_rule_admits_is_not_reported(name: str, line: str) -> None:
    assert list(broken_rules([Source(name, line)])) == []


def test_a_module_without_a_rule_is_found() -> None:
    assert list(broken_rules([Source("utils", "")])) == ["utils has no rule"]


def test_size_of_the_package() -> None:
    counted = [module for module in MODULES if not covers("mini app", module.name)]
    modules, lines = len(counted), sum(len(module.text.splitlines()) for module in counted)
    assert modules <= MAX_MODULES and lines <= MAX_LINES, f"{modules} modules, {lines} lines"


def test_size_of_modules() -> None:
    lines = {module.name: len(module.text.splitlines()) for module in MODULES}
    assert {name: n for name, n in lines.items() if n > MAX_MODULE_LINES} == {}


def test_size_of_functions() -> None:
    lines = dict(function for module in MODULES for function in functions(module))
    assert {name: n for name, n in lines.items() if n > MAX_FUNCTION_LINES} == {}


def test_the_docstring_of_a_function_is_not_counted() -> None:
    text = 'def f(\n    a,\n):\n    """One.\n\n    Two.\n    """\n    return a\n'
    assert list(functions(Source("new", text))) == [("new.f", 4)]


# Where hasattr and getattr are allowed, and why no interface can replace them.
LOOKED_AT = {
    "modeling.image_towers": "open_clip's image towers have no common interface",
    "modeling.clip": "torch's layers have no common name for their number of heads",
    "modeling.transformers_sam": "a decoder of transformers is borrowed for a call, whole",
}


def test_what_a_part_can_do_is_declared_by_its_interface() -> None:
    models = [m for m in MODULES if covers("modeling predictor app engine", m.name)]
    found = {m.name: list(calls(m, "hasattr", "getattr")) for m in models}
    assert {name: uses for name, uses in found.items() if uses and name not in LOOKED_AT} == {}


# Where there is a softmax, and over what.
SOFTMAX = {
    "modeling.scoring": "the vocabulary: the score of a name",
    "modeling.mask_tokens": "the image, in SAM's attention",
    "mini": "the classes of ImageNet",
}


def test_softmax_over_a_vocabulary_is_written_once() -> None:
    found = [m.name for m in MODULES if any(calls(m, "softmax", "log_softmax", "Softmax"))]
    assert [name for name in found if not covers(" ".join(SOFTMAX), name)] == []
    scoring = next(m for m in MODULES if m.name == "modeling.scoring")
    assert len(list(calls(scoring, "softmax"))) == 1


# Where ``Instances`` are made, and of what.
INSTANCES = {
    "modeling.naming": "results",
    "modeling.automatic_masks": "regions without names",
    "modeling.detectors": "proposals before they are named, copies of a detector's results",
    "data.mapper": "ground truth",
}


def test_results_are_made_in_one_place() -> None:
    assert {m.name for m in MODULES if any(calls(m, "Instances"))} <= set(INSTANCES)


def test_scripts_and_tests_use_only_public_members() -> None:
    private = set().union(*map(private_definitions, MODULES))
    found = [use for file in scripts_and_tests() for use in private_uses(file, private)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "from regionspot_d2.modeling.sam import _shape",
        "from regionspot_d2 import _data",
        "predictor._shape()",
        "make()._shape",
        'monkeypatch.setattr(module, "_shape", 1)',
        'monkeypatch.setattr("regionspot_d2.modeling.sam._shape", 1)',
    ],
)
def test_a_private_member_in_use_is_found(line: str) -> None:
    assert len(list(private_uses(Source("tests/new.py", line), {"_shape"}))) == 1


@pytest.mark.parametrize("line", ["self._shape", "_shape = 1\nmodel._shape", "factory._CONFIGS"])
def test_private_members_of_others_are_not_reported(line: str) -> None:
    assert list(private_uses(Source("tests/new.py", line), {"_shape"})) == []
