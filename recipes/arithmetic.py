"""Write two-digit additions as JSONL rows: examples to train on, problems to practise, and problems to validate on.

    python recipes/arithmetic.py outputs/arithmetic 500

writes examples.jsonl (500 rows), practice.jsonl and valid.jsonl (500 rows) into the folder, disjoint and in a fixed
random order. A row is {"prompt": "12+34=", "response": "46", "answer": "46"}.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

N_VALID = 500


def rows() -> list[dict[str, str]]:
    """Return all additions of two two-digit numbers, in a fixed random order."""
    found = []
    for a in range(10, 100):
        for b in range(10, 100):
            found.append({"prompt": f"{a}+{b}=", "response": str(a + b), "answer": str(a + b)})
    random.Random(0).shuffle(found)
    return found


def main() -> None:
    """Write the files."""
    folder, n_examples = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    every = rows()
    splits = {
        "valid": every[:N_VALID],
        "examples": every[N_VALID : N_VALID + n_examples],
        "practice": every[N_VALID + n_examples :],
    }
    for name, part in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
