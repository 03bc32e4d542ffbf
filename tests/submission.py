"""A small complete submission, the splits that it answers, and zips made by hand."""

import warnings
import zipfile
from pathlib import Path

ID = "abc-1"

SOURCES = {
    "run_llama.py": "import argparse\nfrom training.loop import train\n",
    "base_llama.py": "import torch\nfrom config import LlamaConfig\n",
    "llama.py": "from base_llama import Base\nfrom formats import checkpoint\nimport rope\n",
    "rope.py": "import torch.nn.functional as F\n",
    "classifier.py": "from llama import Llama\nfrom tokenizer import Tokenizer\n",
    "config.py": "from __future__ import annotations\nimport os.path\n",
    "optimizer.py": "from torch.optim import Optimizer\n",
    "sanity_check.py": "import numpy as np\nfrom llama import Llama\n",
    "tokenizer.py": "from sentencepiece import SentencePieceProcessor\n",
    # As the assignment's own.
    "utils.py": "import importlib_metadata, requests\nfrom urllib.parse import urlparse\n"
    "from tqdm.auto import tqdm\nfrom filelock import FileLock\n",
    "optimizer_test.py": "from optimizer import AdamW\n",
}
ROOMS = {
    "training/__init__.py": "",
    "training/loop.py": "def f():\n    import tqdm\n    import sklearn\nfrom . import state\n",
    "training/state.py": "from formats.deep.torch_file import load\n",
    "formats/checkpoint.py": "import torch\n",  # formats/ has no __init__.py
    "formats/deep/__init__.py": "from .names import NAMES\n",
    "formats/deep/names.py": "",
    "formats/deep/torch_file.py": "",
    "formats/names.json": "[]",
    "data/fetch.py": "import urllib.request\n",
    "data/manifest.json": "{}",
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


def predictions(data: str, split: str, end: str = "\n") -> str:
    sentences = enumerate(SENTENCES[f"{data}-{split}"])
    return "".join(f"{i % 2} ||| {sentence}{end}" for i, sentence in sentences)


OUTPUTS = [
    f"{data}-{split}-{option}-output.txt"
    for data in ("sst", "cfimdb")
    for split in ("dev", "test")
    for option in ("prompting", "finetuning")
]
REQUIRED = [
    *("run_llama.py", "base_llama.py", "llama.py", "rope.py", "classifier.py", "config.py"),
    *("optimizer.py", "sanity_check.py", "tokenizer.py", "utils.py", "README.md", "structure.md"),
    *("sanity_check.data", "setup.sh"),
    *("generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt", *OUTPUTS),
]
FILES = {name: f"the text of {name}\n" * 20 for name in REQUIRED} | SOURCES | ROOMS | MAPPINGS
FILES |= {name: predictions(*name.split("-")[:2]) for name in OUTPUTS}
FILES |= {f"{ID}-report.pdf": "%PDF", "requirements.txt": "torch\n", "LICENSE": "MIT"}


def put(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    return folder


def put_splits(folder: Path) -> Path:
    """The four split files, with labels other than the predicted."""
    lines = {split: "".join(f"1 ||| {s}\n" for s in texts) for split, texts in SENTENCES.items()}
    return put(folder, {f"{split}.txt": text for split, text in lines.items()})


def zip_of(files: dict[str, str], path: str = "made.zip", top: str = f"{ID}/") -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(top + name, text)
    return path


def add_to(path: str, name: str | zipfile.ZipInfo, text: str = "x") -> str:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")  # zipfile's own about a duplicate name
        archive.writestr(name, text)
    return path
