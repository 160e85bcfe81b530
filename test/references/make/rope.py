"""Inverse frequencies of every rope scaling that a Llama config.json may name, by transformers.

    python make/rope.py --out rope.json
"""
import argparse
import json
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "default": (None, [10]),
    "linear": ({"rope_type": "linear", "factor": 2.5}, [10]),
    "linear-old-name": ({"type": "linear", "factor": 4.0}, [10]),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, [10, 256, 257, 1000]),
    "yarn": (YARN, [10]),
    "yarn-betas": ({**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}, [10]),
    "yarn-mscale": ({**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}, [10]),
    "yarn-no-truncate": ({**YARN, "truncate": False}, [10]),
    "longrope": ({"rope_type": "longrope", "original_max_position_embeddings": 64,
                  "short_factor": [1 + i / 7 for i in range(12)], "long_factor": [2 + i / 3 for i in range(12)]}, [10, 64, 65]),
    "llama3": ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64}, [10]),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    base = dict(model_type="llama", vocab_size=100, hidden_size=96, intermediate_size=96, num_hidden_layers=1,
                num_attention_heads=4, head_dim=24, max_position_embeddings=256, rope_theta=50000.0)
    cases = []
    for name, (scaling, lengths) in SCALINGS.items():
        fields = {**base, **({"rope_scaling": scaling} if scaling else {})}
        for length in lengths:
            config = LlamaConfig(**{k: (dict(v) if isinstance(v, dict) else v) for k, v in fields.items()})
            kind = config.rope_parameters["rope_type"]
            if kind == "default":
                inverse, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
            else:
                inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
            cases.append({"name": name, "config": fields, "sequenceLength": length,
                          "inverseFrequencies": inverse.tolist(), "factor": float(factor)})
    out.write_text(json.dumps({"versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                               "cases": cases}, indent=1) + "\n")


main()
