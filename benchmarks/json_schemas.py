"""How many real JSON Schemas an answer can be held to, whether verdicts are right, and how long compiling takes.

Takes a folder of JSON files: schemas, or objects with a `schema` and `tests` (each with `data` and `valid`), as in
maskbench/data of JSONSchemaBench (https://github.com/guidance-ai/jsonschemabench):

    python benchmarks/json_schemas.py maskbench/data --sets Github_easy Github_hard Kubernetes --each 100 --seed 1
"""

import argparse
import json
import random
import time
from collections import Counter, defaultdict
from pathlib import Path

from phi3_mlflow.runtime.errors import InvalidRequest
from phi3_mlflow.runtime.grammar import Grammar, Grammars

TOKENIZER = Path(__file__).parents[1] / "artifacts" / "transformers" / "tokenizer.json"


def chosen(folder: Path, sets: list[str], each: int, seed: int, skip: int) -> list[Path]:
    """Files by the part of their name before `---`, shuffled by the seed: `each` of every set, after `skip` of them."""
    groups = defaultdict(list)
    for path in sorted(folder.rglob("*.json")):
        groups[path.name.partition("---")[0] if "---" in path.name else ""].append(path)
    rng, picked = random.Random(seed), []
    for name in sets or sorted(groups):
        rng.shuffle(groups[name])
        count = min(each, len(groups[name]) // 2) if skip else min(each, len(groups[name]))
        picked += groups[name][count if skip else 0 :][:count]
    return picked


def verdict(grammar: Grammar, document: object, spelled: list[int]) -> bool | None:
    """Whether the document, as compact JSON in its own order, is an answer; None where it could not be followed."""
    matcher = grammar._matcher.deep_copy()
    for byte in json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode():
        matcher.compute_bitmask()
        if matcher.is_error():
            return None
        if not matcher.consume_token(spelled[byte]):
            return False
    return bool(matcher.is_accepting())


def main() -> None:
    """Print acceptance by set, verdicts, times and the commonest refusals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="*", default=[], help="names before `---` in the files' names; all if none")
    parser.add_argument("--each", type=int, default=10**9, help="schemas of each set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--second", action="store_true", help="the sample after the first: half of a set at most")
    parser.add_argument("--refusals", type=int, default=0, help="how many refusals to print")
    given = parser.parse_args()
    text = TOKENIZER.read_text("utf-8")
    vocabulary = json.loads(text)["model"]["vocab"]
    spelled = [vocabulary[f"<0x{byte:02X}>"] for byte in range(256)]
    grammars = Grammars(text, 1 + max(vocabulary.values()), [vocabulary["</s>"]])
    accepted, total, verdicts, refused, times = Counter(), Counter(), Counter(), [], []
    for path in chosen(given.folder, given.sets, given.each, given.seed, int(given.second)):
        content = json.loads(path.read_text("utf-8"))
        tests = content.get("tests", []) if "schema" in content else []
        schema = content.get("schema", content)
        group = path.name.partition("---")[0] if "---" in path.name else "schemas"
        total[group] += 1
        start = time.process_time()
        try:
            grammar = grammars.compile({"type": "json_schema", "json_schema": {"name": "benchmark", "schema": schema}})
        except InvalidRequest as error:
            refused.append((path.name, str(error)))
            continue
        finally:
            times.append(time.process_time() - start)
        accepted[group] += 1
        for test in tests:
            verdicts[test["valid"], verdict(grammar, test["data"], spelled)] += 1
    for group, count in total.items():
        print(f"{group:24} {accepted[group]:5} of {count:5}  {accepted[group] / count:.1%}")
    print(f"{'all':24} {accepted.total():5} of {total.total():5}  {accepted.total() / total.total():.1%}")
    print(f"valid documents: {verdicts[True, True]} pass, {verdicts[True, False]} do not")
    print(f"invalid documents: {verdicts[False, False]} do not pass, {verdicts[False, True]} pass")
    print(f"documents that could not be followed: {verdicts[True, None] + verdicts[False, None]}")
    times.sort()
    print(f"compiling, CPU time: median {times[len(times) // 2] * 1e3:.1f} ms, worst {times[-1] * 1e3:.0f} ms")
    for name, problem in refused[: given.refusals]:
        print(f"{name}: {problem}")


if __name__ == "__main__":
    main()
