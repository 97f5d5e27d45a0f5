"""Greedy answers of requests that decode together against onnxruntime-genai's, one by one, at full size.

    python benchmarks/full_size.py && python benchmarks/identity.py       two cores: about 2 minutes

Rows that decode together differ from a row alone by rounding. Where the two likeliest tokens are closer than a
tolerance, the other one may be chosen; the first such place of an answer is shown and counted. Ends with 1 where an
answer differs in any other place. (The tests do the same for 200 mixes on the embedded model.)
"""

import sys
import threading
import time
from random import Random

import full_size
from engine import Bench

from phi3_mlflow import machine

# Difference of the two best logits. Measured differences between rows together and alone were up to 0.003 at full size.
TOLERANCE = 0.02


def main() -> None:
    """Compares what the command line says."""
    parser = full_size.options(__doc__)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--parallel", type=int, default=4)
    asked = parser.parse_args()
    random = Random(0)
    genai = Bench(asked.folder, context_length=1024)
    texts = [genai.text(random.randint(5, 90)) for _ in range(asked.requests)]
    options = {"logprobs": True, "top_logprobs": 2}
    alone = [_content(genai.ask(text, asked.tokens, **options)) for text in texts]
    genai.predictor.close()
    batched = Bench(asked.folder, context_length=1024, parallel=asked.parallel)
    together: list[list[dict]] = [[] for _ in texts]

    def ask(index: int) -> None:
        together[index] = _content(batched.ask(texts[index], asked.tokens, **options))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
        time.sleep(random.random())
    for thread in threads:
        thread.join()
    widest = max(rows for _, _, rows in batched.watched.calls)
    batched.predictor.close()
    close, wrong = 0, 0
    for index, (expected, given) in enumerate(zip(alone, together, strict=True)):
        at = next((at for at, pair in enumerate(zip(expected, given, strict=True)) if _differ(*pair)), None)
        if at is not None:
            best, second = (each["logprob"] for each in expected[at]["top_logprobs"])
            close, wrong = (close + 1, wrong) if best - second < TOLERANCE else (close, wrong + 1)
            print(
                f"answer {index} differs at token {at}: {given[at]['token']!r} instead of {expected[at]['token']!r}, "
                f"which was {best - second:.4f} ahead"
            )
    print(f"{machine.line()}; {asked.folder.name}, up to {widest} requests together")
    print(
        f"{len(texts) - close - wrong} of {len(texts)} answers of {asked.tokens} tokens are equal; "
        f"{close} differ where two tokens were closer than {TOLERANCE}, {wrong} elsewhere"
    )
    sys.exit(bool(wrong))


def _content(answer: dict) -> list[dict]:
    return answer["choices"][0]["logprobs"]["content"]


def _differ(expected: dict, given: dict) -> bool:
    return expected["bytes"] != given["bytes"]


if __name__ == "__main__":
    main()
