"""Ask stock llama.cpp about every attack and write docs/attacks.md; with a folder, write the files there instead."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.attacks.cases import CASES
from tests.attacks.table import PAGE, disagreements, page, stock_verdicts


def main() -> None:
    if len(sys.argv) > 1:
        for name, attack in CASES.items():
            attack.write(Path(sys.argv[1]) / name)
        print(f"{len(CASES)} attacks in {sys.argv[1]}")
        return
    with tempfile.TemporaryDirectory() as folder:
        stock = stock_verdicts(Path(folder))
    PAGE.write_text(page(stock), encoding="utf-8")
    print(f"{len(CASES)} attacks in {PAGE}")
    for line in disagreements(stock):
        print(line)


if __name__ == "__main__":
    main()
