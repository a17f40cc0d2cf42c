#!/usr/bin/env python3
"""Makes the golden checkpoints and logits of the reference executor: small random models of each architecture, and what
transformers computes from them in float32.

    python make_goldens.py [--out engine/tests/goldens]

Needs torch and transformers (`compare_torch.sh --install` makes a virtual environment with both). The results are committed: the tests
that read them need neither.
"""

import argparse
import json
import pathlib
import shutil

import torch
import transformers
from safetensors.torch import save_file

PROMPTS = [1, 17, 80]  # tokens: the least, less than a tile of keys, more than one


def models():
    """Name, configuration, dtype of the weights, and what to rewrite in config.json."""
    common = dict(num_hidden_layers=2, vocab_size=88, max_position_embeddings=256, bos_token_id=1, eos_token_id=2)
    llama, qwen2, qwen3 = transformers.LlamaConfig, transformers.Qwen2Config, transformers.Qwen3Config
    yield "llama-f32", llama(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=10000.0), **common,
    ), torch.float32, {}
    # More head columns than hidden ones, several shards, the older spelling of the rotary base.
    yield "llama-bf16-sharded", llama(
        hidden_size=80, intermediate_size=136, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=500000.0), **common,
    ), torch.bfloat16, dict(rope_parameters=None, rope_theta=500000.0, rope_scaling=None)
    yield "llama-f16-attention-bias-tied", llama(
        hidden_size=80, intermediate_size=72, num_attention_heads=5, num_key_value_heads=1, attention_bias=True,
        tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0), **common,
    ), torch.float16, {}
    yield "qwen2-bf16-tied", qwen2(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0), **common,
    ), torch.bfloat16, {}
    # Heads wider than one panel of keys, and no multiple of 16 lanes.
    yield "qwen3-bf16", qwen3(
        hidden_size=48, intermediate_size=72, num_attention_heads=2, num_key_value_heads=1, head_dim=72,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0), **common,
    ), torch.bfloat16, {}
    yield "qwen3-f32-tied", qwen3(
        hidden_size=32, intermediate_size=64, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
        tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0), **common,
    ), torch.float32, {}


def randomize(model, generator):
    """Weights of a size that keeps activations near 1, norms and biases that are not trivial."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.data = 1 + 0.2 * noise
        elif name.endswith("bias"):
            parameter.data = 0.3 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            parameter.data = 0.5 * noise
        else:
            parameter.data = 1.5 * noise / parameter.shape[1] ** 0.5


def make(name, config, dtype, rewrite, out, generator):
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, generator)
    model.tie_weights()
    model.to(dtype)
    model.save_pretrained(folder, max_shard_size="100KB" if "sharded" in name else "1GB")
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    fields.update(rewrite)
    fields = {key: value for key, value in fields.items() if key not in ("transformers_version",)}
    if rewrite:
        fields.pop("rope_parameters")
    path.write_text(json.dumps(fields, indent=1) + "\n")
    # From disk: casting the model in memory would leave its rotary frequencies rounded to the weights' dtype.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    tensors = {}
    for i, count in enumerate(PROMPTS):
        tokens = torch.randint(0, config.vocab_size, (1, count), generator=generator)
        with torch.no_grad():
            logits = model(tokens).logits[0]
        tensors[f"tokens.{i}"] = tokens[0].to(torch.int32)
        tensors[f"logits.{i}"] = logits.contiguous()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    save_file(tensors, folder / "golden.safetensors", metadata=versions)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size} bytes, largest logit {max(t.abs().max().item() for k, t in tensors.items() if 'logits' in k):.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parents[1] / "tests" / "goldens")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(20)
    for name, config, dtype, rewrite in models():
        make(name, config, dtype, rewrite, arguments.out, generator)


if __name__ == "__main__":
    main()
