"""The work of each case, done by PyTorch and transformers: the strongest setting that we know of.

Scaled dot-product attention by PyTorch's own kernels, the fused AdamW, gradients set to none between steps, and on a
GPU bfloat16 by autocast over float32 parameters, which is how lmx computes too.
"""

import contextlib
import itertools
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from lmx.benchmarking.cases import Case
from lmx.benchmarking.work import BATCH, BATCHES, Work, prompts_of

transformers.logging.set_verbosity_error()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def open_work(case: Case, folder: Path, system: str) -> Work:
    """Gets ready for the work of a case, whose model and batch lmx has left in ``folder``."""
    if case.kind == "loading":  # all of it, and not only what a file that is mapped into memory shows so far
        return Work(lambda: sum(float(parameter.sum()) for parameter in _open(folder).to(DEVICE).parameters()))
    if case.kind == "input":
        return _input(case, load_file(folder / BATCH)["rows"])
    model = _open(folder).to(DEVICE)
    if case.kind == "generation":
        return _generation(case, model, system)
    batch = {name: x.to(DEVICE) for name, x in load_file(folder / BATCH).items()}
    return _training(case, model, system, batch)


def reset_peak() -> None:
    """Lets the peak of the device's memory start from now."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float | None:
    """Most bytes that the device has held since :func:`reset_peak`; none on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def free_memory() -> None:
    """Gives the device's memory back to the other systems."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def matmul_rate(size: int, dtype: str) -> float:
    """FLOP/s of one square matrix product, of random numbers: a GPU is faster at others, which change fewer bits."""
    x = torch.randn((size, size), dtype=getattr(torch, dtype), device=DEVICE)
    _wait(x @ x)
    start = time.perf_counter()
    _wait(x @ x)
    return 2 * size**3 / (time.perf_counter() - start)


def about() -> dict[str, str]:
    """What would have to be the same for the figures to be."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _open(folder: Path) -> torch.nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = getattr(transformers, config.architectures[0])
    return architecture.from_pretrained(folder, config=config, attn_implementation=_attention(architecture))


def _attention(architecture: Any) -> str:
    return "sdpa" if architecture._supports_sdpa else "eager"


def _training(case: Case, model: torch.nn.Module, system: str, batch: dict[str, torch.Tensor]) -> Work:
    if case.config.model.experts.num_experts:
        slots = case.config.model.experts.slots(case.config.data.target_length, train=True)
        for module in model.decoder.modules():
            if hasattr(module, "expert_capacity"):
                module.expert_capacity = slots
    optimized = case.config.optimizer
    settings = {"betas": (optimized.b1, optimized.b2), "eps": optimized.epsilon, "fused": True}
    settings |= {"lr": optimized.learning_rate, "weight_decay": optimized.weight_decay}
    optimizer = torch.optim.AdamW(model.train().parameters(), **settings)
    inputs, targets = _inputs(case, batch)
    predicted = (targets >= 0).nonzero().squeeze(1)

    def loss_of(**inputs: torch.Tensor) -> torch.Tensor:
        if case.config.objective.name == "mlm":  # the head sees masked positions alone, as lmx's does
            hidden = model.base_model(**inputs).last_hidden_state
            logits, wanted = model.cls(hidden.flatten(0, 1)[predicted]), targets[predicted]
        else:
            logits, wanted = model(**inputs).logits.flatten(0, 1), targets
        return torch.nn.functional.cross_entropy(logits.float(), wanted)

    compute = torch.compile(loss_of) if system == "compiled" else loss_of
    half = case.config.model.dtype == "bfloat16"

    def run() -> float:
        with torch.autocast(DEVICE, torch.bfloat16) if half else contextlib.nullcontext():
            loss = compute(**inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimized.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Work(run)


def _inputs(case: Case, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the model is called with, and the targets, -100 where nothing is predicted."""
    two = case.config.model.architecture == "encoder_decoder"
    prefix = "decoder_" if two else ""
    targets = torch.where(batch[f"{prefix}weights"] > 0, batch[f"{prefix}targets"].long(), -100).flatten()
    if two:
        names = {"input_ids": "encoder_tokens", "decoder_input_ids": "decoder_tokens"}
        return {name: batch[ours].long() for name, ours in names.items()} | {"use_cache": False}, targets
    inputs = {"input_ids": batch["tokens"].long()}
    if case.config.model.architecture == "decoder":
        inputs["use_cache"] = False
    if case.documents != "whole":
        segments = batch["segments"]
        inputs["position_ids"] = batch["positions"].long()
        inputs["attention_mask"] = (segments > 0).long()
        if case.documents == "packed":
            same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
            inputs["attention_mask"] = torch.where(same[:, None], 0.0, torch.finfo(torch.float32).min)
    return inputs, targets


def _input(case: Case, rows: torch.Tensor) -> Work:
    """Rows in random order, masked by the library's collator, which is told that no token of them is special."""
    names = [*map(str, range(case.config.model.vocab_size - 2)), "[PAD]", "[MASK]"]
    vocabulary = {name: i for i, name in enumerate(names)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[PAD]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", mask_token="[MASK]")
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=case.config.objective.mask_rate)

    def masked(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.stack(rows)
        return collator.torch_mask_tokens(rows, special_tokens_mask=torch.zeros_like(rows))

    loader = torch.utils.data.DataLoader(
        rows.long(), case.config.train.global_batch_size, shuffle=True, drop_last=True, collate_fn=masked
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return Work(lambda: sum(next(batches)[0].numel() for _ in range(BATCHES)))


def _generation(case: Case, model: torch.nn.Module, system: str) -> Work:
    half = case.config.model.dtype == "bfloat16"
    model = (model.to(torch.bfloat16) if half else model).eval()
    prompts = torch.tensor(prompts_of(case), device=DEVICE)
    settings = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if system == "compiled":
        model.forward = torch.compile(model.forward)
        settings["cache_implementation"] = "static"

    @torch.inference_mode()
    def run(new_tokens: int = case.new_tokens) -> int:
        found = model.generate(prompts, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **settings)
        return found[:, prompts.shape[1] :].numel()

    return Work(run, first_token=lambda: run(1))


def _wait(x: torch.Tensor) -> None:
    x[0, 0].item()
