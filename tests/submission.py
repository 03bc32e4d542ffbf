"""A small complete submission, the splits that it answers, and zips made by hand."""

import warnings
import zipfile
from pathlib import Path

ID = "abc-1"

SOURCES = {
    "run_llama.py": "import argparse\nimport cli\nfrom training import train\n",
    "base_llama.py": "import torch\nfrom config import LlamaConfig\n",
    "llama.py": "from base_llama import Base\nfrom checkpoint import read\nimport rope\n",
    "rope.py": "import torch.nn.functional as F\n",
    "classifier.py": "from llama import Llama\nfrom tokenizer import Tokenizer\n",
    "config.py": "from __future__ import annotations\nimport os.path\n",
    "optimizer.py": "from torch.optim import Optimizer\n",
    "sanity_check.py": "import numpy as np\nfrom llama import Llama\n",
    "tokenizer.py": "from sentencepiece import SentencePieceProcessor\n",
    "utils.py": "import random\n",
    "cli.py": "import argparse\n",
    "checkpoint.py": "import torch\n",
    "training.py": "import tqdm\n\ndef train():\n    import sklearn.metrics\n    import dataset\n",
    "dataset.py": "from tokenizer import Tokenizer\n",
    "data/fetch.py": "import urllib.request\n",
    "tests/test_llama.py": "import pytest\n",
}
# The second sentence of each holds the separator, the third is not ASCII.
SENTENCES = {
    f"{data}-{split}": [
        f"{data} in {split} {end}" for end in ("is good", "a ||| b", "é", "was bad")
    ]
    for data in ("sst", "cfimdb")
    for split in ("dev", "test")
}
MAPPINGS = {
    "data/sst-label-mapping.json": '["bad", "so-so", "good"]',
    "data/cfimdb-label-mapping.json": '["negative", "positive"]',
}


def predictions(data: str, split: str) -> str:
    return "".join(f"{i % 2} ||| {text}\n" for i, text in enumerate(SENTENCES[f"{data}-{split}"]))


OUTPUTS = [
    f"{data}-{split}-{mode}-output.txt"
    for data in ("sst", "cfimdb")
    for split in ("dev", "test")
    for mode in ("prompting", "finetuning")
]
REQUIRED = [
    *("run_llama.py", "base_llama.py", "llama.py", "rope.py", "classifier.py", "config.py"),
    *("optimizer.py", "sanity_check.py", "tokenizer.py", "utils.py", "README.md", "structure.md"),
    *("sanity_check.data", "setup.sh"),
    *("generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt", *OUTPUTS),
]
FILES = {name: f"the text of {name}\n" * 20 for name in REQUIRED} | SOURCES
FILES |= {name: predictions(*name.split("-")[:2]) for name in OUTPUTS} | MAPPINGS
FILES |= {"data/manifest.json": "{}", "abc-1-report.pdf": "%PDF", "requirements.txt": "torch\n"}


def put(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def put_splits(folder: Path) -> Path:
    """The four split files, with labels other than the predicted."""
    lines = {split: "".join(f"1 ||| {s}\n" for s in texts) for split, texts in SENTENCES.items()}
    return put(folder, {f"{split}.txt": text for split, text in lines.items()})


def zip_of(files: dict[str, str], path: str = "made.zip", top: str = f"{ID}/") -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(top + name, text)
    return path


def add_to(path: str, name: str, text: str = "x") -> str:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")  # zipfile's own about a duplicate name
        archive.writestr(name, text)
    return path
