"""A LoRA adapter added to the matrices of a model, in a process of its own: SOURCE ADAPTER DESTINATION."""

import sys
from pathlib import Path

from phi3_mlflow.quantize.process import follow


def main(source: str, adapter: str, destination: str) -> None:
    """Merges, and saves in shards that can be let go one by one."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
    with_adapter = PeftModel.from_pretrained(model, adapter)
    merged = with_adapter.merge_and_unload(safe_merge=True)
    merged.save_pretrained(Path(destination), max_shard_size="1GB")


if __name__ == "__main__":
    follow()
    main(*sys.argv[1:])
