#!/usr/bin/env python3
"""Golden references for generation: what transformers' generate() makes of the tiny models in ../models, in fp32,
and what its logits processors leave of random logits.

    python generation.py --seed 20260801 --out .     writes generation/ below --out

Option names are ours (camelCase); `run` maps them. Every continuation is checked to be the same in fp64, so that none
hangs on the last bits of two candidates.
"""
import argparse, json, os, random, warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as processors

HERE = os.path.dirname(os.path.abspath(__file__))
MODELS = ["llama", "llama3", "llama-bias", "deepseek-coder"]
NEW_TOKENS = 24
NAMES = dict(maxNewTokens="max_new_tokens", minNewTokens="min_new_tokens", minLength="min_length",
             repetitionPenalty="repetition_penalty", noRepeatNgramSize="no_repeat_ngram_size", numBeams="num_beams",
             lengthPenalty="length_penalty", earlyStopping="early_stopping")


def load(name, dtype):
    model = AutoModelForCausalLM.from_pretrained(os.path.join(HERE, "..", "models", name), dtype=dtype).eval()
    model.generation_config = GenerationConfig()
    return model


def run(model, prompt, eos, options):
    """New ids, with the end token where there is one, and the score of a beam search."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=eos or None,
                         pad_token_id=0, return_dict_in_generate=True, output_scores=True,
                         **{NAMES[name]: value for name, value in options.items()})
    new = out.sequences[0, len(prompt):].tolist()
    ends = [i for i, token in enumerate(new) if token in (eos or [])]
    new = new[:ends[0] + 1] if ends else new
    return new, (float(out.sequences_scores[0]) if options.get("numBeams", 1) > 1 else None)


def often_near_the_top(model, prompt, count, rank=8):
    """Tokens that are often among the likeliest, but never the likeliest: as end tokens they end some beams."""
    new, _ = run(model, prompt, None, dict(maxNewTokens=NEW_TOKENS))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1:]
    seen = logits.topk(rank).indices.flatten().tolist()
    candidates = sorted(set(seen) - set(new), key=lambda token: (-seen.count(token), token))
    return candidates[:count]


def cases_of(model, prompt):
    greedy, _ = run(model, prompt, None, dict(maxNewTokens=NEW_TOKENS))
    ends = often_near_the_top(model, prompt, 3)
    several = [ends[0], greedy[9], greedy[5]]
    at = len(prompt)
    yield "greedy", None, {}
    yield "greedy several ends", several, {}
    yield "minimum", several, dict(minNewTokens=12)
    yield "minimum length", several, dict(minLength=at + 8)
    yield "penalty", None, dict(repetitionPenalty=1.3)
    yield "penalty below 1", None, dict(repetitionPenalty=0.8)
    yield "no repeated tokens", None, dict(noRepeatNgramSize=1)
    yield "no bigrams", None, dict(noRepeatNgramSize=2)
    yield "no trigrams", None, dict(noRepeatNgramSize=3)
    yield "all", several, dict(repetitionPenalty=1.1, noRepeatNgramSize=2, minNewTokens=10)
    for beams in (2, 4):
        yield f"{beams} beams without end", None, dict(numBeams=beams)
        for power in (0.0, 1.0, 2.0, -1.0):
            yield f"{beams} beams length {power:g}", ends, dict(numBeams=beams, lengthPenalty=power)
    yield "3 beams stop early", ends, dict(numBeams=3, earlyStopping=True)
    yield "3 beams never stop early", ends, dict(numBeams=3, earlyStopping="never")
    yield "4 beams one end", ends[:1], dict(numBeams=4)
    yield "4 beams penalty no bigrams", ends, dict(numBeams=4, repetitionPenalty=1.3, noRepeatNgramSize=2)
    yield "3 beams minimum", ends, dict(numBeams=3, minNewTokens=10, lengthPenalty=0.0)
    yield "5 beams short", ends, dict(numBeams=5, maxNewTokens=3)


def continuations(seed):
    rng = random.Random(seed)
    for name in MODELS:
        model, exact = load(name, torch.float32), load(name, torch.float64)
        vocabulary = model.config.vocab_size
        for prompt in ([rng.randrange(10, vocabulary) for _ in range(5)], [rng.randrange(10, 40) for _ in range(23)]):
            for about, ends, options in cases_of(model, prompt):
                options = dict(maxNewTokens=NEW_TOKENS) | options
                ids, score = run(model, prompt, ends, options)
                again, exact_score = run(exact, prompt, ends, options)
                if ids != again:
                    print(f"left out, since fp64 chooses otherwise: {name}, {about}")
                    continue
                assert score is None or abs(score - exact_score) < 2e-5 * max(1, abs(score)), (name, about, score, exact_score)
                yield dict(model=name, about=about, prompt=prompt, endTokens=ends or [], options=options, ids=ids,
                           **({} if score is None else dict(score=score)))


def processed(seed):
    """Random logits, what transformers' processors leave of them, as probabilities."""
    rng = np.random.default_rng(seed)
    vocabulary, rows = 331, 3
    logits = (3 * rng.standard_normal((rows, vocabulary))).astype(np.float32)
    seen = rng.integers(0, 12, (rows, 40)).astype(np.int32)
    seen[:, 12:] = rng.integers(0, vocabulary, (rows, 28))
    seen[:, -2:] = seen[:, 3:5]  # a trigram that began before
    tensors, index = dict(logits=logits, seen=seen), []
    make = dict(
        repetitionPenalty=processors.RepetitionPenaltyLogitsProcessor,
        noRepeatNgramSize=processors.NoRepeatNGramLogitsProcessor,
        forbidden=lambda ids: processors.SuppressTokensLogitsProcessor(ids),
        temperature=processors.TemperatureLogitsWarper,
        topK=lambda k, keep=1: processors.TopKLogitsWarper(k, min_tokens_to_keep=keep),
        topP=lambda p, keep=1: processors.TopPLogitsWarper(p, min_tokens_to_keep=keep),
        typicalP=lambda p, keep=1: processors.TypicalLogitsWarper(p, min_tokens_to_keep=keep),
    )
    cases = [
        dict(repetitionPenalty=1.3), dict(repetitionPenalty=0.7), dict(noRepeatNgramSize=1), dict(noRepeatNgramSize=2),
        dict(noRepeatNgramSize=3), dict(noRepeatNgramSize=41), dict(forbidden=[0, 17, 330]), dict(temperature=0.6),
        dict(temperature=2.5), dict(topK=7), dict(topP=0.9), dict(topP=0.3), dict(typicalP=0.95), dict(typicalP=0.5),
        dict(typicalP=0.2), dict(typicalP=0.01), dict(typicalP=0.01, keep=4), dict(topP=0.01, keep=5),
        dict(topK=2, keep=4), dict(temperature=0.7, topK=40, topP=0.9), dict(temperature=1.5, topK=60, typicalP=0.8),
        dict(topP=0.95, typicalP=0.6),
        dict(repetitionPenalty=1.2, noRepeatNgramSize=3, forbidden=[5], temperature=0.8, topK=50, topP=0.95, typicalP=0.9),
    ]
    for number, options in enumerate(cases):
        keep = {"keep": options["keep"]} if "keep" in options else {}
        chain = LogitsProcessorList([
            make[name](options[name], **(keep if name in ("topK", "topP", "typicalP") else {}))
            for name in make if name in options])
        scores = chain(torch.tensor(seen).long(), torch.tensor(logits))
        name = f"probabilities.{number}"
        tensors[name] = torch.softmax(scores, -1).numpy()
        index.append(dict(options=options, tensor=name))
    return tensors, index


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=20260801)
    parser.add_argument("--out", default=".")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder = os.path.join(args.out, "generation")
    os.makedirs(folder, exist_ok=True)
    tensors, index = processed(args.seed)
    save_file(tensors, os.path.join(folder, "processed.safetensors"))
    generated = list(continuations(args.seed))
    head = dict(seed=args.seed, torch=torch.__version__, transformers=transformers.__version__, numpy=np.__version__)
    with open(os.path.join(folder, "index.json"), "w") as file:
        rows = ",\n".join(f"  {json.dumps(row)}" for row in generated)
        cases = ",\n".join(f"  {json.dumps(row)}" for row in index)
        file.write(f'{{\n "made": {json.dumps(head)},\n "processed": [\n{cases}\n ],\n "generated": [\n{rows}\n ]\n}}\n')
    print(f"{len(generated)} continuations, {len(index)} distributions")


if __name__ == "__main__":
    main()
