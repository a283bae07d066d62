"""Error messages for what Hydra and OmegaConf reject: the key, what is wrong with its value, and the fix."""

from __future__ import annotations

import difflib
import re
from enum import Enum
from functools import lru_cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from deepseek_exp.config.keys import SECTION_OF, TYPE_WORDS, KeyInfo, is_enum, is_mapping, schema_keys
from deepseek_exp.errors import Problem, show

# Other common names of our keys and values.
KEY_SYNONYMS = {
    "steps": "trainer.max_steps",
    "epochs": "trainer.max_epochs",
    "batch_size": "trainer.global_batch_seqs",
    "learning_rate": "optim.lr",
    "gpus": "cluster.gpus_per_node",
    "context_length": "data.seq_len",
}
VALUE_SYNONYMS = {"gpu": "cuda", "float32": "fp32", "bfloat16": "bf16"}
# Keys of earlier versions, and their replacements.
RENAMED = {
    "trainer.eval_batches": "set trainer.eval_seqs, the sequences of one validation: "
    "trainer.eval_batches times trainer.micro_batch_seqs"
}
MOST_DIGITS = 4300  # the most digits that Python parses as an int


def unparsed(override: str, error: Exception) -> Problem:
    """Return the problem for a command-line argument that is not key=value."""
    key, _, value = override.partition("=")
    if isinstance(error, ValueError):
        fix = f"use a number of fewer than {MOST_DIGITS:,} digits"
        return Problem(key.lstrip("+~"), value, f"cannot be read ({_first_line(error)})", fix)
    fix = "write key=value; quote a value with special characters, as in 'sample.prompt=\"a, b\"'"
    info = schema_keys().get(key.lstrip("+"))
    if info is not None and info.type is str and value and not set(value) & set("'\""):
        fix = f"quote the value: '{key}=\"{value}\"'"
    return Problem("command line", override, "cannot be parsed", fix)


def override_words(parsed: Override, error: Exception, default: DictConfig, options: list[str]) -> Problem:
    """Return the problem for one command-line override.

    Args:
        parsed: the override.
        error: the error raised when composing with it.
        default: the tree without overrides.
        options: options of the group that it names; empty if it names none.
    """
    override, path, value = str(parsed.input_line), str(parsed.key_or_group), parsed.value()
    if parsed.is_sweep_override():
        return Problem(path, parsed.get_value_string(), "has several values without -m", "add -m for a sweep")
    known = schema_keys()
    if options:
        return _option_words(path, value, options, error)
    if path.startswith("hydra."):
        return Problem(path, value, f"cannot be set ({_first_line(error)})", f"leave {path} out")
    if path in known:
        return value_words(override, path, value, known[path], OmegaConf.select(default, path))
    mapping = next((k for k, info in known.items() if is_mapping(info.type) and path.startswith(f"{k}.")), None)
    if mapping is not None:
        return _entry_words(parsed, path, value, known[mapping], error)
    if path in {k.rpartition(".")[0] for k in known} - {""}:
        return Problem(path, value, "is a section, which has keys", f"set its keys, as in {_example(path)}")
    if parsed.package is not None:
        return Problem(f"{path}@{parsed.package}", value, "is not a group", meant(path, f"write {path}={value}"))
    return Problem(path, value, "is not a configuration key", meant(path, "see python run.py --help for all keys"))


def _option_words(path: str, value: Any, options: list[str], error: Exception) -> Problem:
    said = _first_line(error)
    if value in options and path == "recipes" and re.search("Could not find 'recipes/|Key 'recipes'", said):
        rule = "is not in the folders that are searched, since hydra.searchpath names others"
        return Problem(path, value, rule, "use --config-dir=<folder> in place of hydra.searchpath")
    if value in options:
        return Problem(path, value, f"cannot be composed ({said})", "correct that file")
    prefixed = [o for o in options if isinstance(value, str) and value and o.startswith(value)]
    near = prefixed or difflib.get_close_matches(str(value), options, n=1)
    fix = f"use {path}={near[0]}" if near else f"use one of {', '.join(options)}"
    if len(prefixed) > 1:
        fix = f"use one of {', '.join(prefixed)}"
    return Problem(path, value, f"is not an option of the group {path}", fix)


def _entry_words(parsed: Override, path: str, value: Any, info: KeyInfo, error: Exception) -> Problem:
    """Return the problem for an entry of a mapping."""
    override = str(parsed.input_line)
    if parsed.is_delete():
        return Problem(path, None, "is not there to be deleted", f"leave {override} out")
    if not override.startswith("+"):
        return Problem(path, value, "adds an entry, which needs a plus sign", f"write +{override}")
    if info.type == dict[str, str]:
        return Problem(path, value, "is not a text", f"use a text, for example +{path}=x")
    return Problem(path, value, f"cannot be added ({_first_line(error)})", "set another value, or leave it out")


def value_words(override: str, path: str, value: Any, info: KeyInfo, default: Any) -> Problem:
    """Return the problem for a value that the key does not accept."""
    if is_enum(info.type):
        names = [m.value for m in info.type]
        near = [VALUE_SYNONYMS.get(str(value), ""), *difflib.get_close_matches(str(value), names, n=1)]
        near = [name for name in near if name in names]
        fix = f"use {path}={near[0]}" if near else f"use one of {', '.join(names)}"
        return Problem(path, value, f"is not one of {', '.join(names)}", fix)
    if is_mapping(info.type) and isinstance(value, dict):
        return Problem(path, value, "adds entries, which need a plus sign", f"write +{override.lstrip('+')}")
    wanted = TYPE_WORDS.get(info.type, "a mapping" if is_mapping(info.type) else "a list")
    if info.type is float and isinstance(value, int) and not isinstance(value, bool):
        return Problem(path, value, "is beyond the largest number, 1.8e308", "use a smaller number")
    if info.type is str and isinstance(value, list):
        fix = "name one file or folder, a glob such as texts/**/*.txt, or several texts with data=mixture"
        return Problem(path, value, "is a list and not a text", fix if path.startswith("data.") else "use one text")
    example = default.value if isinstance(default, Enum) else default
    if example is None and info.type is str:
        example = "x"
    return Problem(path, value, f"is not {wanted}", f"use {wanted}, for example {path}={show(example)}")


def file_words(error: Exception) -> Problem:
    """Return the problem for an error in the YAML files themselves."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    place = lines[0].split(":")[0] if lines else "conf"
    path = getattr(error.__cause__, "full_key", None)
    rule = f"does not fit the schema ({' '.join(lines[1:3])})" if len(lines) > 1 else "cannot be composed"
    return Problem("conf", place, rule, meant(path, "correct that file") if path else "correct that file")


def meant(path: str, otherwise: str) -> str:
    """Return a suggestion of the key that was meant by a misspelt one, or `otherwise`."""
    if path in RENAMED:
        return RENAMED[path]
    known, leaf = list(schema_keys()), path.rsplit(".", 1)[-1]
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    near = [KEY_SYNONYMS[path]] if path in KEY_SYNONYMS else same_leaf
    near = near or difflib.get_close_matches(path, known + list(SECTION_OF) + [k.split(".")[0] for k in known], n=1)
    if not near:
        leaves = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(leaf, leaves, n=1)]
    return f"did you mean {near[0]}? Otherwise {otherwise}" if near else otherwise


@lru_cache(maxsize=1024)
def parse_one(override: str) -> Override:
    """Parse one override as Hydra does. Every check of a command line asks for each of its overrides."""
    return OverridesParser.create().parse_overrides([override])[0]


def _example(section: str) -> str:
    return next(k for k in schema_keys() if k.startswith(f"{section}.")) + "=..."


def _first_line(error: Exception) -> str:
    """Return the first line of the error's message, plus its cause's if Hydra only names the override."""
    said = str(error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error)
    return next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
