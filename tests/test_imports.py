"""Who may import whom: arrows point down only, and never sideways inside the layers 1 and 3.

One exception: serve/ reads the checkpoints of runs through `READERS`, those files of parallel/ that do no more than
read and write folders. They communicate with nobody and import nothing of what spreads a run over processes.
"""

from __future__ import annotations

import ast

from tests.runs import ROOT

PACKAGE = "deepseek_exp"
LAYER = {
    "errors": 0, "disk": 0, "redact": 0, "streams": 0, "text_files": 0, "topology": 0, "config": 0,
    "layout": 0, "model_rules": 0,
    "validate": 0, "compose": 0, "huggingface": 0,
    "schema": 0, "hydra_rules": 0, "explain": 0, "value_rules": 0, "class_rules": 0,
    "saved_config": 0,
    "kernels": 1, "planner": 1, "data": 1, "tracking": 1,
    "models": 2, "moe": 2,
    "parallel": 3, "compress": 3, "finetune": 3, "serve": 3,
    "finite": 4, "optim": 4, "lit": 4, "lit_stage": 4, "callbacks": 4,
    "commands": 5, "job": 5, "telling": 5, "build": 5, "certificate": 5, "estimate": 5, "do": 5, "sweep": 5,
    "sweep_rest": 5,
    "run": 6, "rank": 6,
}  # fmt: skip
NOT_SIDEWAYS = {1, 3}
READERS = {f"deepseek_exp.parallel.{name}" for name in ("manifest", "files", "shards")}
BELOW = {"config", "disk", "errors", "redact", "text_files", "topology", "layout"}  # what layer 1 knows
LIGHT = {
    "errors",
    "disk",
    "redact",
    "streams",
    "text_files",
    "topology",
    "config",
    "layout",
    "model_rules",
    "validate",
    "compose",
    "schema",
    "hydra_rules",
    "explain",
    "value_rules",
    "class_rules",
    "saved_config",
    "huggingface",
    "planner",
}
HEAVY = {"torch", "pytorch_lightning", "mlflow", "deepspeed", "transformers", "tokenizers", "numpy"}


def room(path) -> str:
    return (
        "run"
        if path.name == "run.py" and path.parent == ROOT
        else path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
    )


def imports(path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            whole = base in (PACKAGE, f"{PACKAGE}.parallel")  # the names are modules
            found += [f"{base}.{alias.name}" for alias in node.names] if whole else [base]
    return found


FILES = [
    ROOT / "run.py",
    *(p for p in (ROOT / PACKAGE).rglob("*.py") if p.parent != ROOT / PACKAGE or p.name != "__init__.py"),
]


def test_arrows_point_down():
    wrong = []
    for path in FILES:
        here = room(path)
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != PACKAGE or len(parts) < 2 or parts[1] == here:
                continue
            there = parts[1]
            if here == "serve" and name in READERS:
                continue
            sideways = LAYER[here] == LAYER[there] and LAYER[here] in NOT_SIDEWAYS
            if LAYER[there] > LAYER[here] or sideways:
                wrong.append(f"{path.relative_to(ROOT)} (layer {LAYER[here]}) imports {name} (layer {LAYER[there]})")
    assert wrong == []


def test_what_serve_reads_checkpoints_with_is_no_more_than_a_reader():
    for name in READERS:
        wrong = [
            other
            for other in imports(ROOT / f"{name.replace('.', '/')}.py")
            if (other.startswith(PACKAGE) and other not in READERS and LAYER[other.split(".")[1]] > 0)
            or other.split(".")[0] in HEAVY - {"torch"}
            or other.startswith("torch.distributed")
        ]
        assert wrong == [], name


def test_layer_1_knows_only_the_configuration():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        if LAYER[room(path)] == 1
        for name in imports(path)
        if name.startswith(f"{PACKAGE}.") and name.split(".")[1] not in BELOW | {room(path)}
    ]
    assert wrong == []


def test_the_light_rooms_import_nothing_heavy():
    wrong = [
        f"{path.name} imports {name}"
        for path in FILES
        if room(path) in LIGHT
        for name in imports(path)
        if name.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_run_py_is_short():
    assert len((ROOT / "run.py").read_text().splitlines()) < 80
