"""The model card: every figure in it is measured or read off the run, none is typed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dotexport.embedded.corpus import Source
from dotexport.embedded.held_out import CALIBRATION, EVALUATION
from dotexport.embedded.loss import HeldOutLoss

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [python, tiny, test]
model-index:
- name: dotexport-embedded
  results:
  - task: {{type: text-generation}}
    dataset: {{type: held-out, name: Python standard library modules (held out)}}
    metrics:
    - {{type: nats_per_token, value: {nats:.4f}}}
    - {{type: bits_per_character, value: {bits:.4f}}}
    - {{type: perplexity, value: {perplexity:.2f}}}
---

# The embedded model of dotexport

A language model of {millions:.2f} M parameters that writes something like Python. It ships inside
the package so that `dotexport demo` and the tests run offline, on a model that was really trained:
its held-out loss means something, and narrowing it has something to lose.

**Intended use:** demonstration and tests of dotexport, nothing else. It has learnt the shape of
Python code and little of its sense; do not use what it writes.

**What to expect:** it predicts real code better than it writes. Greedy text soon repeats itself,
names are often invented, and brackets may stay open. End a prompt where a token ends (`def`,
`class Reader(`): after a space, or after the line break before an indented line, it goes astray,
because words carry their leading space and indents their line break.

## Architecture

`LlamaForCausalLM`: {layers} layers, hidden size {hidden}, MLP {intermediate}, {heads} heads and
{kv_heads} key/value heads of {head_dim}, context {context}, untied embeddings, no biases, weights
in bfloat16. Byte-level BPE of {vocabulary:,} tokens, trained on the same text; `<|endoftext|>`
opens every document and is the only special token.

## Held-out loss

| nats per token | perplexity per token | bits per character |
|---|---|---|
| {nats:.4f} | {perplexity:.2f} | {bits:.4f} |

The shipped bfloat16 weights, computed in float32, on {num_tokens:,} tokens ({num_characters:,}
characters) of the {num_evaluation} evaluation modules of Python {python}, as they are installed, in
windows of {context} tokens that do not overlap. Bits per character is the summed loss divided by
ln 2 and by the number of characters that the predicted tokens spell.
The weights are those of the last step; no checkpoint was picked by this figure. Optimizer and
learning rates were, in short trials on the same modules, where the training loss agreed.

## Data

Python sources, read where they are installed; no text is copied into the package.
`dotexport/embedded/corpus.py` says what is read and how it is cleaned. A file is dropped when it is
generated, a table of data, mostly a repetition of files before it, or close to a held-out module.

The {num_evaluation} evaluation and {num_calibration} calibration modules are listed in
`dotexport/embedded/held_out.py`. Neither the model nor the tokenizer was trained on them;
{shared:.1f} % of the evaluation modules' lines of 25 characters or more also stand in some training
file, as code that follows one convention does.

| source | version | licence | files | characters | times in the stream |
|---|---|---|---|---|---|
{sources}

## Training

{tokens:.1f} M tokens in {steps:,} steps ({epochs:.2f} passes over a stream of {corpus_tokens:.1f} M
tokens), {minutes:.0f} minutes on {machine} ({rate:,.0f} tokens per second by the clock, with
compiling, evaluating and whatever else the machine did), PyTorch {torch}.
Muon for the matrices inside the layers, AdamW for the rest, bfloat16 autocast; the learning rate
warms up, stays level, and falls to 0 in a straight line.

    {command}

A resumed run counts as one: the learning rate is the same until the decay, however many steps were
asked for at first, so the command above stands for it up to rounding.

{outlook}

## Licence

The weights are licensed under Apache-2.0, like dotexport. The texts they were trained on keep the
licences of the table above; none of that text is distributed with the model.
"""

_SHORT_TRAINING = """\
This was a short training on a CPU; a longer one would serve. `--device cuda --layers 6
--intermediate 768` is meant for that and has not been tried."""


@dataclass(frozen=True)
class SourceRead:
    """What was really read of a source."""

    source: Source
    version: str
    num_files: int
    num_characters: int

    def row(self) -> str:
        name, licence, copies = self.source.distribution, self.source.licence, self.source.copies
        return (
            f"| {name} | {self.version} | {licence} | {self.num_files:,} "
            f"| {self.num_characters:,} | {copies} |"
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the training took."""

    steps: int
    tokens: int
    corpus_tokens: int
    seconds: float
    device: str
    threads: int
    shared_lines: float
    command: str

    @property
    def machine(self) -> str:
        if self.device == "cpu":
            return f"{self.threads} CPU threads ({torch.backends.cpu.get_cpu_capability()})"
        return torch.cuda.get_device_name()


def model_card(
    config: Any, parameters: int, sources: list[SourceRead], run: Run, loss: HeldOutLoss
) -> str:
    return _CARD.format(
        **_of_architecture(config, parameters),
        **_of_loss(loss),
        **_of_run(run),
        num_evaluation=len(EVALUATION),
        num_calibration=len(CALIBRATION),
        python=sources[0].version,
        sources="\n".join(read.row() for read in sources),
        torch=torch.__version__.partition("+")[0],
        outlook=_SHORT_TRAINING if run.device == "cpu" else "",
    )


def _of_architecture(config: Any, parameters: int) -> dict[str, Any]:
    return {
        "millions": parameters / 1e6,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "context": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
    }


def _of_loss(loss: HeldOutLoss) -> dict[str, Any]:
    return {
        "nats": loss.nats_per_token,
        "bits": loss.bits_per_character,
        "perplexity": loss.perplexity,
        "num_tokens": loss.num_tokens,
        "num_characters": loss.num_characters,
    }


def _of_run(run: Run) -> dict[str, Any]:
    return {
        "steps": run.steps,
        "tokens": run.tokens / 1e6,
        "corpus_tokens": run.corpus_tokens / 1e6,
        "epochs": run.tokens / run.corpus_tokens,
        "minutes": run.seconds / 60,
        "rate": run.tokens / run.seconds,
        "machine": run.machine,
        "shared": 100 * run.shared_lines,
        "command": run.command,
    }
