"""Text to token ids and back, by a SentencePiece model (Kudo and Richardson, arXiv 1808.06226)."""

import os
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from config import shown
from utils import is_file, sha256_of

TOKENIZER_MODEL = Path(__file__).resolve().parent / "tokenizer.model"


class Tokenizer:
    """A SentencePiece model with Llama's conventions: bos, eos, and `<0x00>` as padding.

    `max_len` bounds the pieces of a text, before bos and eos are added. `tokenizer_model` is a
    `.model` file; None takes the Llama 2 tokenizer at the root of the project.
    """

    def __init__(
        self, max_len: int | None = None, tokenizer_model: str | os.PathLike | None = None
    ):
        if max_len is not None and max_len < 1:
            raise ValueError(f"max_len={max_len} is not a positive number of tokens")
        self.max_len = max_len
        self.model_path = str(tokenizer_model or TOKENIZER_MODEL)
        if not Path(self.model_path).is_file():
            raise FileNotFoundError(
                2,
                "no such tokenizer; `bash setup.sh` downloads it, --tokenizer_path names another",
                self.model_path,
            )
        try:
            self.sp_model = SentencePieceProcessor(model_file=self.model_path)
            self.sp_model.id_to_piece(0)  # an IndexError where it has no piece at all
            self.sp_model.decode(list(range(len(self.sp_model))))  # where one is not UTF-8
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise ValueError(f"{self.model_path}: is not a SentencePiece model") from error
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        # SentencePiece's own pad id is -1, which no embedding has.
        self.pad_id: int = self.sp_model.piece_to_id("<0x00>")
        if self.sp_model.id_to_piece(self.pad_id) != "<0x00>" or min(self.bos_id, self.eos_id) < 0:
            raise ValueError(
                f"{self.model_path}: lacks one of bos, eos and <0x00> (train it with byte fallback)"
            )

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Token ids of a text: its first `max_len` pieces, between bos and eos if asked for."""
        pieces = self.sp_model.encode(s)[: self.max_len]
        return [self.bos_id] * bos + pieces + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; bos and eos have none."""
        return self.sp_model.decode(ids)

    def require_vocab_size(self, vocab_size: int) -> None:
        """Raises ValueError where a model with another vocabulary would read these ids."""
        if self.n_words != vocab_size:
            raise ValueError(
                f"{self.model_path} has {self.n_words} tokens, the checkpoint has {vocab_size}: "
                "name the tokenizer that it was trained with (--tokenizer_path)"
            )


def find_tokenizer_model(checkpoint: str | os.PathLike) -> Path:
    """The tokenizer of a checkpoint: `tokenizer.model` or the only `*.model` beside it, else the
    one at the root of the project."""
    beside = sorted(
        path for path in Path(checkpoint).absolute().parent.glob("*.model") if path.is_file()
    )
    named = [path for path in beside if path.name == "tokenizer.model"]
    if named:
        return named[0]
    return beside[0] if len(beside) == 1 else TOKENIZER_MODEL


def open_tokenizer(
    checkpoint: str | os.PathLike, saved: dict[str, Any], path: str | os.PathLike | None = None
) -> Tokenizer:
    """The tokenizer that a finetuned checkpoint was trained with, at `path` or where it was then.

    That is looked for from the current folder, beside the checkpoint and from the project's folder;
    where none is recorded, `find_tokenizer_model` says which it is. A ValueError says that it is
    not there any more, or is another one.
    """
    if path is None and "tokenizer_path" in saved:
        recorded = saved["tokenizer_path"]
        folders = (Path(), Path(checkpoint).parent, TOKENIZER_MODEL.parent)
        found = [folder / recorded for folder in folders if is_file(folder / recorded)]
        same = [place for place in found if sha256_of(place) == saved.get("tokenizer_sha256")]
        path = next(iter([*same, *found]), None)
        if path is None:
            raise ValueError(
                f"{checkpoint}: its tokenizer {shown(recorded)} is not there any more; name the "
                "place it was moved to by --tokenizer_path"
            )
    tokenizer = Tokenizer(tokenizer_model=path or find_tokenizer_model(checkpoint))
    if saved.get("tokenizer_sha256") not in (None, sha256_of(tokenizer.model_path)):
        raise ValueError(
            f"{checkpoint}: was trained with another tokenizer than {tokenizer.model_path}; name "
            "its own by --tokenizer_path"
        )
    return tokenizer
