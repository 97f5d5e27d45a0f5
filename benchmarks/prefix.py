"""The first token of a prompt whose beginning was seen before, against one that is new: at full size, in alternation.

python benchmarks/full_size.py && python benchmarks/prefix.py       two cores: about 3 minutes
"""

from collections import defaultdict
from statistics import median

import full_size
from engine import Bench

from phi3_mlflow import machine


def main() -> None:
    """Measures what the command line says."""
    parser = full_size.options(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="alternations; the table has the medians")
    parser.add_argument("--prefix", type=int, default=400, help="tokens that the prompts share")
    parser.add_argument("--new", type=int, default=16, help="tokens that they do not share")
    asked = parser.parse_args()
    benches = {"genai": Bench(asked.folder, context_length=2048)}
    benches["batched"] = Bench(asked.folder, context_length=2048, parallel=8)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for index in range(asked.rounds):
        print(f"round {index + 1} of {asked.rounds}", flush=True)
        for name, bench in benches.items():
            shared = bench.text(asked.prefix)
            for case in ("new", "seen"):
                found[name, case].append(bench.first_token(shared + bench.text(asked.new)))
    print(f"\n{machine.line()}; {asked.folder.name}, medians of {asked.rounds} alternations\n")
    print(
        f"| first token, {asked.prefix} + {asked.new} tokens | all new | {asked.prefix} seen before | aim | measured |"
    )
    print("|---|---:|---:|---:|---:|")
    for name in benches:
        new, seen = median(found[name, "new"]), median(found[name, "seen"])
        print(f"| {name} | {new:.2f} s | {seen:.2f} s | at most 0.1 | {seen / new:.3f} |")


if __name__ == "__main__":
    main()
