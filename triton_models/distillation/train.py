"""Fine-tunes a low-rank adapter on written pairs: `python -m triton_models.distillation.train --help`.

Loss on the answer only. A checkpoint every few steps: a run that is stopped goes on from the last one. Needs the
packages of requirements/distillation.in, which nothing else here needs.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import cos, pi
from pathlib import Path
from typing import Any, Final, TextIO

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from streams.prompts import PROMPT_VERSION
from streams.tasks import WordingTask
from triton_models.distillation.base import (
    PROJECTIONS,
    hugging_face_config,
    hugging_face_tokenizer,
    hugging_face_tokenizer_config,
    hugging_face_weights,
)
from triton_models.distillation.command import say
from triton_models.distillation.pairs import PAIRS, Pair, encoded, read_pairs

END: Final = "<|im_end|>"
WARM_UP: Final = 0.06
"""Share of the steps in which the rate rises from nothing; then it falls as a cosine."""
IGNORED: Final = -100


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt and of its answer with the end mark."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def main() -> None:
    """Train, or go on training, and write the adapter."""
    options = _arguments()
    if not options.base.is_file():
        sys.exit(f"error: no base model at {options.base}: `make setup` downloads it; --base names another file")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    # A run that is told to stop loses what came after its last checkpoint, nothing else.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped: the same command goes on from the last checkpoint"))
    try:
        pairs, apart = list(read_pairs(options.pairs)), list(read_pairs(options.held_out))
    except ValueError as error:
        sys.exit(f"error: {error}")
    held = [pair for pair in pairs if pair.catalogue in options.hold_back] + apart
    learned = [pair for pair in pairs if pair.catalogue not in options.hold_back]
    if not learned:
        sys.exit("error: no pairs to learn from; check the files and --hold-back")
    tokenizer = _tokenizer(options.base, options.out)
    model = _model(options.base, options.rank, options.alpha)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.rate, weight_decay=0.0)
    epochs = [
        _batches(learned, tokenizer, options.tokens, random.Random(f"{options.seed}/{n}"))
        for n in range(options.epochs)
    ]
    steps = [batch for epoch in epochs for batch in epoch]
    recipe = _recipe(options, pairs, options.base.read_bytes())
    done = _resumed(options.out, recipe, model, optimizer)
    say(f"{len(learned)} pairs, {len(held)} held back, {len(steps)} steps, {done} done")
    log = _log(options.out / "training.jsonl", recipe, done)
    examples = [_example(pair, tokenizer) for pair in held]
    for step, batch in enumerate(steps[done:], done + 1):
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = options.rate * _schedule(step, len(steps))
        model.train()
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        entry: dict[str, float] = {"step": step, "of": len(steps), "loss": round(loss.item(), 4)}
        last = step == len(steps)
        if step % options.every == 0 or last:
            if examples:
                entry["held_back"] = round(_mean_loss(model, examples, options.tokens), 4)
            _keep(step, recipe, model, optimizer, options.out)
        entry["seconds"] = round(time.monotonic() - started, 1)
        log.write(json.dumps(entry) + "\n")
        log.flush()
        say(json.dumps(entry))
    print(json.dumps({"steps": len(steps), "pairs": len(learned), "adapter": str(options.out / "adapter.safetensors")}))


def _model(base: Path, rank: int, alpha: int) -> PeftModel:
    config = LlamaConfig(**hugging_face_config(base))
    model = LlamaForCausalLM(config)
    state = {name: torch.from_numpy(array.copy()) for name, array in hugging_face_weights(base)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        sys.exit(f"error: {base} does not fit its own description: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    targets = [name.rpartition(".")[2] for name in PROJECTIONS]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM"))


def _tokenizer(base: Path, out: Path) -> Any:  # noqa: ANN401
    folder = out / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(hugging_face_tokenizer(base)), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(hugging_face_tokenizer_config(base)), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def _example(pair: Pair, tokenizer: Any) -> Example:  # noqa: ANN401
    prompt = tokenizer(pair.prompt, add_special_tokens=False)["input_ids"]
    return Example(prompt, tokenizer(pair.answer + END, add_special_tokens=False)["input_ids"])


def _shuffled(pair: Pair, order: random.Random) -> Pair:
    """The pair with the titles that the student sees in another order: what they say does not hang on it."""

    def mixed(titles: tuple[str, ...]) -> tuple[str, ...]:
        # Only the first few reach the prompt; the text was written for these.
        seen, rest = list(titles[:2]), titles[2:]
        order.shuffle(seen)
        return (*seen, *rest)

    interests = tuple(replace(i, titles=mixed(i.titles)) for i in pair.task.interests)
    novel = tuple(replace(n, titles=mixed(n.titles)) for n in pair.task.novel)
    return replace(pair, task=WordingTask(interests, novel, pair.task.overview))


def _batches(pairs: Sequence[Pair], tokenizer: Any, tokens: int, order: random.Random) -> list[list[Example]]:  # noqa: ANN401
    """An epoch in batches of at most `tokens` padded tokens, of about equal length within a batch, in random order."""
    examples = [_example(_shuffled(pair, order), tokenizer) for pair in pairs]
    order.shuffle(examples)
    batches = list(_grouped(sorted(examples, key=len), tokens))
    order.shuffle(batches)
    return batches


def _grouped(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in examples:
        if batch and (len(batch) + 1) * max(map(len, [*batch, example])) > tokens:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def _loss(model: PeftModel, batch: Sequence[Example]) -> torch.Tensor:
    """Mean loss over the answers' tokens. Logits are computed for these alone: the vocabulary is the widest layer."""
    width = max(map(len, batch))
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), IGNORED)
    for row, example in enumerate(batch):
        start, end = len(example.prompt), len(example)
        ids[row, :end] = torch.tensor(example.prompt + example.answer)
        mask[row, :end] = 1
        labels[row, start - 1 : end - 1] = torch.tensor(example.answer)
    llama = model.get_base_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = llama.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        wanted = labels != IGNORED
        logits = llama.lm_head(hidden[wanted])
    return cross_entropy(logits.float(), labels[wanted])


def _mean_loss(model: PeftModel, examples: Sequence[Example], tokens: int) -> float:
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in _grouped(sorted(examples, key=len), 2 * tokens):
            answers = sum(len(example.answer) for example in batch)
            total += _loss(model, batch).item() * answers
            count += answers
    return total / count


def _schedule(step: int, steps: int) -> float:
    warm = max(1, round(WARM_UP * steps))
    if step <= warm:
        return step / warm
    return 0.02 + 0.98 * 0.5 * (1 + cos(pi * (step - warm) / max(1, steps - warm)))


def _recipe(options: argparse.Namespace, pairs: Sequence[Pair], base: bytes) -> dict[str, Any]:
    """What an adapter depends on: a run that goes on must have been begun with the same."""
    content = blake2b(b"".join(map(encoded, pairs)), digest_size=16).hexdigest()
    began_with = blake2b(base, digest_size=16).hexdigest()
    names = ("hold_back", "epochs", "rate", "rank", "alpha", "tokens", "seed")
    return {"base": began_with, "pairs": content, "prompts": PROMPT_VERSION} | {
        name: getattr(options, name) for name in names
    }


def _resumed(out: Path, recipe: dict[str, Any], model: PeftModel, optimizer: torch.optim.Optimizer) -> int:
    checkpoint = out / "checkpoint.pt"
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint)
    if state["recipe"] != recipe:
        sys.exit(f"error: {checkpoint} was begun with other pairs or options; remove it, or choose another --out")
    set_peft_model_state_dict(model, state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _log(path: Path, recipe: dict[str, Any], done: int) -> TextIO:
    """The log, open for its next step: the recipe, then a line for each step done; what a stop cost is dropped."""
    kept = path.read_text().splitlines()[1 : done + 1] if done and path.exists() else []
    log = path.open("w")
    log.writelines(line + "\n" for line in [json.dumps(recipe), *kept])
    return log


def _keep(step: int, recipe: dict[str, Any], model: PeftModel, optimizer: torch.optim.Optimizer, out: Path) -> None:
    """Write the checkpoint, and the adapter as it is now; a kill meanwhile leaves the ones before."""
    adapter = get_peft_model_state_dict(model)
    unfinished = out / "unfinished.part"
    state = {"step": step, "recipe": recipe, "adapter": adapter, "optimizer": optimizer.state_dict()}
    torch.save(state, unfinished)
    unfinished.replace(out / "checkpoint.pt")
    save_file({name: tensor.half().contiguous() for name, tensor in adapter.items()}, unfinished)
    unfinished.chmod(0o644)
    unfinished.replace(out / "adapter.safetensors")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m triton_models.distillation.train",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--pairs", type=Path, nargs="+", default=[PAIRS], help="files or folders of pairs (the shipped ones)"
    )
    parser.add_argument(
        "--base", type=Path, default=Path(".personas/assets/base.gguf"), help="the base model's GGUF file"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(".personas/distillation"), help="adapter, checkpoint and log go here"
    )
    parser.add_argument(
        "--hold-back", nargs="*", default=["calm"], help="catalogues to measure the loss on, not learned"
    )
    parser.add_argument(
        "--held-out", type=Path, nargs="*", default=[], help="files of pairs to measure the loss on, not learned"
    )
    parser.add_argument("--epochs", type=int, default=3, help="times that each pair is learned")
    parser.add_argument("--rate", type=float, default=8e-4, help="highest learning rate")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048, help="padded tokens of a step")
    parser.add_argument("--every", type=int, default=25, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
