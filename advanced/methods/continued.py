"""Continued pretraining on a task's own sentences (Gururangan et al. 2020, arXiv 2004.10964).

Before finetuning the model goes on with what it was pretrained on (section 4, "TAPT"), on the train
split's sentences, without their labels:

    L = -1/N sum_t log p(x_t | x_<t)

It keeps its shape and its tokenizer; attention is causal. What differs here: the paper continues a
masked language model for a hundred epochs, of masks drawn anew; here the next token is predicted,
and three epochs are the default of `--pretrain_epochs`.
"""

import math
from pathlib import Path

import torch

from llama import load_pretrained
from pretraining.corpus import TokenStream, digest_of, encode_documents
from pretraining.loop import (
    FILES,
    HeldOut,
    Run,
    in_words,
    make_optimizers,
    save_model,
    train,
)
from tokenizer import Tokenizer
from training.locks import sole_writer
from utils import seed_everything, sha256_of


def continue_on(
    sentences: list[str],
    heldout: list[str],
    checkpoint: str,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    epochs: int,
    lr: float,
    seed: int,
    device: torch.device,
    bf16: bool = False,
) -> tuple[Path, float]:
    """Reads the sentences `epochs` times: (path of the model that has read them, seconds).

    `heldout` sentences are measured alone. `folder` is the run's own: what is finished there is not
    done again, what was interrupted goes on, and the traces of another run are a ValueError.
    """
    model = load_pretrained(checkpoint, attention="causal").to(device)
    seed_everything(seed)
    encoded = encode_documents(tokenizer, sentences)
    n_tokens = sum(map(len, encoded))
    seq_len = min(128, model.config.max_seq_len, n_tokens - 1)  # a few sentences are a window, too
    n_rows = min(16, (n_tokens - 1) // seq_len)
    n_steps = math.ceil(epochs * n_tokens / (n_rows * seq_len))
    settings = {"batch_tokens": n_rows * seq_len, "seq_len": seq_len}
    settings["warmup"] = min(20, n_steps // 10)
    settings |= {"decay_from": 0.0, "max_grad_norm": 1.0, "lr": lr, "epochs": epochs, "seed": seed}
    settings |= {"bf16": bf16, "device": device.type, "text_sha256": digest_of(encoded)}
    settings |= {"model_sha256": sha256_of(checkpoint)}
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(
        folder,
        model,
        make_optimizers(model, "adamw", lr, muon_lr=0.0, weight_decay=0.1),
        TokenStream(encoded, seq_len, seed),
        [HeldOut("held out", heldout, tokenizer, seq_len)],
        settings,
    )
    with sole_writer(*(folder / name for name in FILES)):
        if (folder / "state.pt").exists():
            run.load()
        if run.step * settings["batch_tokens"] < epochs * n_tokens:
            run.budget["tokens"] = epochs * n_tokens
            if not run.step:
                print(f"before: {in_words(run.measure(n_rows))}", flush=True)
            train(run, device, eval_minutes=math.inf, save_minutes=5.0)
        else:  # the last save may have been cut off between the state and the model
            save_model(folder / "model.pt", run.model, half=False)
    return folder / "model.pt", run.seconds
