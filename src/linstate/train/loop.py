"""Training with Hugging Face's Trainer on a streamed mixture; resumes from its own checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from linstate.engine import LanguageModel
from linstate.models.checkpoint import fill, load_weights
from linstate.models.hf import LinstateConfig, LinstateForCausalLM
from linstate.train.begin import begin
from linstate.train.optimizer import build_optimizer
from linstate.train.prepare import prepare
from linstate.train.recipe import Recipe
from linstate.train.stream import PocketCache, PocketStream
from linstate.train.tokenizer import END_ID, load_tokenizer

_NUMBERS = 64  # example numbers that a step owns; it takes as many of them as it has sequences


class StepBatches(IterableDataset[dict[str, Tensor]]):
    """The stream in whole optimiser steps, ``[B, T]`` with ``B * T = tokens_per_step``; begins at any step at once."""

    def __init__(self, cache: PocketCache, tokenizer: Any, recipe: Recipe, first_step: int) -> None:
        super().__init__()
        self.recipe, self.first_step = recipe, first_step
        low, high = recipe.curriculum
        self.total = round(recipe.steps * _NUMBERS / max(high - low, 1e-6))
        self.offset = round(low * self.total / _NUMBERS) * _NUMBERS
        self.stream = PocketStream(
            cache,
            tokenizer,
            total=self.total,
            lengths=[(float(progress), int(length)) for progress, length in recipe.lengths],
            batch=_NUMBERS,
            seed=recipe.seed,
            facts=recipe.facts,
            p_document=recipe.document_share,
            even_styles=recipe.even_styles,
            emphasis=recipe.emphasis,
            mixture=(recipe.mixture[0], recipe.mixture[1], recipe.mixture[2]),
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step = self.first_step
        while True:
            first = self.offset + step * _NUMBERS
            progress = first / self.total
            self.stream.p_lookup = _at(self.recipe.lookup_share, progress)
            self.stream.p_drill = _at(self.recipe.drill_share, progress)
            self.stream.drill_parts = int(_at(self.recipe.drill_parts, progress))
            count = max(1, min(_NUMBERS, self.recipe.tokens_per_step // self.stream.length(first)))
            examples = [self.stream.example(first + i) for i in range(count)]
            yield {name: torch.stack([e[name] for e in examples]) for name in examples[0]}
            step += 1


def _at(schedule: list[list[float]], progress: float) -> float:
    """The value of a schedule ``[[progress, value], ...]`` at a progress."""
    return [value for begin, value in schedule if begin <= progress][-1]


def _single(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return examples[0]


class WeighingTrainer(Trainer):
    """Cross-entropy in which an answer's token weighs ``answer_weight`` times a token of plain text.

    A lookup example has labels on its answers only, a few tokens out of hundreds: with equal weights the
    skill that they teach would be a twentieth of the loss.
    """

    answer_weight = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts: dict[str, list[float]] = {}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        labels = inputs["labels"][:, 1:]  # [B, T - 1]
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        flat = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none")
        loss = flat.view(labels.shape)
        learned = (labels != -100).float()
        lookup = (labels == -100).any(1, keepdim=True)  # [B, 1]
        weight = torch.where(lookup, self.answer_weight, 1.0) * learned
        with torch.no_grad():
            for name, part in (("text", learned * ~lookup), ("answers", learned * lookup)):
                if part.any():
                    self.parts.setdefault(name, []).append(float((loss * part).sum() / part.sum()))
        mean = (loss * weight).sum() / weight.sum().clamp(min=1)
        return (mean, outputs) if return_outputs else mean

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logs |= {f"{name}_loss": sum(values) / len(values) for name, values in self.parts.items()}
        self.parts.clear()
        super().log(logs, *args, **kwargs)


def train(
    recipe: Recipe, work: Path, *, start: Path | None = None, callbacks: list[TrainerCallback] | None = None
) -> LanguageModel:
    """Train as the recipe says, in the folder ``work``; goes on from the newest checkpoint that stands there.

    Without a checkpoint it starts from the weights in the model folder ``start``, or from random ones.

    ``work`` holds ``tokenizer.json`` (trained first if it is missing), ``cache/`` (the corpus as tokens),
    ``checkpoints/`` and, once all steps are done, ``model/``: what :meth:`LanguageModel.from_pretrained` reads, weights in
    bf16.
    """
    work.mkdir(parents=True, exist_ok=True)
    cache = prepare(work, recipe.vocab_size)
    tokenizer = load_tokenizer(work / "tokenizer.json")
    torch.manual_seed(recipe.seed)
    model = LinstateForCausalLM(
        LinstateConfig(recipe.config(), eos_token_id=END_ID, pad_token_id=0, bos_token_id=None)
    )
    begin(model.decoder, tokenizer)
    if start is not None:
        fill(model.decoder, load_weights(start), str(start))
    checkpoints = work / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    first_step = int(last.rsplit("-", 1)[1]) if last else 0
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,
        learning_rate=recipe.learning_rate,
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_kwargs={
            "num_decay_steps": recipe.decay_steps,
            "decay_type": "1-sqrt",
            "min_lr_ratio": 0.0,
        },
        logging_steps=recipe.log_steps,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        ignore_data_skip=True,
        dataloader_num_workers=0,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
        average_tokens_across_devices=False,
    )
    optimizer = build_optimizer(
        model, lr=recipe.learning_rate, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay
    )
    trainer = WeighingTrainer(
        model=model,
        args=arguments,
        train_dataset=StepBatches(cache, tokenizer, recipe, first_step),
        data_collator=_single,
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )
    trainer.answer_weight = recipe.answer_weight
    if callbacks:  # they report; the Trainer's own lines on standard output would come between
        trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        trainer.train(resume_from_checkpoint=last)
    made = LanguageModel(model.decoder, tokenizer, name=work.resolve().name, end=END_ID)
    if trainer.state.global_step >= recipe.steps:  # else a callback stopped it, to go on later
        made.save_pretrained(work / "model", dtype=torch.bfloat16)
    return made
