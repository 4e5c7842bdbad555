#!/usr/bin/env python
"""Text generation with a trained model: continuations of prompts, printed as they are generated.

tools/generate.py runs/latest "def main(" --drafts 2
tools/generate.py runs/latest "import " "class " --temperature 0 --output texts.jsonl
"""

import argparse
import sys

from megatron_q3n import train
from megatron_q3n.config import EXIT_BAD_INPUT, RunConfig, UserError, validate
from megatron_q3n.recipe import configure, register_defaults

SETTINGS = {
    "tokens": "inference.max_new_tokens",
    "temperature": "inference.temperature",
    "top_k": "inference.top_k",
    "top_p": "inference.top_p",
    "seed": "inference.seed",
    "drafts": "inference.draft_depth",
    "precision": "precision",
}


def main() -> int:
    """Generate, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="--set takes any setting of the generate recipe, e.g. --set parallel=tp2 under torchrun.",
    )
    parser.add_argument("source", metavar="RUN_DIR", help="a run directory, or a checkpoint in one")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--tokens", type=int, help="maximum number of new tokens per text")
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--top-k", type=int, help="sample from this number of most probable tokens")
    parser.add_argument("--top-p", type=float, help="sample from the most probable tokens with this total probability")
    parser.add_argument("--stop", nargs="+", default=[], help="further tokens that end a text")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--drafts", type=int, help="tokens drafted by the MTP layer per pass")
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--tokenizer", help="a tokenizer.json or its folder")
    parser.add_argument("--output", help="a file for the results, one JSON object a line")
    parser.add_argument("--set", nargs="+", default=[], metavar="setting=value")
    options = parser.parse_args()
    try:
        return train.run(configured(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def configured(options: argparse.Namespace) -> RunConfig:
    """Return the generate recipe with the options. Texts bypass Hydra's grammar, so they may contain anything."""
    chosen = {SETTINGS[name]: value for name, value in vars(options).items() if name in SETTINGS}
    overrides = [f"{name}={value}" for name, value in chosen.items() if value is not None]
    register_defaults()
    tree = configure(["--config-name", "generate", "checkpoint.load=?", *overrides, *options.set]).model_dump(
        mode="json"
    )
    tree["checkpoint"]["load"] = options.source
    tree["inference"] |= {"prompts": options.prompts, "stop": options.stop}
    tree["inference"] |= {n: getattr(options, n) for n in ("output", "tokenizer") if getattr(options, n)}
    return validate(tree)


if __name__ == "__main__":
    sys.exit(main())
