"""Text to token ids and back, by a SentencePiece model (Kudo and Richardson, arXiv 1808.06226)."""

import os
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from utils import InputError, brief, sha256_of

TOKENIZER_MODEL = Path(__file__).resolve().parent / "tokenizer.model"


class Tokenizer:
    """A SentencePiece model with Llama's conventions: the tokens bos and eos begin and end a text,
    and `<0x00>` pads.

    `max_len` bounds the pieces (SentencePiece's tokens) of a text, without bos and eos.
    `tokenizer_model` is a `.model` file; None takes the Llama 2 tokenizer at the root of the
    project.
    """

    def __init__(
        self, max_len: int | None = None, tokenizer_model: str | os.PathLike | None = None
    ):
        if max_len is not None and max_len < 1:
            raise InputError(f"max_len={max_len} is not a positive number of tokens")
        self.max_len = max_len
        self.model_path = str(tokenizer_model or TOKENIZER_MODEL)
        self.sp_model = _load(self.model_path)
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise InputError(f"{self.model_path}: has no bos or no eos; train it with both")

    @property
    def pad_id(self) -> int:
        """The id of `<0x00>`: SentencePiece's own pad id is -1, which no embedding has."""
        pad_id = self.sp_model.piece_to_id("<0x00>")
        if self.sp_model.id_to_piece(pad_id) != "<0x00>":
            raise InputError(
                f"{self.model_path}: has no <0x00> to pad batches with; train it with byte fallback"
            )
        return pad_id

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Return the token ids of a text: its first `max_len` pieces, between bos and eos."""
        pieces = self.sp_model.encode(s)[: self.max_len]
        return [self.bos_id] * bos + pieces + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids; bos and eos decode to nothing."""
        return self.sp_model.decode(ids)

    def require_vocab_size(self, vocab_size: int) -> None:
        """Raise InputError if a model has another vocabulary."""
        if self.n_words != vocab_size:
            raise InputError(
                f"{self.model_path} has {self.n_words} tokens, the checkpoint has {vocab_size}: "
                "name the tokenizer that it was trained with (--tokenizer_path)"
            )


def _load(path: str) -> SentencePieceProcessor:
    if not Path(path).is_file():
        remedy = "no such tokenizer; `bash setup.sh` downloads it, --tokenizer_path names another"
        raise FileNotFoundError(2, remedy, path)
    content = Path(path).read_bytes()  # SentencePiece opens no path that is not UTF-8
    if content.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a git-lfs pointer, not the tokenizer; run `git lfs pull`")
    try:
        if not content:  # which SentencePiece would not notice
            raise ValueError("empty")
        model = SentencePieceProcessor(model_proto=content)
        model.decode([0, *range(len(model))])  # raises if there is no piece, or one is not UTF-8
    except (RuntimeError, OSError, ValueError, IndexError) as error:
        raise InputError(f"{path}: is not a SentencePiece model") from error
    return model


def find_tokenizer_model(checkpoint: str | os.PathLike) -> Path:
    """Return `tokenizer.model` or the only `*.model` beside a checkpoint, else the project's.

    Raises InputError if there are several others, of which one may be the checkpoint's.
    """
    beside = sorted(
        path for path in Path(checkpoint).absolute().parent.glob("*.model") if path.is_file()
    )
    named = [path for path in beside if path.name == "tokenizer.model"]
    if named:
        return named[0]
    if len(beside) > 1:
        names = ", ".join(path.name for path in beside)
        raise InputError(f"{checkpoint}: beside it are {names}; name one with --tokenizer_path")
    return beside[0] if beside else TOKENIZER_MODEL


def open_tokenizer(
    checkpoint: str | os.PathLike, saved: dict[str, Any], path: str | os.PathLike | None = None
) -> Tokenizer:
    """Return the tokenizer of a checkpoint with content `saved`: at `path`, else where a finetuned
    one recorded it (from the current folder, beside the checkpoint, or in the project), else
    `find_tokenizer_model`'s.

    Raises InputError if it is missing, or differs from the recorded one.
    """
    recorded = saved.get("tokenizer_path")
    if path is None and recorded is not None:
        folders = (Path(), Path(checkpoint).parent, TOKENIZER_MODEL.parent)
        found = [folder / str(recorded) for folder in folders]
        found = [place for place in found if os.path.isfile(place)]  # noqa: PTH113, of any length
        if not found:
            raise InputError(
                f"{checkpoint}: its tokenizer {brief(recorded)} was not found; pass its new path "
                "with --tokenizer_path"
            )
        same = [place for place in found if sha256_of(place) == saved.get("tokenizer_sha256")]
        path = [*same, *found][0]
    tokenizer = Tokenizer(tokenizer_model=path or find_tokenizer_model(checkpoint))
    if saved.get("tokenizer_sha256") not in (None, sha256_of(tokenizer.model_path)):
        raise InputError(
            f"{checkpoint}: was trained with a different tokenizer than {tokenizer.model_path}; "
            "pass the original with --tokenizer_path"
        )
    return tokenizer
