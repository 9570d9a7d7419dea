"""Who may import whom: the rules that keep the package's parts apart, checked on the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from helpers.source_tree import (
    PACKAGE,
    ROOT,
    all_imports,
    assert_none,
    attribute_lines,
    beside,
    circles,
    folder_of,
    imports,
    imports_of_tree,
    is_under,
    modules,
    own_modules,
    part_of,
    tree,
    violations,
)

# A part may import the parts of lower layers only.
LAYERS = (
    ("errors", "types", "logprob_memory"),
    ("files", "user_functions"),
    ("config",),
    ("algorithms", "ops", "batching", "planner", "rewards"),
    ("data",),
    ("observability", "model"),
    ("report", "distributed", "rollout"),
    ("trainer", "weight_sync"),
    ("evaluation",),
    ("testtime", "run", "viewer"),
    ("loop", "benchmarks"),
    ("cli",),
    ("__main__",),
)

FREE_OF_TORCH = ("config", "rewards", "data")
FREE_OF_DISTRIBUTED = (
    "types",
    "config",
    "algorithms",
    "data",
    "rewards",
    "batching",
    "evaluation",
    "rollout",
)
FREE_OF_MEGATRON = (*FREE_OF_DISTRIBUTED, "observability")

# What upstream does not promise to keep -> the modules that name it. Each says which versions were read.
UPSTREAM = {
    "megatron.core.models": ("model.policy_model", "model.megatron_patches"),
    "megatron.core.transformer.transformer_block": ("model.policy_model",),
    "megatron.core.dist_checkpointing": ("trainer.checkpoint.torch_dist",),
    "torch.distributed.checkpoint": ("trainer.checkpoint.torch_dist",),
    "megatron.core.optimizer.optimizer": ("trainer.optimizer_state",),
    "megatron.core.optimizer.distrib_optimizer": ("trainer.optimizer_state",),
}


def test_every_part_has_a_layer() -> None:
    known = {part for layer in LAYERS for part in layer} | {""}
    unknown = sorted({part_of(name) for name in modules()} - known)
    assert not unknown, f"no layer for {unknown}: add them to LAYERS, as low as their imports allow"


def test_parts_import_only_lower_layers() -> None:
    layer_of = {part: index for index, layer in enumerate(LAYERS) for part in layer}
    found = []
    for module, item in all_imports():
        source = part_of(module)
        for name in own_modules(item.target):
            target = part_of(name)
            if target in ("", source) or source not in layer_of or target not in layer_of:
                continue
            if layer_of[target] >= layer_of[source]:
                found.append(f"{item}, but {source} may not import {target}")
    assert_none(sorted(set(found)), "imports go from upper to lower layers only (LAYERS in this file)")


def test_no_imports_go_in_a_circle() -> None:
    """Those inside functions and under TYPE_CHECKING count, and of packages on the way what their __init__ imports."""
    graph = {
        module: {
            name
            for item in imports(module)
            for name in own_modules(item.target)
            if name not in (PACKAGE, module) and not is_under(module, name)
        }
        for module in modules()
    }
    assert_none([" -> ".join(circle) for circle in circles(graph)], "modules that import each other")


def test_no_module_imports_the_names_of_a_package_that_it_lies_in() -> None:
    """The package's __init__ imports the module: a circle, though Python puts up with it inside a function."""
    found = [
        str(item)
        for module, item in all_imports()
        for parent in [item.target.rpartition(".")[0]]
        if item.target not in modules()
        and parent in modules()
        and parent != PACKAGE  # whose __init__ imports nothing
        if modules()[parent].name == "__init__.py" and is_under(module, parent) and module != parent
    ]
    assert_none(found, "import from the module that defines the name, not from the package around it")


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {file.parent for file in modules().values()}
    assert_none(
        sorted(str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()),
        "these need an __init__.py with a docstring that says what is in them",
    )


def test_no_folders_side_by_side_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for module, item in all_imports():
        for name in own_modules(item.target)[-1:]:
            source, target = beside(folder_of(module), folder_of(name))
            if source != target:
                graph.setdefault(source, set()).add(target)
                graph.setdefault(target, set())
    assert_none([" -> ".join(circle) for circle in circles(graph)], "folders that import each other")


def test_a_circle_is_found_wherever_it_begins() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"d", "b"}, "d": set(), "e": {"a"}}
    assert circles(graph) == [["b", "c", "b"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_rollout_and_trainer_never_reach_each_other() -> None:
    found = violations(("rollout",), f"{PACKAGE}.trainer") + violations(("rollout",), f"{PACKAGE}.model")
    found += violations(("trainer", "model"), f"{PACKAGE}.rollout")
    assert_none(found, "rollout must not import trainer or model, nor these rollout")


def test_config_rewards_and_data_are_free_of_torch() -> None:
    found = violations(FREE_OF_TORCH, "torch") + violations(("config", "rewards"), "transformers")
    found += [
        str(item)
        for module, item in all_imports()
        if part_of(module) == "data" and is_under(item.target, "transformers")
        # A model's tokenizer is loaded by transformers, when it is asked for.
        if item.at_import_time or module != f"{PACKAGE}.data.tokenizer"
    ]
    assert_none(found, f"{', '.join(FREE_OF_TORCH)} must not import torch (nor transformers, which does)")


def test_importing_config_rewards_and_data_leaves_torch_out() -> None:
    names = ", ".join(f"{PACKAGE}.{part}" for part in FREE_OF_TORCH)
    script = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"import {names} loads torch, or fails:\n{done.stderr}"


def test_a_grading_worker_starts_without_the_settings() -> None:
    """Their schema takes most of a second to import; each pool starts workers, and after each failure another one."""
    found = [
        str(item)
        for module, item in all_imports()
        if part_of(module) == "rewards" and item.at_import_time and is_under(item.target, f"{PACKAGE}.config")
    ]
    assert_none(found, "rewards may import config where types are checked, not where a worker starts")


def test_parts_that_run_without_megatron_do_not_import_it() -> None:
    assert_none(violations(FREE_OF_MEGATRON, "megatron"), "these parts must not import Megatron")


def test_parts_that_run_in_one_process_do_not_import_torch_distributed() -> None:
    found = violations(FREE_OF_DISTRIBUTED, "torch.distributed")
    found += [
        f"{modules()[name].relative_to(ROOT)}:{line} names torch.distributed"
        for name in modules()
        if part_of(name) in FREE_OF_DISTRIBUTED
        for line in attribute_lines(tree(modules()[name]), "torch.distributed")
    ]
    assert_none(found, "these parts must not use torch.distributed")


@pytest.mark.parametrize("target", UPSTREAM)
def test_what_upstream_may_change_is_named_in_one_module(target: str) -> None:
    homes = {f"{PACKAGE}.{name}" for name in UPSTREAM[target]}
    found = [
        str(item) for module, item in all_imports() if is_under(item.target, target) and module not in homes
    ]
    found += [
        f"{file.relative_to(ROOT)}:{line} names {target}"
        for module, file in modules().items()
        if module not in homes
        for line in attribute_lines(tree(file), target)
    ]
    assert_none(found, f"{target} is used through {', '.join(sorted(homes))} only")
    for name in homes:
        assert any(is_under(item.target, target) for item in imports(name))
        assert re.search(
            r"[Rr]ead in\s(Megatron-Core )?0\.", ast.get_docstring(tree(modules()[name])) or ""
        ), f"{name} does not say which versions of {target} were read"


def test_sglang_is_never_imported() -> None:
    found = [str(item) for _, item in all_imports() if is_under(item.target, "sglang")]
    assert_none(found, "SGLang runs as a child process in an environment of its own")


def test_torch_cuda_is_named_only_in_the_platform_module() -> None:
    def may(module: str) -> bool:
        # GPU kernels need streams and device properties.
        return module in (f"{PACKAGE}.model.platform", f"{PACKAGE}.ops.device") or module.startswith(
            (f"{PACKAGE}.ops.triton", f"{PACKAGE}.ops.cuda")
        )

    found = [
        f"{file.relative_to(ROOT)}:{line} names torch.cuda"
        for module, file in modules().items()
        if not may(module)
        for line in attribute_lines(tree(file), "torch.cuda")
    ]
    found += [
        str(item) for module, item in all_imports() if is_under(item.target, "torch.cuda") and not may(module)
    ]
    assert_none(found, "ask megatron_laser.model.platform instead")


def test_runs_with_servers_load_no_model_classes_of_transformers() -> None:
    """They pull in every optional package that transformers knows, and fail where one of them is too old."""
    found = [
        str(item)
        for module, item in all_imports()
        if item.at_import_time
        and part_of(module) in ("evaluation", "testtime", "run", "loop", "cli")
        and (
            is_under(item.target, f"{PACKAGE}.rollout.in_process")
            or item.target.startswith("transformers.AutoModel")
        )
    ]
    assert_none(found, "import the in-process engine where it is opened")


@pytest.mark.parametrize(
    ("code", "target", "at_import_time"),
    [
        ("import torch.cuda", "torch.cuda", True),
        ("from torch import cuda", "torch.cuda", True),
        ("def f():\n    import megatron.core", "megatron.core", False),
        ("if TYPE_CHECKING:\n    from torch import Tensor", "torch.Tensor", False),
        ("try:\n    import sglang\nexcept ImportError:\n    sglang = None", "sglang", True),
        ("from . import errors", "megatron_laser.config.errors", True),
        ("from ..trainer import trainer", "megatron_laser.trainer.trainer", True),
        ("importlib.import_module('megatron.core')", "megatron.core", True),
    ],
)
def test_every_way_to_import_is_seen(code: str, target: str, at_import_time: bool) -> None:
    file = ROOT / PACKAGE / "config" / "example.py"
    found = imports_of_tree(ast.parse(code), file, f"{PACKAGE}.config.example")
    assert [(item.target, item.at_import_time) for item in found] == [(target, at_import_time)]
