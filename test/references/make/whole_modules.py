"""A tiny Llama with tied embeddings and a PEFT adapter that trains modules whole (modules_to_save): logits, loss, gradients.

    venv/bin/python make/whole_modules.py --seed 20260801 --out models/llama-whole
"""

import argparse
import json
import os

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=20260801)
    parser.add_argument("--out", default="models/llama-whole")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=67,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    os.makedirs(options.out, exist_ok=True)
    model.save_pretrained(options.out)
    lora = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "k_proj", "v_proj", "gate_proj"],
        modules_to_save=["embed_tokens", "lm_head", "norm", "v_proj"],
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapter = os.path.join(options.out, "adapter")
    peft.save_pretrained(adapter)
    os.remove(os.path.join(adapter, "README.md"))
    path = os.path.join(adapter, "adapter_config.json")
    with open(path) as file:
        fields = json.load(file)
    fields["base_model_name_or_path"] = "llama-whole"
    fields["target_modules"].sort()
    with open(path, "w") as file:
        file.write(json.dumps(fields, indent=2, sort_keys=True) + "\n")

    ids = torch.randint(0, config.vocab_size, (1, 19))
    tensors = {"input_ids": ids.to(torch.int32)}
    with torch.no_grad():
        base = LlamaForCausalLM.from_pretrained(options.out, attn_implementation="eager")
        tensors["base.logits"] = base(ids).logits[0]
    again = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    output = again(ids, labels=ids)
    output.loss.backward()
    tensors["logits"] = output.logits[0].detach()
    tensors["loss"] = output.loss.detach().reshape(1)
    for name, parameter in again.named_parameters():
        if parameter.requires_grad:
            tensors["grad." + name.replace(".default", "").replace(".modules_to_save", "")] = parameter.grad
    save_file(tensors, os.path.join(options.out, "expected.safetensors"))


if __name__ == "__main__":
    main()
