"""Which models there are: those whose whole code is in transformers and in onnxruntime-genai's model builder."""

# The model_type of config.json, which genai_config.json has too, and the class of transformers.
MODELS = {
    "phi3": "Phi3ForCausalLM",
    "phi": "PhiForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
